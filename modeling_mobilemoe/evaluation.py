"""The frozen benchmark suites on lm-evaluation-harness, for checkpoints (full-precision or INT4) and `.pte` alike.

    mobilemoe eval prepare --suite foundation --data-dir DATA       # once, with network
    mobilemoe eval --model DIR --suite foundation --data-dir DATA --output OUT
    mobilemoe eval compare --results OUT-BF16 OUT-INT4 OUT-PTE --output OUT

What a suite runs stands in `suites.yaml`. Tasks, prompts, answers and metrics are the harness's own.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

from .export import file_sha256, local_checkpoint
from .runtime import CheckpointModel, PteModel


PUNKT = "tokenizers/punkt_tab"
# The script behind the harness's two code tasks, a Space on the Hub; it is run, not only read.
CODE_EVAL = "evaluate-metric/code_eval"
PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "executorch", "mobilemoe")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def suite_file() -> dict:
    """The parsed `suites.yaml`; do not modify it."""
    return yaml.safe_load((Path(__file__).parent / "suites.yaml").read_text())


def select_tasks(suite: str, names: list[str] | None = None) -> dict[str, dict]:
    """
    Settings by task name, in the suite's order.

    Raises:
        ValueError: for an unknown suite or task.
    """
    suites = suite_file()["suites"]
    if suite not in suites:
        raise ValueError(f"There is no suite {suite!r}. Choose one of: {', '.join(suites)}.")
    tasks = suites[suite]["tasks"]
    unknown = [name for name in names or [] if name not in tasks]
    if unknown:
        raise ValueError(f"The suite {suite} has no task {', '.join(unknown)}. Choose from: {', '.join(tasks)}.")
    return {name: task for name, task in tasks.items() if not names or name in names}


def check_requirements(tasks: dict[str, dict]) -> None:
    """
    Raises:
        ValueError: naming the tasks whose modules are missing or of another release, and how to install them.
    """
    problems = []
    for requirement, details in suite_file()["requirements"].items():
        missing = [module for module in details["modules"] if importlib.util.find_spec(module) is None]
        for package, wanted in details.get("versions", {}).items():
            with contextlib.suppress(PackageNotFoundError):
                if not version(package).startswith(wanted):
                    missing.append(f"{package} {wanted} (here: {version(package)})")
        users = [name for name, task in tasks.items() if task.get("requires") == requirement]
        if missing and users:
            problems.append(f"{', '.join(users)} needs {', '.join(missing)}: {details['install']}")
    if problems:
        raise ValueError("; ".join(problems) + ". Or choose other tasks with --tasks.")


def prepare_data(suite: str, data_dir: str | Path, names: list[str] | None = None) -> None:
    """
    Downloads the data sets of a suite into `data_dir`, at the pinned commits; what is there already stays.

    Raises:
        ValueError: for an unknown suite or task.
        OSError: where the Hub cannot be reached or a data set's terms have not been accepted.
    """
    data_dir = Path(data_dir)
    tasks = select_tasks(suite, names)
    for repo in {task["dataset"]: None for task in tasks.values()}:
        pin = suite_file()["datasets"][repo]
        if data_problem(data_dir, repo, pin["revision"]) is None:
            print(f"{repo}: complete")
        else:
            download(data_dir, repo, "dataset", pin)
    if any(task.get("runs_code") for task in tasks.values()) and data_problem(data_dir, CODE_EVAL, None):
        download(data_dir, CODE_EVAL, "space", {"revision": None, "allow": ["*.py"]})
    if any(task.get("requires") == "ifeval" for task in tasks.values()) and not (data_dir / "nltk" / PUNKT).is_dir():
        check_requirements({name: task for name, task in tasks.items() if task.get("requires") == "ifeval"})
        import nltk

        if not nltk.download(Path(PUNKT).name, download_dir=str(data_dir / "nltk"), quiet=True):
            raise OSError(
                "The sentence splitter punkt_tab could not be downloaded. Check the network, then run again."
            )
        print("nltk punkt_tab")


def download(data_dir: Path, repo: str, kind: str, pin: dict) -> None:
    """Downloads beside the final place, then renames: a directory with its record beside it is a whole one."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    info = api.dataset_info if kind == "dataset" else api.space_info
    revision = info(repo, revision=pin["revision"] or "main").sha
    print(f"{repo} at {revision}", flush=True)
    final, partial = data_dir / repo, data_dir / f"{repo}.partial"
    # An interrupted download goes on where it stopped.
    snapshot_download(
        repo,
        repo_type=kind,
        revision=revision,
        local_dir=partial,
        allow_patterns=[*pin["allow"], "README.md"] if "allow" in pin else None,
        ignore_patterns=pin.get("ignore"),
    )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    record_path(data_dir, repo).unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    write_record(data_dir, repo, revision)


