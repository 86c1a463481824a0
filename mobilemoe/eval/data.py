"""The requirements of a benchmark suite: its packages, and its pinned data sets for offline use."""

import contextlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..artifacts import Artifact, causes
from .suites import select_tasks, suite_file


logger = logging.getLogger(__name__)

PUNKT = "tokenizers/punkt_tab"
# The metric script of the harness's two code tasks, a Space on the Hub. It is executed.
CODE_EVAL = "evaluate-metric/code_eval"
# Subdirectory of a data directory for Python packages.
SITE = "python"


def check_requirements(tasks: dict[str, dict], data_dir: Path | None) -> None:
    """
    Raises:
        ValueError: when packages are missing or have another version. The message says how to install them.
    """
    problems = []
    for requirement, details in suite_file()["requirements"].items():
        users = [name for name, task in tasks.items() if task.get("requires") == requirement]
        missing = [module for module in details["modules"] if importlib.util.find_spec(module) is None]
        if missing and users:
            problems.append(f"{', '.join(users)} needs {', '.join(missing)}: {details['install']}")
        for package in missing_packages(details, data_dir) if users and data_dir is None else []:
            problems.append(f"{', '.join(users)} needs {package}, which `mobilemoe eval prepare` puts into --data-dir")
    if problems:
        raise ValueError("; ".join(problems) + ". Or choose other tasks with --tasks.")


def missing_packages(requirement: dict, data_dir: Path | None) -> list[str]:
    """Packages that a requirement pins and that neither the environment nor `data_dir` has in this version."""
    missing = []
    for package, release in requirement.get("beside", {}).items():
        record = f"{package.replace('-', '_')}-{release}.dist-info"
        with contextlib.suppress(PackageNotFoundError):
            if version(package).split(".")[:2] == release.split(".")[:2]:
                continue
        if data_dir is None or not (data_dir / SITE / record).is_dir():
            missing.append(f"{package}=={release}")
    return missing


def prepare_data(suite: str, data_dir: str | Path, names: list[str] | None = None) -> None:
    """
    Downloads the requirements of a suite into `data_dir`, data sets at their pinned commits. Complete ones are kept.

    Raises:
        ValueError: for an unknown suite or task.
        OSError: when the Hub cannot be reached or the terms of a data set have not been accepted.
    """
    data_dir = Path(data_dir)
    tasks = select_tasks(suite, names)
    requirements = {task.get("requires") for task in tasks.values()}
    for repo in {task["dataset"]: None for task in tasks.values()}:
        pin = suite_file()["datasets"][repo]
        if data_problem(data_dir, repo, pin["revision"]) is None:
            logger.info("%s: complete", repo)
        else:
            download(data_dir, repo, "dataset", pin)
    if any(task.get("runs_code") for task in tasks.values()) and data_problem(data_dir, CODE_EVAL, None):
        download(data_dir, CODE_EVAL, "space", {"revision": None, "allow": ["*.py"]})
    if "ifeval" in requirements and not (data_dir / "nltk" / PUNKT).is_dir():
        check_requirements({name: task for name, task in tasks.items() if task.get("requires") == "ifeval"}, data_dir)
        import nltk

        if not nltk.download(Path(PUNKT).name, download_dir=str(data_dir / "nltk"), quiet=True):
            raise OSError(
                "The sentence splitter punkt_tab could not be downloaded. Check the network, then run again."
            )
        logger.info("nltk punkt_tab")
    for requirement in requirements - {None}:
        for package in missing_packages(suite_file()["requirements"][requirement], data_dir):
            options = ["install", "--quiet", "--no-deps", "--target", str(data_dir / SITE), package]
            if subprocess.run([sys.executable, "-m", "pip", *options]).returncode:
                raise OSError(f"{package} could not be installed with the data. Run: pip {' '.join(options)}")
            logger.info(package)


