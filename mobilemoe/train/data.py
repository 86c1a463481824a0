"""Weighted mixtures of text and chat: packed, sharded by process, and resumed at the exact sequence."""

import dataclasses
import glob
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from .checks import check_numbers, check_types
from .documents import KINDS, TOOLS, Document, UnreadableExample, encode, pack, sequence


# Sequences that a reader packs and shuffles at a time. Larger blocks pack tighter and mix better but start later.
BLOCK_SEQUENCES = 64


@dataclass
class DataSource:
    """
    One part of a mixture.

    Args:
        path (`str`): Hub data set, or `json`, `text`, `parquet` with `data_files`.
        weight (`float`, defaults to 1.0): share of the tokens from this source; the weights of a mixture sum to 1.
        name (`str`, *optional*): configuration of a Hub data set.
        split (`str`, defaults to `"train"`): split of the data set.
        revision (`str`, *optional*): branch, tag or commit of a Hub data set.
        data_dir (`str`, *optional*): directory within the data set.
        data_files (`str`, *optional*): local files, when `path` is a format.
        columns (`dict[str, str]`, *optional*): which of its columns is `text`, or `messages`, or `prompt` and
            `completion`; and which is `tools` of conversations. Needed where the names differ.
        streaming (`bool`, defaults to `False`): `False` downloads the whole source and shuffles it; `True` reads it
            during training, in its own order, shuffled within blocks of 64 sequences.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    data_files: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False

    def __post_init__(self) -> None:
        check_types(DataSource, vars(self))
        check_numbers(self)

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.path, self.name, self.data_dir, self.data_files) if part)

    def kind(self, available: list[str]) -> str:
        """
        The one of `KINDS` that its examples are.

        Raises:
            ValueError: when its columns match none.
        """
        for kind, needed in KINDS.items():
            if all(self.columns.get(column, column) in available for column in needed) and (
                not self.columns or set(needed) == set(self.columns) - {TOOLS}
            ):
                return kind
        wanted = f"maps {self.columns} and" if self.columns else "sets no `columns` and"
        raise ValueError(
            f"Data source {self} {wanted} has the columns {sorted(available)}: no text, no messages, and no prompt "
            "with completion among them. Map the right ones, for example `columns: {text: content}`."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Llama-3 tokenizers have no padding token. No loss counts padding and no document attends to it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def refuse_null(source: DataSource) -> None:
    """
    Raises:
        ValueError: for a JSON file whose first row is `null`, at which pyarrow ends the process.
    """
    for file in glob.glob(source.data_files or "", recursive=True) if source.path == "json" else ():
        with open(file, "rb") as opened:
            if opened.read(4096).lstrip().startswith(b"null"):
                raise ValueError(f"{file} begins with null, and a row is an object")


@contextmanager
def readable(source: DataSource):
    """
    Raises:
        ValueError: in place of what `datasets` raises for files that it cannot read.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    # Files that are truncated, not decodable, or differ from the first one raise EOFError and ValueError.
    except (DatasetsError, pa.ArrowException, zlib.error, OSError, EOFError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"Data source {source} cannot be read: {type(reason).__name__}: {reason}. Repair or replace it; "
            "training resumes from the last checkpoint with --resume_from_checkpoint true."
        ) from error


