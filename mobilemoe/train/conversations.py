"""A user's own examples: read from a file or the Hub, recognised, checked row by row, and split for validation."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..artifacts import write_text
from .documents import IGNORED, TOOLS, UnreadableExample, as_messages, as_tools, called_functions, encode


EXPECTED = (
    "Expected one of the columns `messages` (a list of {role, content}), `conversations` (ShareGPT: a list of {from, "
    "value}), `prompt` with `completion`, or `text`"
)
# The columns of each kind, the first that is there counts; and the kind of `documents.KINDS` that it becomes.
COLUMNS = [
    (("messages",), "chat"),
    (("conversations",), "chat"),
    (("prompt", "completion"), "pair"),
    (("text",), "text"),
]
# Share of the examples that validates, and the most and the fewest of them.
VALIDATION_SHARE, MOST_VALIDATION, FEWEST = 0.1, 500, 2
# Examples tokenized at a time.
BATCH = 256


@dataclass
class Example:
    """One row that can be trained on, as the recipes read it, and its tokens."""

    where: str
    row: dict[str, Any]
    num_tokens: int
    num_learnt: int


@dataclass
class Examples:
    """What a file holds: examples to train on and to validate with, and what was left out."""

    kind: str
    train: list[Example]
    validation: list[Example]
    num_empty: int
    num_cut: int
    unused_columns: list[str]

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(example.num_tokens for example in self.train + self.validation)


def read_rows(data: str) -> Iterator[tuple[str, Any]]:
    """
    Rows of a JSONL, JSON, CSV or Parquet file, or of the split `train` of a Hub data set, each with its place.

    Raises:
        ValueError: for another kind of file, or a row that cannot be read; names the row.
        OSError: when there is no such file or data set.
    """
    path = Path(data)
    suffix = path.suffix.lower()
    if not path.exists():
        if data.count("/") != 1 or suffix in (".jsonl", ".json", ".csv", ".parquet"):
            raise FileNotFoundError(f"--data {data}: there is no such file.")
        yield from _hub_rows(data)
    elif path.is_dir():
        raise ValueError(f"--data {data} is a directory. Name a .jsonl, .json, .csv or .parquet file.")
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{data} cannot be read as Parquet: {error}") from error
        yield from ((f"{data}, row {number}", row) for number, row in enumerate(rows, start=1))
    elif suffix in (".jsonl", ".json", ".csv"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
        yield from _csv_rows(data, text) if suffix == ".csv" else _json_rows(data, text)
    else:
        raise ValueError(f"--data {data} has an unknown suffix. Name a .jsonl, .json, .csv or .parquet file.")


def _json_rows(data: str, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{data} is not JSON: {error}") from error
        yield from ((f"{data}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{data}, line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{data}, line {number} is not JSON: {error}. Expected one object per line."
                ) from error


def _csv_rows(data: str, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            where = f"{data}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where} has not {len(reader.fieldnames)} values, as the first line. Quote commas.")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{data}, line {reader.line_num} is not CSV: {error}.") from error


def _hub_rows(data: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(data, split="train")
    except (DatasetsError, ValueError, OSError) as error:
        raise OSError(f"--data {data} is no file, and cannot be loaded from the Hub: {error}") from error
    yield from ((f"{data}, row {number}", row) for number, row in enumerate(dataset, start=1))


def recognise(where: str, row: Any) -> tuple[tuple[str, ...], str]:
    """
    The columns of a row that are read, and the kind of example that they are.

    Raises:
        ValueError: when it has none of the known columns.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, not an object with columns. {EXPECTED}.")
    for columns, kind in COLUMNS:
        if all(column in row for column in columns):
            return columns, kind
    raise ValueError(f"{where} has the columns {', '.join(map(str, row)) or 'none'}. {EXPECTED}.")


