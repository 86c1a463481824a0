"""Compares evaluation reports: a table with standard errors, differences and the paper's scores, and a bar chart."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts import replace_file
from ..display import picture, table
from ..results import EVALUATION_FILE, Comparison, ComparisonRow, Evaluation, Score, TaskResult
from .suites import suite_file


if TYPE_CHECKING:
    from rich.console import Group


def read_reports(paths: list[str | Path]) -> dict[str, Evaluation]:
    """
    Reads reports from `report.json` files or their directories. Returns them by model name.

    Raises:
        ValueError: when a report is missing, or suites, limits, harness versions or data differ.
    """
    reports = {}
    for path in map(Path, paths):
        file = path / EVALUATION_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{path} holds no report.json. Make one: mobilemoe eval --model DIR --output {path}")
        report = Evaluation.load(file)
        if report.model.name in reports:
            raise ValueError(f"Two reports are of {report.model.name}. Give each model once.")
        reports[report.model.name] = report
    for key, read in {
        "suite": lambda report: report.settings.suite,
        "limit": lambda report: report.settings.limit,
        "lm_eval version": lambda report: report.settings.versions["lm_eval"],
        "data": lambda report: {name: task.data_revision for name, task in report.tasks.items()},
    }.items():
        values = [read(report) for report in reports.values()]
        if any(value != values[0] for value in values):
            raise ValueError(f"The reports differ in {key}: {values}. Run the models with the same settings.")
    return reports


def paper_scores(column: str | None) -> dict[str, float]:
    """
    Scores of a model of the paper in percent, by task, with the mean under the name of the suite.

    Raises:
        ValueError: when the paper has no such model.
    """
    paper = suite_file()["paper"]
    if column is not None and column not in paper:
        raise ValueError(f"The paper has no model {column!r}. Choose one of: {', '.join(paper)}.")
    return paper[column] if column is not None else {}


def comparison(reports: dict[str, Evaluation], column: str | None, command: str | None = None) -> Comparison:
    """Scores, differences to the first report in percentage points, and the paper's scores where known."""
    first, *others = reports
    suite = reports[first].settings.suite
    paper = paper_scores(column)
    # The paper's mean is over the whole suite.
    whole = set(reports[first].tasks) == set(suite_file()["suites"][suite]["tasks"])
    rows = {}
    for name in [*reports[first].tasks, "mean"]:
        results = {model: report.result(name) for model, report in reports.items()}
        rows[name] = ComparisonRow(
            title="mean" if name == "mean" else reports[first].tasks[name].title,
            paper=paper.get(name) if name != "mean" else paper.get(suite) if whole else None,
            scores={model: 100 * result.score for model, result in results.items()},
            stderr={
                model: None if result.stderr is None else 100 * result.stderr for model, result in results.items()
            },
            difference={model: 100 * (results[model].score - results[first].score) for model in others},
        )
    return Comparison(command=command, suite=suite, reference=first, paper_model=column, rows=rows)


def mean_score(results: Iterable[TaskResult]) -> Score | None:
    """
    Macro average: the mean over categories of the mean over their tasks, as in the paper, with its standard error.

    A task without a category counts as a category, so for the foundation suite this is the plain mean.
    """
    results = list(results)
    if not results:
        return None
    sizes = Counter(result.category for result in results)
    weights = [1 / (len(sizes) * sizes[result.category]) for result in results]
    errors = [result.stderr for result in results]
    stderr = None
    if None not in errors:
        stderr = sum((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True)) ** 0.5
    mean = sum(weight * result.score for weight, result in zip(weights, results, strict=True))
    return Score(score=mean, stderr=stderr)


def format_score(result: Score) -> str:
    stderr = "" if result.stderr is None else f" ± {100 * result.stderr:.1f}"
    return f"{100 * result.score:.1f}{stderr}"


def report_table(reports: dict[str, Evaluation], column: str | None = None) -> "Group":
    """Scores in percent with standard errors; each model after the first is followed by the difference to it."""
    compared = comparison(reports, column)
    columns = ["task", "shots", "metric"]
    for number, model in enumerate(reports):
        columns += [Path(model).name, *(["difference"] if number else [])]
    title = f"{compared.suite}, percent ± standard error"
    if column is not None:
        columns.append("paper")
        title += f"; paper: {column}"
    first, rows = next(iter(reports.values())), []
    for name, row in compared.rows.items():
        shots, metric = ("", "") if name == "mean" else (first.tasks[name].num_fewshot, first.tasks[name].metric)
        cells = [row.title, shots, metric]
        for model, report in reports.items():
            cells.append(format_score(report.result(name)))
            if model in row.difference:
                cells.append(f"{row.difference[model]:+.1f}")
        if column is not None:
            cells.append("" if row.paper is None else f"{row.paper:.1f}")
        rows.append(cells)
    return table(columns, rows, title, bold=len(rows) - 1)


def plot_reports(reports: dict[str, Evaluation], path: Path, column: str | None = None) -> None:
    """Bar chart of the scores by task and model, with standard errors and a mark at the paper's score."""
    rows = comparison(reports, column).rows
    width = 0.8 / len(reports)
    with replace_file(path) as partial, picture(partial, (1.5 + 0.75 * len(rows), 4.5)) as (axis,):
        for number, model in enumerate(reports):
            axis.bar(
                [place + (number - (len(reports) - 1) / 2) * width for place in range(len(rows))],
                [row.scores[model] for row in rows.values()],
                width,
                yerr=[row.stderr[model] or 0 for row in rows.values()],
                label=Path(model).name,
                capsize=2,
            )
        known = [(place, row.paper) for place, row in enumerate(rows.values()) if row.paper is not None]
        if known:
            axis.plot(*zip(*known, strict=True), "k_", markersize=18, label=f"paper, {column}")
        axis.set_xticks(range(len(rows)), [row.title for row in rows.values()], rotation=45, ha="right")
        axis.set(ylabel="percent", ylim=(0, 100))
        axis.legend()


def compare(
    paths: list[str | Path], output_dir: str | Path, column: str | None = None, command: str | None = None
) -> "Group":
    """
    Writes `comparison.json` and `comparison.png` and returns the table. Differences are to the first report.

    Raises:
        ValueError: when the reports cannot be compared.
    """
    reports = read_reports(paths)
    comparison(reports, column, command).save(Path(output_dir) / "comparison.json")
    plot_reports(reports, Path(output_dir) / "comparison.png", column)
    return report_table(reports, column)
