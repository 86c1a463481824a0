"""
Data tokenized once, into memory-mapped Arrow files from which recipes read without a tokenizer.

A directory of shards has one directory per data source, tokenizer, length and seed. Each file in it holds the rows of
one file of a streamed source, or of `PIECE_ROWS` rows of a shuffled one, in the order in which a recipe reads them; a
record batch has `BATCH_ROWS` rows, so the place of a row is arithmetic. `prepared.json` is written last: without it a
directory is not finished, and preparing again does the files that `finished.jsonl` does not list.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..artifacts import Artifact, Record, replace_file, write_text
from .data import DataSource, Source
from .documents import IGNORED, Document


PREPARED_FILE, FINISHED_FILE = "prepared.json", "finished.jsonl"
PIECE_ROWS = 2**14
BATCH_ROWS = 2**10
AGAIN = "Run recipes/prepare.py with the arguments of this run"


class ShardFile(Record):
    name: str
    bytes: int
    rows: int
    documents: int
    tokens: int
    # Tokens that the loss counts.
    learnt: int


class Prepared(Artifact):
    """`prepared.json` beside the files of one data source."""

    what = "the description of prepared data"
    remedy = "Remove its directory and prepare again."
    mark = "tokenizer_sha256"

    # The fields of the `DataSource`, without its weight.
    source: dict[str, Any]
    kind: str
    tokenizer_sha256: str
    # Of conversations.
    chat_template_sha256: str | None
    max_length: int
    # Of the shuffling; a streamed source keeps its order.
    seed: int | None
    # Tokens per row of the first rows.
    mean_length: float
    # Of a file, where the source is not streamed, and of a record batch.
    piece_rows: int
    batch_rows: int
    files: list[ShardFile]

    def total(self, name: str) -> int:
        return sum(vars(file)[name] for file in self.files)


def described(source: DataSource) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(source).items() if name != "weight"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Of all that decides the ids of a text: vocabulary, merges, splits, special tokens, and the end token.

    Raises:
        ValueError: for a tokenizer without a serialised form.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not of the tokenizers library, so shards could not tell it from another "
            "one. Use a tokenizer with a tokenizer.json, or tokenize during training: leave `shards` out."
        )
    # A call of the tokenizer sets both, and no recipe uses them.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return sha256(f"{backend.to_str()} {tokenizer.eos_token_id}")


# Preparing


def prepare(
    sources: list[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    directory: str | os.PathLike,
    num_processes: int = 1,
) -> list[Prepared]:
    """
    Tokenizes sources into shards. What a killed run has finished is kept.

    Args:
        sources (`list[DataSource]`): of a recipe.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template if a source is chat.
        max_length (`int`): tokens per sequence.
        seed (`int`): of the recipe.
        directory (`str`): may hold the shards of other recipes.
        num_processes (`int`, defaults to 1): processes that tokenize.

    Raises:
        ValueError: for a source that cannot be read.
        OSError: when the disk is full.
    """
    return [_prepare(source, tokenizer, max_length, seed, Path(directory), num_processes) for source in sources]


def _prepare(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    root: Path,
    num_processes: int,
) -> Prepared:
    opened = Source(source, tokenizer, max_length, seed)
    prepared = Prepared(
        source=described(source),
        kind=opened.kind,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=None if opened.kind == "text" else sha256(str(tokenizer.chat_template)),
        max_length=max_length,
        seed=None if source.streaming else seed,
        mean_length=opened.mean_length,
        piece_rows=PIECE_ROWS,
        batch_rows=BATCH_ROWS,
        files=[],
    )
    identity = sha256(json.dumps(prepared.model_dump(exclude={"files"}), sort_keys=True))
    name = re.sub(r"[^\w.-]", "-", source.path.rpartition("/")[2])
    directory = root / f"{name}-{identity[:16]}"
    if (directory / PREPARED_FILE).is_file():
        return Prepared.load(directory / PREPARED_FILE)
    if source.streaming:
        num_pieces = opened.dataset.num_shards
    else:
        num_pieces = -(-len(opened.dataset) // PIECE_ROWS)
    finished = {file.name: file for file in _finished(directory)}
    missing = [piece for piece in range(num_pieces) if _piece_name(piece) not in finished]
    directory.mkdir(parents=True, exist_ok=True)
    # Without what a kill has left of a line.
    write_text(directory / FINISHED_FILE, "".join(f"{file.model_dump_json()}\n" for file in finished.values()))
    with (
        tqdm(desc=str(source), unit=" tokens", unit_scale=True) as progress,
        (directory / FINISHED_FILE).open("a") as log,
    ):
        progress.update(sum(file.tokens for file in finished.values()))
        for file in _write_pieces(opened, missing, prepared, directory, num_processes, progress.update):
            finished[file.name] = file
            log.write(f"{file.model_dump_json()}\n")
            log.flush()
            progress.set_postfix_str(f"file {len(finished)} of {num_pieces}")
    prepared.files = [finished[_piece_name(piece)] for piece in range(num_pieces)]
    prepared.save(directory / PREPARED_FILE)
    (directory / FINISHED_FILE).unlink()
    return prepared


def _piece_name(piece: int) -> str:
    return f"{piece:06d}.arrow"


def _finished(directory: Path) -> Iterator[ShardFile]:
    """The files of an interrupted preparation that are whole."""
    log = directory / FINISHED_FILE
    for line in log.read_text().splitlines(keepends=True) if log.is_file() else []:
        if line.endswith("\n"):
            file = ShardFile.model_validate_json(line)
            path = directory / file.name
            if path.is_file() and path.stat().st_size == file.bytes:
                yield file


def _write_pieces(
    opened: Source,
    pieces: list[int],
    prepared: Prepared,
    directory: Path,
    num_processes: int,
    progress: Callable[[int], Any],
) -> Iterator[ShardFile]:
    """The files in the order in which they get finished."""
    if num_processes == 1:
        for piece in pieces:
            yield _write_piece(opened, piece, prepared, directory, progress)
        return
    # A forked process would inherit the threads of torch and tokenizers.
    context = multiprocessing.get_context("spawn")
    arguments = (opened.source, opened.tokenizer, opened.max_length, opened.mixture_seed)
    with ProcessPoolExecutor(num_processes, context, _open, arguments) as pool:
        try:
            futures = [pool.submit(_write_in_process, piece, prepared, directory) for piece in pieces]
            for future in as_completed(futures):
                progress(future.result().tokens)
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_opened: Source


def _open(*arguments) -> None:
    global _opened
    # The processes share the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _opened = Source(*arguments)


def _write_in_process(piece: int, prepared: Prepared, directory: Path) -> ShardFile:
    return _write_piece(_opened, piece, prepared, directory, lambda tokens: None)


def _write_piece(
    opened: Source, piece: int, prepared: Prepared, directory: Path, progress: Callable[[int], Any]
) -> ShardFile:
    dataset = opened.dataset
    if opened.source.streaming:
        rows = iter(dataset.shard(dataset.num_shards, piece))
    else:
        begin = piece * prepared.piece_rows
        rows = iter(dataset.select(range(begin, min(begin + prepared.piece_rows, len(dataset)))))
    names = ["input_ids"] if opened.kind == "text" else ["input_ids", "labels"]
    schema = pa.schema([(name, pa.large_list(pa.int32())) for name in names])
    path = directory / _piece_name(piece)
    file = ShardFile(name=path.name, bytes=0, rows=0, documents=0, tokens=0, learnt=0)
    with replace_file(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            while batch := opened.draw(rows, prepared.batch_rows):
                encoded = opened.encode(batch, file.rows)
                documents = [document for row in encoded for document in row]
                lengths = [sum(len(document.input_ids) for document in row) for row in encoded]
                offsets = np.cumsum([0, *lengths])
                columns = [_column(offsets, [vars(document)[name] for document in documents]) for name in names]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                file.rows += len(batch)
                file.documents += len(documents)
                file.tokens += sum(lengths)
                file.learnt += sum(int((document.labels != IGNORED).sum()) for document in documents)
                progress(sum(lengths))
        file.bytes = partial.stat().st_size
    return file


def _column(offsets: np.ndarray, arrays: list[np.ndarray]) -> pa.LargeListArray:
    values = np.concatenate([np.empty(0, np.int32), *arrays])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.int32()))


# Reading


class Rows:
    """The numbers of the rows that one reader reads, in their order; resumed at any place without reading."""

    def __init__(self, ranges: Iterable[range]):
        self.ranges = list(ranges)
        self.taken = 0

    def state_dict(self) -> dict:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        self.taken = state["taken"]

    def __iter__(self) -> Iterator[int]:
        skipped = self.taken
        for rows in self.ranges:
            for row in rows[skipped:]:
                self.taken += 1
                yield row
            skipped = max(0, skipped - len(rows))


class PreparedSource:
    """
    The shards of a data source, in place of a [`Source`]: its rows are numbers, and encoding them is a look-up.

    Raises:
        ValueError: when a file is missing or has another size.
    """

    def __init__(self, source: DataSource, prepared: Prepared, directory: Path):
        self.source, self.prepared, self.directory = source, prepared, directory
        self.kind, self.mean_length = prepared.kind, prepared.mean_length
        for file in prepared.files:
            path = directory / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"The shard {path} of the data source {source} {found}, and {file.bytes:,} were written. Copy it "
                    f"again, or remove {directory} and run recipes/prepare.py."
                )
        self.ends = list(itertools.accumulate(file.rows for file in prepared.files))
        self.dataset = range(prepared.total("rows"))
        # Few enough for the limit of open files.
        self._file = functools.lru_cache(64)(self._open_file)
        self._batch = functools.lru_cache(256)(self._read_batch)

    def __str__(self) -> str:
        return str(self.source)

    def identity(self) -> dict[str, Any]:
        """By which a checkpoint knows them."""
        return {"rows": self.prepared.total("rows"), "tokens": self.prepared.total("tokens")}

    def part(self, reader: int, num_readers: int) -> Rows:
        """The rows of one of `num_readers` readers, as [`Source.part`] splits them."""
        total, num_files = len(self.dataset), len(self.ends)
        if not self.source.streaming:
            share, rest = divmod(total, num_readers)
            begin = reader * share + min(reader, rest)
            return Rows([range(begin, begin + share + (reader < rest))])
        if num_files >= num_readers:
            begins = [0, *self.ends]
            return Rows(range(begins[file], self.ends[file]) for file in range(reader, num_files, num_readers))
        return Rows([range(reader, total, num_readers)])

    def draw(self, iterator: Iterator[int], number: int) -> list[int]:
        return list(itertools.islice(iterator, number))

    def encode(self, rows: list[int], first: int) -> list[list[Document]]:
        length, encoded = self.prepared.max_length, []
        first_row = last_row = 0
        for row in rows:
            if not first_row <= row < last_row:
                first_row, offsets, input_ids, labels = self._batch_of(row)
                last_row = first_row + len(offsets) - 1
            begin, end = offsets[row - first_row], offsets[row - first_row + 1]
            cuts = [*range(begin, end, length), end]
            ids = [input_ids[a:b] for a, b in itertools.pairwise(cuts)]
            if labels is input_ids:
                encoded.append([Document(piece, piece) for piece in ids])
            else:
                learnt = (labels[a:b] for a, b in itertools.pairwise(cuts))
                encoded.append([Document(*both) for both in zip(ids, learnt, strict=True)])
        return encoded

    def _batch_of(self, row: int) -> tuple[int, list[int], np.ndarray, np.ndarray]:
        """The first row of the batch that a row is in, and the batch."""
        file = bisect_right(self.ends, row)
        begin = self.ends[file] - self.prepared.files[file].rows
        batch = (row - begin) // self.prepared.batch_rows
        return begin + batch * self.prepared.batch_rows, *self._batch(file, batch)

    def _open_file(self, file: int) -> pa.ipc.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(str(self.directory / self.prepared.files[file].name)))

    def _read_batch(self, file: int, batch: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Offsets of the rows, ids, and labels, the last two as views of the mapped file."""
        try:
            columns = self._file(file).get_batch(batch).columns
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"The shard {self.directory / self.prepared.files[file].name} cannot be read: {error}. Remove "
                f"{self.directory} and run recipes/prepare.py."
            ) from error
        values = [column.values.to_numpy() for column in columns]
        return columns[0].offsets.to_pylist(), values[0], values[-1]


