"""Tables and figures in the style of this package: `table`, `show`, `markdown`, `picture`."""

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

# Width of a table that is written to a file or a pipe. The tables of all commands fit into it.
WIDTH = 80
# Minimum width of a text column; longer words are broken.
TEXT_WIDTH = 12
# Headers of number columns up to this width are not wrapped.
HEADER_WIDTH = 8
NUMBER = re.compile(r"[-+±~]?\d[\d.,]*(\D|$)|[-–]?$")
PLOT_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
}


def number(value: float, digits: int = 3) -> str:
    """Formats a number with this many significant digits and without an exponent: 45.1, 203, 1240."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def with_spread(median: float, low: float, high: float) -> str:
    """A median with its 10th and 90th percentile: `203 (187-217)`."""
    return f"{number(median)} ({number(low)}-{number(high)})"


def table(
    columns: Sequence[str], rows: Iterable[Sequence], title: str = "", caption: str = "", bold: int | None = None
) -> "Group":
    """
    A table for [`show`]. Columns of numbers are right-aligned and never wrapped; text columns wrap.

    Args:
        columns (`Sequence[str]`): headers.
        rows (`Iterable[Sequence]`): cells, shown as `str`; `None` stays empty.
        title (`str`, *optional*): printed above the table.
        caption (`str`, *optional*): printed below the table.
        bold (`int`, *optional*): index of the row in bold.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for index, header in enumerate(columns):
        cells = [row[index] for row in rows]
        longest_word = max(map(len, header.split()), default=0)
        if all(map(NUMBER.match, cells)):
            width = max([longest_word, min(len(header), HEADER_WIDTH), *map(len, cells)])
            # With `no_wrap`, the header needs explicit line breaks.
            header = "\n".join(textwrap.wrap(header, width))
            result.add_column(Text(header), justify="right", no_wrap=True, min_width=width)
        else:
            width = max(max(map(len, cell.split()), default=0) for cell in cells)
            result.add_column(Text(header), overflow="fold", min_width=max(longest_word, min(width, TEXT_WIDTH)))
    for index, row in enumerate(rows):
        # `Text`, or brackets in a cell would be parsed as markup.
        result.add_row(*map(Text, row), style="bold" if index == bold else None)
    return Group(
        *([Text(title, style="bold")] if title else []), result, *([Text(caption, style="dim")] if caption else [])
    )


def show(*parts: "str | Group") -> None:
    """
    Prints text and tables of [`table`], separated by empty lines.

    The width is that of the terminal, elsewhere `WIDTH`. Number columns that need more room make it wider.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    width = console.width if console.is_jupyter or sys.stdout.isatty() else WIDTH
    for index, part in enumerate(parts):
        tables = [] if isinstance(part, str) else [item for item in part.renderables if isinstance(item, Table)]
        # Two spaces between columns.
        needed = (sum(column.min_width + 2 for column in item.columns) - 2 for item in tables)
        console.width = max([width, *needed])
        if index:
            console.print()
        console.print(part)


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table."""
    header, *lines = (f"| {' | '.join(map(str, row))} |" for row in (columns, *rows))
    return "\n".join([header, "|---" * len(columns) + "|", *lines])


@contextmanager
def picture(
    path: str | Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **options
) -> Iterator["list[Axes]"]:
    """Yields the axes of a new figure, row by row, and saves it to `path` in the format of its suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    # The style applies to this figure only, so a notebook keeps its own.
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        figure.savefig(path, dpi=120)