def normalise(row: dict[str, Any], columns: tuple[str, ...], kind: str) -> dict[str, Any]:
    """
    A row as the recipes read it: `messages`, `prompt` with `completion` as messages, or `text`.

    Raises:
        UnreadableExample: when it is not of this kind.
    """
    missing = [column for column in columns if column not in row]
    if missing:
        raise UnreadableExample(f"it lacks the column {missing[0]}, which earlier rows have")
    if kind == "text":
        return {"text": row["text"]}
    if kind == "chat":
        example = {"messages": as_messages(row[columns[0]])}
    else:
        example = {
            "prompt": as_messages(row["prompt"], "user"),
            "completion": as_messages(row["completion"], "assistant"),
        }
    for messages in example.values():
        for function in (function for message in messages for function in called_functions(message)):
            # As JSON, or Arrow would give the arguments of every function the keys of all others.
            if not isinstance(function.get("arguments"), str):
                function["arguments"] = json.dumps(function.get("arguments", {}))
    tools = as_tools(row.get(TOOLS))
    return example if tools is None else example | {TOOLS: json.dumps(tools)}


def read_examples(data: str, tokenizer: PreTrainedTokenizerBase, context: int) -> Examples:
    """
    Reads, checks and splits a user's examples. Equal ones are always on the same side of the split, which depends on
    nothing but the examples.

    Args:
        data (`str`): file, or id of a data set on the Hub.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        context (`int`): the model's context in tokens; longer conversations are cut.

    Raises:
        ValueError: for a row that cannot be used, naming it and what was expected, or for too few examples.
        OSError: when the data cannot be found.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    columns, kind, others = (), "", Counter()
    for where, row in read_rows(data):
        if not columns:
            columns, kind = recognise(where, row)
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {type(row).__name__}, not an object with columns. {EXPECTED}.")
        used = columns if kind == "text" else (*columns, TOOLS)
        others.update(name for name, value in row.items() if name not in used and value is not None)
        try:
            rows.append((where, normalise(row, columns, kind)))
        except UnreadableExample as error:
            raise ValueError(f"{where} cannot be trained on: {error}. Correct or remove it.") from error
    if not rows:
        raise ValueError(f"{data} holds no examples. {EXPECTED}.")

    examples, num_empty, num_cut = [], 0, 0
    # One token more than there is room for shows what will be cut. Texts are split.
    length = context if kind == "text" else context + 1
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        try:
            encoded = encode([row for _, row in batch], kind, tokenizer, length)
        except UnreadableExample as error:
            where = batch[error.place][0]
            raise ValueError(f"{where} cannot be trained on: {error}. Correct or remove it.") from error
        for (where, row), documents in zip(batch, encoded, strict=True):
            num_cut += any(len(document.input_ids) > context for document in documents)
            num_tokens = sum(len(document.input_ids[:context]) for document in documents)
            num_learnt = sum(int((document.labels[:context] != IGNORED).sum()) for document in documents)
            num_empty += num_learnt == 0
            examples += [Example(where, row, num_tokens, num_learnt)] if num_learnt else []
    train, validation = split(examples)
    if not train or not validation:
        raise ValueError(
            f"{data} holds {len(examples)} examples with something to learn, of which at least {FEWEST} must differ: "
            "one part trains and another one validates. Add examples."
        )
    return Examples(kind, train, validation, num_empty, num_cut, sorted(others))


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate with. Those of the lowest hashes validate."""
    digests = [hashlib.sha256(json.dumps(example.row, sort_keys=True).encode()).hexdigest() for example in examples]
    different = sorted(set(digests))
    if len(different) < FEWEST:
        return examples, []
    number = min(MOST_VALIDATION, max(1, round(VALIDATION_SHARE * len(different))))
    chosen = set(different[:number])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, digest in zip(examples, digests, strict=True):
        parts[digest in chosen].append(example)
    return parts


def write_examples(examples: list[Example], path: str | os.PathLike) -> None:
    """Writes examples as the JSONL that the recipes read."""
    write_text(path, "".join(json.dumps(example.row) + "\n" for example in examples))