class Source:
    """A `DataSource` opened for a mixture: its data set, what kind of examples it has, and how they are encoded."""

    def __init__(self, source: DataSource, tokenizer: PreTrainedTokenizerBase, max_length: int, mixture_seed: int):
        from datasets import load_dataset

        self.source, self.tokenizer, self.max_length, self.mixture_seed = source, tokenizer, max_length, mixture_seed
        ours = ("path", "weight", "columns", "streaming")
        arguments = {name: value for name, value in dataclasses.asdict(source).items() if name not in ours}
        rows = []
        # StopIteration is what `datasets` raises for an empty JSON file.
        with readable(source), suppress(StopIteration):
            refuse_null(source)
            self.dataset = load_dataset(source.path, **arguments, streaming=source.streaming)
            if not source.streaming:
                self.dataset = self.dataset.shuffle(seed=mixture_seed)
            # Reading a few rows here reports most errors before the first step.
            rows = list(itertools.islice(self.dataset, 8))
        if not rows:
            raise ValueError(f"Data source {source} has no examples. Correct path, split or data_files.")
        self.kind = source.kind(list(rows[0]))
        if self.kind != "text" and tokenizer.chat_template is None:
            raise ValueError(
                f"Data source {source} holds conversations, but the tokenizer has no chat template. Train on it with "
                "recipes/sft.py, which adds one, or set the tokenizer of a chat model."
            )
        tokens = sum(len(document.input_ids) for documents in self.encode(rows, 0) for document in documents)
        self.mean_length = max(1.0, tokens / len(rows))

    def __str__(self) -> str:
        return str(self.source)

    def identity(self) -> dict[str, int]:
        """By which a checkpoint knows it, beside its fields. Its positions are not those of shards."""
        return {}

    def part(self, reader: int, num_readers: int):
        """The part of the source for one of `num_readers` readers: whole files if there are enough of them."""
        from datasets.distributed import split_dataset_by_node

        if not self.source.streaming:
            return self.dataset.shard(num_readers, reader, contiguous=True).to_iterable_dataset()
        if self.dataset.num_shards >= num_readers:
            return self.dataset.shard(num_readers, reader, contiguous=False)
        return split_dataset_by_node(self.dataset, rank=reader, world_size=num_readers)

    def encode(self, rows: list[dict], first: int) -> list[list[Document]]:
        """Documents of each row; `first` is the number of the first row, for error messages."""
        columns = self.source.columns
        named = [{ours: row[columns.get(ours, ours)] for ours in KINDS[self.kind]} for row in rows]
        for example, row in zip(named, rows, strict=True):
            example[TOOLS] = row.get(columns.get(TOOLS, TOOLS))
        try:
            return encode(named, self.kind, self.tokenizer, self.max_length)
        except UnreadableExample as error:
            raise ValueError(
                f"Data source {self.source}, example {first + error.place} of this reader: {error}. "
                f"Correct or remove it: {str(named[error.place])[:300]}"
            ) from error

    def draw(self, iterator: Iterator[dict], number: int) -> list[dict]:
        """Up to `number` examples; fewer at the end of the source."""
        with readable(self.source):
            return list(itertools.islice(iterator, number))


