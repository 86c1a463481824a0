"""The benchmark suites: tasks, shots, metrics, pinned revisions and the paper's scores, in `suites.yaml`."""

from functools import cache
from pathlib import Path

import yaml


@cache
def suite_file() -> dict:
    """The parsed `suites.yaml`. Do not modify it."""
    return yaml.safe_load((Path(__file__).parent / "suites.yaml").read_text())


def select_tasks(suite: str, names: list[str] | None = None) -> dict[str, dict]:
    """
    The settings of the selected tasks, in the order of the suite.

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