def record_path(data_dir: Path, repo: str) -> Path:
    return data_dir / f"{repo}.json"


def write_record(data_dir: Path, repo: str, revision: str) -> None:
    """Notes the commit and the sizes of a data set that lies complete in `data_dir / repo`."""
    files = {
        str(path.relative_to(data_dir / repo)): path.stat().st_size
        for path in sorted((data_dir / repo).rglob("*"))
        if path.is_file()
    }
    write_json(record_path(data_dir, repo), {"repo": repo, "revision": revision, "files": files})


def data_problem(data_dir: Path, repo: str, revision: str | None) -> str | None:
    """What is wrong with a data set in `data_dir`, or `None`."""
    record = record_path(data_dir, repo)
    if not record.is_file():
        return "is missing"
    found = json.loads(record.read_text())
    if revision is not None and found["revision"] != revision:
        return f"is revision {found['revision']}, the suite is frozen at {revision}"
    for name, size in found["files"].items():
        path = data_dir / repo / name
        if not path.is_file() or path.stat().st_size != size:
            return f"is damaged: {name} is missing or has another size"
    return None


def check_data(suite: str, tasks: dict[str, dict], data_dir: Path) -> dict[str, str]:
    """
    Returns the commit of every data set of the tasks.

    Raises:
        ValueError: listing the data sets that are missing, damaged or of another revision.
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
            revisions[repo] = json.loads(record_path(data_dir, repo).read_text())["revision"]
    if any(task.get("requires") == "ifeval" for task in tasks.values()) and not (data_dir / "nltk" / PUNKT).is_dir():
        problems.append(f"nltk's {PUNKT} is missing")
    if problems:
        raise ValueError(
            f"{data_dir} does not hold what these tasks need:\n  "
            + "\n  ".join(problems)
            + f"\nFetch it with network: mobilemoe eval prepare --suite {suite} --data-dir {data_dir}"
        )
    return revisions


def evaluate(
    model: str | Path,
    suite: str,
    output_dir: str | Path,
    data_dir: str | Path | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    tokens_per_batch: int | None = None,
    run_unsafe_code: bool = False,
) -> dict:
    """
    Runs a suite and writes `report.json` and `report.png`.

    Tasks run one after the other, each with the seeds set anew. A finished one is kept in `output_dir/tasks`, and a
    second call with the same settings goes on behind it.

    Args:
        model (`str` or `Path`): checkpoint directory, Hub id, or directory with `model.pte`.
        suite (`str`): of `suites.yaml`.
        output_dir (`str` or `Path`): for reports and finished tasks.
        data_dir (`str` or `Path`, *optional*): made by `prepare_data`; nothing is downloaded then. When absent, the
            harness downloads the pinned revisions into the Hub's cache.
        tasks (`list[str]`, *optional*): only these of the suite.
        limit (`int`, *optional*): only the first documents of each task, for a try.
        dtype (`str`, defaults to `"auto"`): of a checkpoint's weights that are not packed.
        tokens_per_batch (`int`, *optional*): see `CheckpointLM`; chosen by itself when absent.
        run_unsafe_code (`bool`, defaults to `False`): run the tasks that execute what the model wrote.

    Raises:
        ValueError: for an unknown suite or task, a missing requirement, data that does not fit the suite, a model
            that cannot run it, or an `output_dir` that holds results with other settings.
    """
    selected = select_tasks(suite, tasks)
    for name, value in {"limit": limit, "tokens_per_batch": tokens_per_batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} leaves nothing to run. Set at least 1, or leave it out.")
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} here. Choose one of: {', '.join(DTYPES)}.")
    skipped = [name for name, task in selected.items() if task.get("runs_code") and not run_unsafe_code]
    if skipped and tasks:
        raise ValueError(
            f"{', '.join(skipped)} executes code that the model wrote. Pass --confirm-run-unsafe-code inside a "
            "sandbox, or leave it out of --tasks."
        )
    selected = {name: task for name, task in selected.items() if name not in skipped}
    for name in skipped:
        log(f"{name} is left out: it executes code that the model wrote. --confirm-run-unsafe-code runs it.")
    check_requirements(selected)
    output_dir = Path(output_dir)
    if data_dir is not None:
        data_dir = Path(data_dir).resolve()
        revisions = check_data(suite, selected, data_dir)
    else:
        revisions = {
            task["dataset"]: suite_file()["datasets"][task["dataset"]]["revision"] for task in selected.values()
        }

    chat = suite_file()["suites"][suite]["apply_chat_template"][0]
    description = describe_model(model)
    settings = {
        "suite": suite,
        "limit": limit,
        "dtype": dtype,
        "apply_chat_template": chat,
        "seeds": suite_file()["seeds"],
        "versions": package_versions(),
    }
    fingerprints = {
        name: fingerprint(
            {"model": description["sha256"], "task": task, "data": revisions[task["dataset"]]} | settings
        )
        for name, task in selected.items()
    }
    results = {}
    for name in selected:
        path = output_dir / "tasks" / f"{name}.json"
        if path.is_file():
            results[name] = json.loads(path.read_text())
            if results[name]["fingerprint"] != fingerprints[name]:
                raise ValueError(
                    f"{path} is the result of another model, other settings or other versions. "
                    "Choose another --output, or delete it."
                )
            log(f"{name}: kept from before")

    todo = {name: task for name, task in selected.items() if name not in results}
    if todo:
        lm = load_model(model, dtype, tokens_per_batch, chat)
        for name, task in todo.items():
            log(f"{name} ({len(results) + 1} of {len(selected)})")
            results[name] = run_task(lm, task, settings, data_dir) | {
                "fingerprint": fingerprints[name],
                "data_revision": revisions[task["dataset"]],
            }
            write_json(output_dir / "tasks" / f"{name}.json", results[name])
            log(f"{name}: {format_score(results[name])}")
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": description,
        "settings": settings,
        "machine": machine(),
        "tasks": {name: results[name] for name in selected},
        "left_out": skipped,
        **mean_score([results[name] for name in selected]),
    }
    from .evaluation_report import plot_reports

    write_json(output_dir / "report.json", report)
    plot_reports({description["name"]: report}, output_dir / "report.png")
    return report


def load_model(model: str | Path, dtype: str, tokens_per_batch: int | None, chat: bool):
    """The harness's view of a checkpoint or a `.pte`."""
    from .evaluation_models import CheckpointLM, PteLM

    # It warns of every model that is handed over instead of loaded.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if is_pte(model):
        if dtype != "auto":
            raise ValueError(f"dtype={dtype} is set, but the precision of a .pte is fixed. Leave --dtype out.")
        lm = PteLM(PteModel(model))
    else:
        checkpoint = CheckpointModel(model, dtype=DTYPES[dtype])
        if torch.cuda.is_available():
            checkpoint.model.cuda()
        lm = CheckpointLM(checkpoint, tokens_per_batch)
    if chat and lm.tokenizer.chat_template is None:
        raise ValueError(
            f"{model} has no chat template, and this suite is for fine-tuned models. "
            "Use an SFT or QAT checkpoint, or --suite foundation."
        )
    return lm


