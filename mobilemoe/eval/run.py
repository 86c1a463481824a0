"""Runs frozen benchmark suites with lm-evaluation-harness, on checkpoints (full-precision or INT4) and `.pte`.

    mobilemoe eval prepare --suite foundation --data-dir DATA       # once, with network access
    mobilemoe eval --model DIR --suite foundation --data-dir DATA --output OUT
    mobilemoe eval compare --results OUT-BF16 OUT-INT4 OUT-PTE --output OUT

`suites.yaml` defines the suites. Tasks, prompts, answers and metrics are those of the harness.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

from ..artifacts import check_writable, describe_model, is_pte, local_checkpoint
from ..machine import machine, package_versions
from ..results import EVALUATION_FILE, Evaluation, EvaluationSettings, Machine, TaskResult
from ..runtime import CheckpointModel, PteModel
from .data import CODE_EVAL, SITE, check_data, check_requirements
from .report import format_score, mean_score, plot_reports
from .suites import select_tasks, suite_file


logger = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    command: str | None = None,
) -> Evaluation:
    """
    Runs a suite and writes `report.json` and `report.png`.

    Tasks run one after the other, and the seeds are reset before each. The results of finished tasks are kept in
    `output_dir/tasks`; a second call with the same settings resumes after them.

    Args:
        model (`str` or `Path`): checkpoint directory, Hub id, or directory with `model.pte`.
        suite (`str`): a suite of `suites.yaml`.
        output_dir (`str` or `Path`): directory for the report and the results of finished tasks.
        data_dir (`str` or `Path`, *optional*): made by `prepare_data`; without it the harness downloads the data.
        tasks (`list[str]`, *optional*): run only these tasks of the suite.
        limit (`int`, *optional*): run only the first documents of each task, for a quick test.
        dtype (`str`, defaults to `"auto"`): dtype of a checkpoint's weights that are not packed.
        tokens_per_batch (`int`, *optional*): see `CheckpointLM`.
        run_unsafe_code (`bool`, defaults to `False`): run the tasks that execute code written by the model.
        command (`str`, *optional*): the command line, recorded in the JSON files.

    Raises:
        ValueError: for an unknown suite or task, a missing requirement, data that does not match the suite, a model
            that cannot run it, or an `output_dir` with results of other settings.
    """
    check_numbers(limit, tokens_per_batch, dtype)
    selected, skipped = runnable_tasks(suite, tasks, run_unsafe_code)
    data_dir = None if data_dir is None else Path(data_dir).resolve()
    revisions = data_revisions(suite, selected, data_dir)
    description = describe_model(model)
    settings = suite_settings(suite, limit, dtype)
    identity = {"model": description.sha256} | settings.model_dump()
    fingerprints = {
        name: fingerprint({"task": task, "data": revisions[task["dataset"]]} | identity)
        for name, task in selected.items()
    }
    check_writable(task_file(output_dir, "task"))
    results = kept_results(output_dir, fingerprints)
    todo = {name: task for name, task in selected.items() if name not in results}
    if todo:
        lm = load_model(model, dtype, tokens_per_batch, settings.apply_chat_template)
        for name, task in todo.items():
            logger.info("%s (%d of %d)", name, len(results) + 1, len(selected))
            origin = {"fingerprint": fingerprints[name], "data_revision": revisions[task["dataset"]]}
            results[name] = run_task(lm, task, settings, data_dir, {"command": command} | origin)
            results[name].save(task_file(output_dir, name))
            logger.info("%s: %s", name, format_score(results[name]))
    mean = mean_score(results[name] for name in selected)
    report = Evaluation(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=description,
        settings=settings,
        machine=Machine(**machine()),
        tasks={name: results[name] for name in selected},
        left_out=skipped,
        mean=mean and mean.score,
        mean_stderr=mean and mean.stderr,
    )
    report.save(Path(output_dir, EVALUATION_FILE))
    plot_reports({description.name: report}, Path(output_dir, "report.png"))
    return report


def check_numbers(limit: int | None, tokens_per_batch: int | None, dtype: str) -> None:
    for name, value in {"limit": limit, "tokens_per_batch": tokens_per_batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} leaves nothing to run. Set at least 1, or leave it out.")
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} here. Choose one of: {', '.join(DTYPES)}.")


def runnable_tasks(suite: str, names: list[str] | None, run_unsafe_code: bool) -> tuple[dict[str, dict], list[str]]:
    """
    The settings by task, and the names of tasks that are skipped because they execute code.

    Raises:
        ValueError: for an unknown suite or task, or when a task that executes code was requested by name.
    """
    selected = select_tasks(suite, names)
    skipped = [name for name, task in selected.items() if task.get("runs_code") and not run_unsafe_code]
    if skipped and names:
        raise ValueError(
            f"{', '.join(skipped)} executes code that the model wrote. Pass --confirm-run-unsafe-code inside a "
            "sandbox, or leave it out of --tasks."
        )
    for name in skipped:
        logger.warning(
            "%s is left out: it executes code that the model wrote. --confirm-run-unsafe-code runs it.", name
        )
    return {name: task for name, task in selected.items() if name not in skipped}, skipped


def data_revisions(suite: str, tasks: dict[str, dict], data_dir: Path | None) -> dict[str, str | None]:
    """The commit of every data set, in the data directory or as the harness will download it."""
    check_requirements(tasks, data_dir)
    if data_dir is not None:
        return check_data(suite, tasks, data_dir)
    return {task["dataset"]: suite_file()["datasets"][task["dataset"]]["revision"] for task in tasks.values()}


def suite_settings(suite: str, limit: int | None, dtype: str) -> EvaluationSettings:
    versions = package_versions()
    if versions["lm_eval"] != suite_file()["lm_eval"]:
        logger.warning(
            "The suites are frozen at lm-eval %s and this is %s: its prompts or metrics may differ.",
            suite_file()["lm_eval"],
            versions["lm_eval"],
        )
    return EvaluationSettings(
        suite=suite,
        limit=limit,
        dtype=dtype,
        apply_chat_template=suite_file()["suites"][suite]["apply_chat_template"][0],
        seeds=suite_file()["seeds"],
        versions=versions,
    )


def task_file(output_dir: str | Path, name: str) -> Path:
    return Path(output_dir, "tasks", f"{name}.json")


def kept_results(output_dir: str | Path, fingerprints: dict[str, str]) -> dict[str, TaskResult]:
    """
    Results of tasks that an earlier run finished.

    Raises:
        ValueError: when a result is of another model, other settings or other versions.
    """
    results = {}
    for name, expected in fingerprints.items():
        path = task_file(output_dir, name)
        if path.is_file():
            results[name] = TaskResult.load(path)
            if results[name].fingerprint != expected:
                raise ValueError(
                    f"{path} is the result of another model, other settings or other versions. "
                    "Choose another --output, or delete it."
                )
            logger.info("%s: kept from before", name)
    return results


def load_model(model: str | Path, dtype: str, tokens_per_batch: int | None, chat: bool):
    """Loads a checkpoint or a `.pte` as a model of the harness."""
    from .models import CheckpointLM, PteLM

    # The harness warns about every model that it did not load itself.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if is_pte(model):
        if dtype != "auto":
            raise ValueError(f"dtype={dtype} is set, but the precision of a .pte is fixed. Leave --dtype out.")
        lm = PteLM(PteModel(model))
    else:
        checkpoint = CheckpointModel(local_checkpoint(model), dtype=DTYPES[dtype])
        # As an exported `.pte`: the generation config may lack end-of-sequence ids that the tokenizer has.
        checkpoint.model.generation_config.eos_token_id = checkpoint.eos_ids
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
    """A harness group that contains only the given task or group and overrides its settings with the suite's."""
    group = {"group": f"suite_{name}", "task": [name], "num_fewshot": task["num_fewshot"][0]}
    if "generation_kwargs" in task:
        group["generation_kwargs"] = task["generation_kwargs"][0]
    revision = suite_file()["datasets"][task["dataset"]]["revision"]
    if data_dir is not None:
        group["dataset_path"] = str(data_dir / task["dataset"])
    elif revision is not None:
        group["dataset_kwargs"] = {"revision": revision}
    return group