def download(data_dir: Path, repo: str, kind: str, pin: dict) -> None:
    """Downloads to a temporary directory and renames it. A directory with a record file beside it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with tempfile.TemporaryDirectory() as cache:
        try:
            # Of the card alone. `HfApi` would know the commit too, but its errors are those of its HTTP client.
            card = snapshot_download(
                repo, repo_type=kind, revision=pin["revision"], cache_dir=cache, allow_patterns=["README.md"]
            )
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{repo} cannot be downloaded from the Hub: {list(causes(error))[-1]}. Check the network, then run "
                "again: what is complete stays."
            ) from error
        revision = Path(card).name
    logger.info("%s at %s", repo, revision)
    final, partial = data_dir / repo, data_dir / f"{repo}.partial"
    # An interrupted download resumes where it stopped.
    snapshot_download(
        repo,
        repo_type=kind,
        revision=revision,
        local_dir=partial,
        allow_patterns=[*pin["allow"], "README.md"] if "allow" in pin else None,
        ignore_patterns=pin.get("ignore"),
    )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    trim_card(partial)
    record_path(data_dir, repo).unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    write_record(data_dir, repo, revision)


def trim_card(directory: Path) -> None:
    """
    Removes configurations whose files were not downloaded from a data set's card: `datasets` opens the files of the
    first configuration in the card, whichever one is requested.
    """
    from huggingface_hub import DatasetCard

    if not (directory / "README.md").is_file():
        return
    card = DatasetCard.load(directory / "README.md", ignore_metadata_errors=True)
    configs = card.data.get("configs") or []

    def is_here(data_files: str | list) -> bool:
        # A pattern, a list of patterns, or a split with either.
        if isinstance(data_files, list):
            return any(map(is_here, data_files))
        return is_here(data_files["path"]) if isinstance(data_files, dict) else any(directory.glob(data_files))

    kept = [config for config in configs if is_here(config.get("data_files", "*"))]
    if len(kept) < len(configs):
        card.data.configs = kept
        card.save(directory / "README.md")


def record_path(data_dir: Path, repo: str) -> Path:
    return data_dir / f"{repo}.json"


class DataRecord(Artifact):
    """`REPO.json`, written when a data set is complete."""

    what = "the record of a data set"
    remedy = "Fetch the data set again: mobilemoe eval prepare"

    command: str | None = None
    repo: str
    revision: str
    # Bytes by path.
    files: dict[str, int]


def write_record(data_dir: Path, repo: str, revision: str) -> None:
    """Records the commit and file sizes of a completely downloaded data set in `data_dir / repo`."""
    files = {
        str(path.relative_to(data_dir / repo)): path.stat().st_size
        for path in sorted((data_dir / repo).rglob("*"))
        if path.is_file()
    }
    DataRecord(repo=repo, revision=revision, files=files).save(record_path(data_dir, repo))


def data_problem(data_dir: Path, repo: str, revision: str | None) -> str | None:
    """Describes the problem with a data set in `data_dir`; `None` if it is complete."""
    record = record_path(data_dir, repo)
    if not record.is_file():
        return "is missing"
    try:
        found = DataRecord.load(record)
    except ValueError as error:
        return f"is damaged: {error}"
    if revision is not None and found.revision != revision:
        return f"is revision {found.revision}, the suite is frozen at {revision}"
    for name, size in found.files.items():
        path = data_dir / repo / name
        if not path.is_file() or path.stat().st_size != size:
            return f"is damaged: {name} is missing or has another size"
    return None


def check_data(suite: str, tasks: dict[str, dict], data_dir: Path) -> dict[str, str]:
    """
    Checks the data sets of the tasks and returns their commits.

    Raises:
        ValueError: when data sets are missing, damaged or of another revision. The message lists them.
    """
    revisions, problems = {}, []
    needed = {task["dataset"]: suite_file()["datasets"][task["dataset"]]["revision"] for task in tasks.values()}
    if any(task.get("runs_code") for task in tasks.values()):
        needed[CODE_EVAL] = None
    for repo, revision in needed.items():
        problem = data_problem(data_dir, repo, revision)
        if problem:
            problems.append(f"{repo} {problem}")
        else:
            revisions[repo] = DataRecord.load(record_path(data_dir, repo)).revision
    requirements = {task.get("requires") for task in tasks.values()}
    if "ifeval" in requirements and not (data_dir / "nltk" / PUNKT).is_dir():
        problems.append(f"nltk's {PUNKT} is missing")
    for requirement in requirements - {None}:
        packages = missing_packages(suite_file()["requirements"][requirement], data_dir)
        problems += [f"{package} is missing" for package in packages]
    if problems:
        raise ValueError(
            f"{data_dir} does not hold what these tasks need:\n  "
            + "\n  ".join(problems)
            + f"\nFetch it with network: mobilemoe eval prepare --suite {suite} --data-dir {data_dir}"
        )
    return revisions