class Reader:
    """
    One of the readers that share a mixture: it draws from its part of every source and packs block after block.

    In every block the tokens of the sources are in proportion to their weights; overshoot is subtracted from the next
    block. A source that ends starts again.
    """

    def __init__(self, mixture: "Mixture", index: int, state: dict | None):
        self.mixture = mixture
        self.index = index
        self.parts = [source.part(index, mixture.num_readers) for source in mixture.sources]
        # Sequences returned so far, and for recent blocks (sequences returned before the block, state before it). The
        # data loader reads ahead by fewer than 256 sequences, which are as many blocks at most.
        self.taken = 0
        self.begun: deque[tuple[int, dict]] = deque(maxlen=256)
        self.current: deque[list[Document]] = deque()
        self.next: Future | None = None
        self.block = 0
        self.counts = [{"tokens": 0, "rows": 0} for _ in self.parts]
        # Start of the next block in each part; `datasets` reports it only once reading has begun.
        self.positions = [None for _ in self.parts]
        if state is not None:
            self.taken = state["taken"] - state["skip"]
            self.block, self.positions = state["block"], state["positions"]
            self.counts = [dict(count) for count in state["counts"]]
            for part, position in zip(self.parts, self.positions, strict=True):
                if position is not None:
                    part.load_state_dict(position)
        self.iterators = [iter(part) for part in self.parts]
        self.skip = 0 if state is None else state["skip"]

    def next_sequence(self, executor: Executor) -> list[Document]:
        """The next sequence; meanwhile `executor` makes the block after the current one."""
        while not self.current:
            state, block = (self.next or executor.submit(self.next_block)).result()
            # A block is empty when earlier overshoot covers it for every source; the next block replaces it.
            if self.begun and self.begun[-1][0] == self.taken:
                self.begun.pop()
            self.begun.append((self.taken, state))
            self.current.extend(block)
            self.next = executor.submit(self.next_block)
        self.taken += 1
        return self.current.popleft()

    def state(self, taken: int) -> dict:
        """The state to resume from after `taken` sequences, which may be fewer than were returned."""
        before, state = [begun for begun in self.begun if begun[0] <= taken][-1]
        return {"taken": taken, "skip": taken - before, **state}

    def next_block(self) -> tuple[dict, list[list[Document]]]:
        """The state before the block, and its sequences as lists of documents."""
        counts, positions = [dict(count) for count in self.counts], list(self.positions)
        state, documents = {"block": self.block, "counts": counts, "positions": self.positions}, []
        goal = (self.block + 1) * BLOCK_SEQUENCES * self.mixture.max_length
        for index, (source, weight) in enumerate(zip(self.mixture.sources, self.mixture.weights, strict=True)):
            count = self.counts[index]
            while (missing := weight * goal - count["tokens"]) > 0:
                mean_length = count["tokens"] / count["rows"] if count["tokens"] else source.mean_length
                rows = self._draw(index, min(BLOCK_SEQUENCES, math.ceil(missing / mean_length)))
                for encoded in source.encode(rows, count["rows"]):
                    documents += encoded
                    count["tokens"] += sum(len(document.input_ids) for document in encoded)
                count["rows"] += len(rows)
                positions[index] = self.parts[index].state_dict()
        bins = pack([len(document.input_ids) for document in documents], self.mixture.max_length)
        order = np.random.default_rng([self.mixture.seed, self.index, self.block]).permutation(len(bins))
        self.block, self.positions = self.block + 1, positions
        return state, [[documents[index] for index in bins[place]] for place in order]

    def _draw(self, index: int, number: int) -> list[dict]:
        source = self.mixture.sources[index]
        rows = source.draw(self.iterators[index], number)
        if not rows:
            if self.counts[index]["tokens"] == 0:
                raise ValueError(
                    f"Data source {source} has nothing to learn for reader {self.index} of "
                    f"{self.mixture.num_readers}, in {self.counts[index]['rows']} examples. Lower num_data_readers if "
                    "there are too few examples, or raise max_length if conversations are cut before the first answer."
                )
            # A new object: the old one may hold a loaded position and would restart there.
            self.parts[index] = source.part(self.index, self.mixture.num_readers)
            self.iterators[index] = iter(self.parts[index])
            rows = source.draw(self.iterators[index], number)
        return rows


def check_weights(sources: list[DataSource]) -> None:
    """
    Raises:
        ValueError: for no source, and weights that do not sum to 1.
    """
    if not sources:
        raise ValueError("The recipe names no data. Add a `data` list of {path, weight, ...} to the YAML file.")
    weights = [source.weight for source in sources]
    if abs(sum(weights) - 1) > 1e-6 or min(weights) <= 0:
        raise ValueError(f"The data weights {weights} sum to {sum(weights):g}. Set positive weights that sum to 1.")


