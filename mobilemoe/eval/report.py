"""Reports side by side: a table with standard errors, differences and the paper's numbers, and a picture of it."""

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
    Reports by model name, from `report.json` files or the directories that hold them.

    Raises:
        ValueError: for a missing report, or reports of different suites, limits or harness versions.
    """
    reports = {}
    for path in map(Path, paths):
        file = path / EVALUATION_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{path} holds no report.json. Make one: mobilemoe eval --model DIR --output {path}")
        report = Evaluation.load(file)
        if report.model.name in reports:
            raise ValueError(f"Two of the reports are of {report.model.name}. Give each model once.")
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
    Percentages of one of the paper's models, by task, and by suite for its mean.

    Raises:
        ValueError: for a model that the paper does not have.
    """
    paper = suite_file()["paper"]
    if column is not None and column not in paper:
        raise ValueError(f"The paper has no model {column!r}. Choose one of: {', '.join(paper)}.")
    return paper[column] if column is not None else {}


def comparison(reports: dict[str, Evaluation], column: str | None, command: str | None = None) -> Comparison:
    """Scores, and their differences to the first report, in percentage points; with the paper's where known."""
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
    Mean over categories of the means over their tasks, as in the paper, and its standard error from theirs.
    A task without a category is one of its own, so this is the plain mean of the foundation suite.
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
    """Percentages with standard errors; the difference to the first model behind every other one."""
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
    """A group of bars per task, one bar per model, with standard errors; a mark for the paper's number."""
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
    Writes `comparison.json` and `comparison.png`; differences are to the first report. Returns the table.

    Raises:
        ValueError: for reports that cannot be compared.
    """
    reports = read_reports(paths)
    comparison(reports, column, command).save(Path(output_dir) / "comparison.json")
    plot_reports(reports, Path(output_dir) / "comparison.png", column)
    return report_table(reports, column)