def group_file(name: str, task: dict, data_dir: Path | None) -> dict:
    """A group of the harness with one member, its own task or group, and what the suite sets in it."""
    group = {"group": f"suite_{name}", "task": [name], "num_fewshot": task["num_fewshot"][0]}
    if "generation_kwargs" in task:
        group["generation_kwargs"] = task["generation_kwargs"][0]
    revision = suite_file()["datasets"][task["dataset"]]["revision"]
    if data_dir is not None:
        group["dataset_path"] = str(data_dir / task["dataset"])
    elif revision is not None:
        group["dataset_kwargs"] = {"revision": revision}
    return group


def run_task(lm, task: dict, settings: dict, data_dir: Path | None) -> dict:
    """Runs one task or group of the harness."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    folder = Path(lm_eval.__file__).parent / "tasks" / task["folder"]
    seeds = settings["seeds"]
    lm.num_truncated = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, task_environment(task, data_dir):
        group = group_file(task["task"], task, data_dir)
        (Path(temporary) / "suite.yaml").write_text(yaml.safe_dump(group))
        # Reading all of the harness's task files would take longer than many a task.
        manager = TaskManager(include_path=[folder, temporary], include_defaults=False)
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[group["group"]],
            task_manager=manager,
            limit=settings["limit"],
            apply_chat_template=settings["apply_chat_template"],
            log_samples=False,
            # Bootstrapped errors of the few metrics without a formula; the harness's default of 100,000 takes minutes.
            bootstrap_iters=1000,
            confirm_run_unsafe_code=bool(task.get("runs_code")),
            random_seed=seeds["random"],
            numpy_random_seed=seeds["numpy"],
            torch_random_seed=seeds["torch"],
            fewshot_random_seed=seeds["fewshot"],
        )
    metric, _, chosen = task["metric"][0].partition(",")
    chosen = chosen or "none"
    scores = results["results"][task["task"]]
    stderr = scores.get(f"{metric}_stderr,{chosen}")
    subtasks = {name for name in results["n-samples"] if name != task["task"]}
    return {
        "title": task["title"],
        "task": task["task"],
        "task_versions": {name: value for name, value in results["versions"].items() if value is not None},
        "num_fewshot": task["num_fewshot"][0],
        "metric": task["metric"][0],
        "score": scores[f"{metric},{chosen}"],
        "stderr": stderr if isinstance(stderr, float) else None,
        "num_documents": sum(count["effective"] for count in results["n-samples"].values()),
        "num_truncated": lm.num_truncated,
        "tokens_per_batch": lm.tokens_per_batch,
        "seconds": round(time.perf_counter() - started, 2),
        "all_metrics": {key: value for key, value in scores.items() if isinstance(value, int | float)},
        "subtasks": {
            name: {key: value for key, value in results["results"][name].items() if isinstance(value, int | float)}
            for name in sorted(subtasks)
        },
        "sources": {key: task[key][1] for key in ("num_fewshot", "metric", "generation_kwargs") if key in task},
    }


@contextlib.contextmanager
def task_environment(task: dict, data_dir: Path | None) -> Iterator[None]:
    """Leads two side doors to the network, a sentence splitter and a metric's script, into the data directory."""
    with contextlib.ExitStack() as stack:
        if task.get("requires") == "ifeval" and data_dir is not None:
            import nltk

            nltk.data.path.insert(0, str(data_dir / "nltk"))
            stack.callback(nltk.data.path.remove, str(data_dir / "nltk"))
        if task.get("runs_code"):
            before = os.environ.get("HF_ALLOW_CODE_EVAL")
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
            stack.callback(restore_environment, "HF_ALLOW_CODE_EVAL", before)
            if data_dir is not None:
                # `evaluate.load("code_eval")` takes a directory of that name before it asks the Hub.
                stack.enter_context(contextlib.chdir((data_dir / CODE_EVAL).parent))
        yield