class Mixture:
    """
    An endless stream of packed sequences from weighted sources, determined by the seed.

    `num_readers` readers share the sources. Process r of W interleaves the sequences of readers r, r + W, ..., so the
    data of an optimizer step do not depend on W as long as its sequences are a multiple of the readers.

    Args:
        sources (`list[DataSource]`): at least one; the weights sum to 1.
        tokenizer (`PreTrainedTokenizerBase`): with an end token, and with a chat template if a source is chat.
        max_length (`int`): tokens per sequence.
        seed (`int`): seed of the shuffling.
        num_readers (`int`, defaults to 8): a multiple of `num_processes`.
        num_processes (`int`, defaults to 1): training processes, each with its own data.
        state (`dict`, *optional*): merged from [`Mixture.state`] of all processes, to resume another run.
        open_source (`Callable`, *optional*): gives a source that is tokenized already, such as [`Shards.source`]; the
            sequences are the same.

    Raises:
        ValueError: for no source, weights that do not sum to 1, columns or examples that cannot be read, a chat
            source without a chat template, a number of readers that the processes cannot share or that exceeds the
            examples of a source, or the state of another mixture.
    """

    def __init__(
        self,
        sources: list[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        num_readers: int = 8,
        num_processes: int = 1,
        state: dict | None = None,
        open_source: Callable[[DataSource], Any] | None = None,
    ):
        check_weights(sources)
        self.weights = [source.weight for source in sources]
        if num_readers < 1 or num_readers % num_processes:
            raise ValueError(
                f"num_data_readers={num_readers} cannot be shared evenly by {num_processes} processes. "
                f"Set a multiple of {num_processes}."
            )
        open_source = open_source or partial(Source, tokenizer=tokenizer, max_length=max_length, mixture_seed=seed)
        self.sources = [open_source(source) for source in sources]
        described = [
            dataclasses.asdict(source) | opened.identity()
            for source, opened in zip(sources, self.sources, strict=True)
        ]
        self.identity = {"data": described, "max_length": max_length, "seed": seed, "num_data_readers": num_readers}
        if state is not None and state["identity"] != self.identity:
            changed = [name for name, value in self.identity.items() if state["identity"][name] != value]
            raise ValueError(
                f"The checkpoint was trained on another mixture ({', '.join(changed)} changed), so its position does "
                "not exist in this one. Restore the recipe, or start a new run with `model` set to the checkpoint."
            )
        for source in self.sources:
            if not source.source.streaming and len(source.dataset) < num_readers:
                raise ValueError(
                    f"Data source {source} has {len(source.dataset)} examples, too few for num_data_readers="
                    f"{num_readers}. Set it to {len(source.dataset)} or less, or leave the source out."
                )
        self.max_length, self.seed = max_length, seed
        self.pad_token_id = padding_id(tokenizer)
        self.num_readers, self.num_processes = num_readers, num_processes
        self.start = state or {"turn": 0, "num_processes": num_processes, "readers": {}}
        if self.start["num_processes"] != num_processes:
            self.start = {**self.start, "turn": 0}
        self.readers: dict[int, Reader] = {}

    def dataset(self):
        """The mixture as a `datasets.IterableDataset` of `sequence` rows, with one shard per process."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(self.sequences, gen_kwargs={"process": list(range(self.num_processes))})

    def sequences(self, process: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """The sequences of one process from the start state onwards."""
        readers = self.readers = {
            index: Reader(self, index, self.start["readers"].get(str(index)))
            for index in range(process[0], self.num_readers, self.num_processes)
        }
        executor = ThreadPoolExecutor(max_workers=1)
        try:
            for reader in readers.values():
                for _ in range(reader.skip):
                    reader.next_sequence(executor)
            for turn in itertools.count(self.start["turn"]):
                documents = list(readers.values())[turn % len(readers)].next_sequence(executor)
                yield sequence(documents, self.max_length, self.pad_token_id)
        finally:
            executor.shutdown(cancel_futures=True)

    def epoch(self, step: int, max_steps: int) -> float:
        """The mixture has no end, so the whole run is one epoch."""
        return step / max_steps

    def state(self, num_sequences: int) -> dict:
        """
        The position of this process in the mixture after some training sequences; JSON-serializable.

        Args:
            num_sequences (`int`): trained on by this process since it started. The data loader may have read more.
        """
        begin, end = self.start["turn"], self.start["turn"] + num_sequences
        states = {}
        for place, (index, reader) in enumerate(self.readers.items()):
            begun = self.start["readers"].get(str(index))
            turns = [range(place, turn, len(self.readers)) for turn in (begin, end)]
            taken = len(turns[1]) - len(turns[0]) + (begun["taken"] if begun else 0)
            state = reader.state(taken) if reader.begun else begun
            if state is not None:
                states[str(index)] = state
        return {"identity": self.identity, "turn": end, "num_processes": self.num_processes, "readers": states}


def collate(sequences: list[dict[str, np.ndarray]], flatten: bool = False) -> dict[str, torch.Tensor]:
    """
    A batch `(B, T)` of the rows of [`sequence`], without an attention mask: `position_ids` separate the documents.

    Args:
        sequences (`list[dict]`): rows of a mixture.
        flatten (`bool`, defaults to `False`): one row of B * T tokens, from which the FlashAttention integration of
            transformers separates documents.
    """
    batch = {name: torch.from_numpy(np.stack([row[name] for row in sequences])).long() for name in sequences[0]}
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} if flatten else batch