class Shards:
    """
    A directory of shards, opened for a recipe.

    Args:
        directory (`str`): written by [`prepare`].
        tokenizer (`PreTrainedTokenizerBase`): of the recipe.
        max_length (`int`): tokens per sequence.
        seed (`int`): of the recipe.

    Raises:
        ValueError: when there is no such directory.
    """

    def __init__(self, directory: str, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"shards={directory} is no directory. {AGAIN}, or leave it out.")
        self.wanted = {
            "tokenizer": tokenizer_sha256(tokenizer),
            "chat template": sha256(str(tokenizer.chat_template)),
            "max_length": max_length,
            "seed": seed,
        }
        self.found = [(path, Prepared.load(path)) for path in sorted(self.directory.glob(f"*/{PREPARED_FILE}"))]

    def source(self, source: DataSource) -> PreparedSource:
        """
        The shards of a source.

        Raises:
            ValueError: when there are none, they are not finished or damaged, or were prepared for other settings.
        """
        others = []
        for path, prepared in self.found:
            if prepared.source != described(source):
                continue
            has = {
                "tokenizer": prepared.tokenizer_sha256,
                "chat template": prepared.chat_template_sha256,
                "max_length": prepared.max_length,
                "seed": prepared.seed,
            }
            # What it has not does not matter for it.
            other = {name: value for name, value in has.items() if value not in (None, self.wanted[name])}
            if not other:
                return PreparedSource(source, prepared, path.parent)
            others.append(
                " and ".join(
                    f"{name}={value}, this run has {self.wanted[name]}"
                    if isinstance(value, int)
                    else f"another {name}"
                    for name, value in other.items()
                )
            )
        if others:
            raise ValueError(
                f"shards={self.directory} has the data source {source} with {'; or '.join(others)}: its sequences "
                f"would be others. {AGAIN}, or restore what differs."
            )
        unfinished = " It has data that are not finished." if any(self.directory.glob(f"*/{FINISHED_FILE}")) else ""
        raise ValueError(
            f"shards={self.directory} has nothing of the data source {source}.{unfinished} {AGAIN}; what is finished "
            "is kept."
        )