def restore_environment(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def is_pte(model: str | Path) -> bool:
    return (Path(model) / "model.pte").is_file()


def describe_model(model: str | Path) -> dict:
    """
    Kind, size and SHA-256 over names and contents of the files that decide what a model answers.

    Raises:
        ValueError: where there is no such model.
    """
    path = local_checkpoint(model)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither model.pte nor config.json. Name a checkpoint or a directory with a .pte."
        )
    config = json.loads((path / "config.json").read_text())
    kind = "int4" if config.get("quantization") or config.get("quantization_config") else "checkpoint"
    if is_pte(path):
        kind = "pte"
    suffixes = {".pte", ".ptd", ".safetensors", ".jinja"}
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.suffix in suffixes or file.name in names):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
            size += file.stat().st_size
    description = {"name": str(model), "kind": kind, "sha256": digest.hexdigest(), "bytes": size, "config": config}
    if kind == "pte":
        description["export"] = json.loads((path / "export.json").read_text())
    return description


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def machine() -> dict:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def mean_score(results: list[dict]) -> dict:
    """Unweighted mean over tasks, as in the paper, and its standard error from those of the tasks."""
    errors = [result["stderr"] for result in results]
    if not results:
        return {"mean": None, "mean_stderr": None}
    stderr = sum(error**2 for error in errors) ** 0.5 / len(errors) if None not in errors else None
    return {"mean": sum(result["score"] for result in results) / len(results), "mean_stderr": stderr}


def format_score(result: dict) -> str:
    stderr = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['score']:.1f}{stderr}"


def write_json(path: Path, content: dict) -> None:
    """A reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def log(message: str) -> None:
    print(f"[eval] {message}", file=sys.stderr, flush=True)
