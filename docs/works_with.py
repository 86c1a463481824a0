"""
Runs the tests that carry the mark `works_with` and writes docs/works-with.md from what they show:

    python docs/works_with.py

A mark names the tool and its packages: `@pytest.mark.works_with("trl sft --use_peft", "trl", "peft")`. The parameter
`weights` of a test, or that of its mark, is the column; without either it is both. `environment` is where it ran.
"""

import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "works-with.md"
COLUMNS = ("BF16", "INT4")
HEAD = """# Works with

Written by `python docs/works_with.py`, which runs the tests below. Each runs the tool itself on a small checkpoint
that `save_pretrained` wrote. "Package" is a process that can import `modeling_mobilemoe`; "remote code" is one that
cannot and has the code in the directory only, with `trust_remote_code`. What is open in the tools themselves is in
[docs/upstream](upstream/README.md).

| tool | BF16 | INT4 | where | test | versions |
|---|---|---|---|---|---|
"""


class Recorder:
    """A pytest plug-in that keeps the outcomes of marked tests."""

    def __init__(self):
        # By tool, packages and test: outcomes by column, and the environments.
        self.outcomes = defaultdict(lambda: defaultdict(set))
        self.environments = defaultdict(list)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        mark = item.get_closest_marker("works_with")
        if mark is not None and (report.when == "call" or report.outcome != "passed"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            row = (*mark.args, item.nodeid.partition("[")[0])
            columns = mark.kwargs.get("weights", COLUMNS)
            for column in [parameters["weights"]] if "weights" in parameters else columns:
                self.outcomes[row][column].add(report.outcome)
            environment = parameters.get("environment", "package")
            if environment not in self.environments[row]:
                self.environments[row].append(environment)
        return report


def cell(outcomes: set[str]) -> str:
    if not outcomes:
        return "-"
    return "yes" if outcomes == {"passed"} else "not run" if "failed" not in outcomes else "**no**"


def table(recorder: Recorder) -> str:
    lines = []
    for row in sorted(recorder.outcomes):
        tool, *packages, test = row
        cells = [cell(recorder.outcomes[row][column]) for column in COLUMNS]
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        file, _, name = test.partition("::")
        lines.append(
            f"| `{tool}` | {' | '.join(cells)} | {', '.join(recorder.environments[row])} | "
            f"[`{name}`](../{file}) | {versions} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    recorder = Recorder()
    status = pytest.main(["-q", "-m", "works_with", str(ROOT / "tests"), *sys.argv[1:]], plugins=[recorder])
    PAGE.write_text(HEAD + table(recorder))
    sys.exit(status)


if __name__ == "__main__":
    main()
