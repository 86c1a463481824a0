"""Tables of runs, to which a law is fitted."""

import csv
import json
from pathlib import Path

import numpy as np

from .law import COEFFICIENTS, COLUMNS


# Above these, `COLUMNS` are of no run, and fits overflow.
MOST = np.array([1e15, 1e18, 1e6, 1e6])


def read_table(path: str | Path, **conditions) -> dict[str, np.ndarray]:
    """
    Reads the columns `active_parameters`, `tokens`, `expansion` and `loss` of a table of runs.

    Args:
        path (`str` or `Path`): a `.jsonl` or `.csv` file. Other columns are ignored.
        conditions: `column=value`; only rows that match are read.

    Raises:
        ValueError: for a missing column or a value that is not a number.
    """
    path = Path(path)
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [read_row(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
    for name in (*COLUMNS, *conditions):
        if not all(name in row for row in rows):
            raise ValueError(f"{path} has rows without {name!r}. A table of runs needs {', '.join(COLUMNS)}.")
    rows = [row for row in rows if all(str(row[name]) == str(value) for name, value in conditions.items())]
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in COLUMNS}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a value that is not a number: {error}. Correct that row.") from error


def read_row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        row = error
    if not isinstance(row, dict):
        raise ValueError(
            f"{path} has {line.strip()[:40]!r} in line {number}, which is no JSON object. A table of runs is a .csv, "
            "or a .jsonl with an object a line."
        )
    return row


def check_table(table: dict[str, np.ndarray]) -> None:
    """
    Checks that a table can determine nine coefficients.

    Raises:
        ValueError: when it cannot. The message says which runs are missing.
    """
    values = np.stack([np.asarray(table[name], dtype=np.float64) for name in COLUMNS], axis=1)
    possible = ((values > 0) & (values <= MOST)).all(axis=1)
    if not possible.all():
        row = int(np.argmin(possible))
        raise ValueError(
            f"Row {row} of the table is {dict(zip(COLUMNS, values[row], strict=True))}. Give positive numbers, up to "
            f"{', '.join(f'{most:g}' for most in MOST)}."
        )
    cells = len(np.unique(values[:, :3], axis=0))
    counts = {name: len(set(table[name])) for name in COLUMNS[:3]}
    needed = {"active_parameters": 2, "tokens": 2, "expansion": 2}
    lacking = [
        f"{needed[name]} values of {name} (it has {counts[name]})" for name in counts if counts[name] < needed[name]
    ]
    if max(counts["active_parameters"], counts["tokens"]) < 3:
        lacking.append("3 values of active_parameters or of tokens, to tell a power from the constant c")
    if cells <= len(COEFFICIENTS):
        lacking.append(f"{len(COEFFICIENTS) + 1} different combinations of the three (it has {cells})")
    if lacking:
        raise ValueError(
            f"A table of {len(values)} runs has too few points for {len(COEFFICIENTS)} coefficients. It needs at "
            f"least {'; '.join(lacking)}. Add runs: the paper's grid has 90."
        )