def run_task(
    lm, task: dict, settings: EvaluationSettings, data_dir: Path | None, origin: dict[str, str | None]
) -> TaskResult:
    """Runs a task or group of the harness. `origin` has the command, the fingerprint and the data revision."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    folder = Path(lm_eval.__file__).parent / "tasks" / task["folder"]
    seeds = settings.seeds
    lm.num_truncated = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, task_environment(task, data_dir):
        group = group_file(task["task"], task, data_dir)
        (Path(temporary) / "suite.yaml").write_text(yaml.safe_dump(group))
        # Only this folder: reading all task files of the harness takes longer than some tasks run.
        manager = TaskManager(include_path=[folder, temporary], include_defaults=False)
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[group["group"]],
            task_manager=manager,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            # Used with a chat template only. It is the harness's default, set explicitly.
            fewshot_as_multiturn=True,
            log_samples=False,
            # For standard errors of metrics without a formula. The harness's default of 100,000 takes minutes.
            bootstrap_iters=1000,
            confirm_run_unsafe_code=bool(task.get("runs_code")),
            random_seed=seeds["random"],
            numpy_random_seed=seeds["numpy"],
            torch_random_seed=seeds["torch"],
            fewshot_random_seed=seeds["fewshot"],
        )
    # The members of a group, including nested groups.
    subtasks = set(results["results"]) - {task["task"], group["group"]}
    scores = results["results"][task["task"]]
    metric, _, chosen = task["metric"][0].partition(",")
    stderr = scores.get(f"{metric}_stderr,{chosen or 'none'}")
    return TaskResult(
        title=task["title"],
        task=task["task"],
        category=task.get("category", task["title"]),
        task_versions={name: value for name, value in results["versions"].items() if value is not None},
        num_fewshot=task["num_fewshot"][0],
        metric=task["metric"][0],
        score=scores[f"{metric},{chosen or 'none'}"],
        stderr=stderr if isinstance(stderr, float) else None,
        num_documents=sum(count["effective"] for count in results["n-samples"].values()),
        num_truncated=lm.num_truncated,
        tokens_per_batch=lm.tokens_per_batch,
        seconds=round(time.perf_counter() - started, 2),
        all_metrics=numbers(scores),
        subtasks={name: numbers(results["results"][name]) for name in sorted(subtasks)},
        sources={key: task[key][1] for key in ("num_fewshot", "metric", "generation_kwargs") if key in task},
        **origin,
    )


def numbers(metrics: dict) -> dict[str, int | float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def task_environment(task: dict, data_dir: Path | None) -> Iterator[None]:
    """Makes tasks load NLTK data, the code metric and packages from the data directory."""
    with contextlib.ExitStack() as stack:
        if data_dir is not None and (data_dir / SITE).is_dir():
            # First in the path: the environment may have another version of a package.
            sys.path.insert(0, str(data_dir / SITE))
            stack.callback(sys.path.remove, str(data_dir / SITE))
        if task.get("requires") == "ifeval" and data_dir is not None:
            import nltk

            nltk.data.path.insert(0, str(data_dir / "nltk"))
            stack.callback(nltk.data.path.remove, str(data_dir / "nltk"))
        if task.get("runs_code"):
            before = os.environ.get("HF_ALLOW_CODE_EVAL")
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
            stack.callback(restore_environment, "HF_ALLOW_CODE_EVAL", before)
            if data_dir is not None:
                # `evaluate.load("code_eval")` prefers a local directory of that name to the Hub.
                stack.enter_context(contextlib.chdir((data_dir / CODE_EVAL).parent))
        yield


def restore_environment(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
