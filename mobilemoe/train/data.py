"""Weighted mixtures of text and chat: packed, sharded by process, and resumed at the exact sequence."""

import bisect
import dataclasses
import itertools
import math
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

IGNORED = -100
# Sequences that a reader packs and shuffles at a time. More pack tighter and mix better; fewer start sooner.
BLOCK_SEQUENCES = 64
# The columns that make an example, and what the loss counts of it: everything, assistant turns, the completion.
KINDS = {"text": ["text"], "chat": ["messages"], "pair": ["prompt", "completion"]}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class DataSource:
    """
    One part of a mixture.

    Args:
        path (`str`): Hub data set, or `json`, `text`, `parquet` with `data_files`.
        weight (`float`, defaults to 1.0): share of the tokens that come from here; the weights of a mixture sum to 1.
        name (`str`, *optional*): configuration of a Hub data set.
        split (`str`, defaults to `"train"`): its split.
        revision (`str`, *optional*): its branch, tag or commit.
        data_dir (`str`, *optional*): a directory of it.
        data_files (`str`, *optional*): local files, for a format path.
        columns (`dict[str, str]`, *optional*): which of its columns is `text`, or `messages`, or `prompt` and
            `completion`; needed where it does not call them so.
        streaming (`bool`, defaults to `False`): `False` fetches the whole source and shuffles it; `True` reads it as
            training goes, in its own order, shuffled within blocks of 64 sequences.
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

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.path, self.name, self.data_dir, self.data_files) if part)

    def kind(self, available: list[str]) -> str:
        """
        Which of `KINDS` its examples are.

        Raises:
            ValueError: when its columns make none.
        """
        for kind, needed in KINDS.items():
            if all(self.columns.get(column, column) in available for column in needed) and (
                not self.columns or set(needed) == set(self.columns)
            ):
                return kind
        wanted = f"maps {self.columns} and" if self.columns else "sets no `columns` and"
        raise ValueError(
            f"Data source {self} {wanted} has the columns {sorted(available)}: no text, no messages, and no prompt "
            "with completion among them. Map the right ones, for example `columns: {text: content}`."
        )


class UnreadableExample(ValueError):
    """Why an example cannot be used, and its place among those that were to be encoded."""

    def __init__(self, reason: str, place: int = 0):
        super().__init__(reason)
        self.place = place


@dataclass
class Document:
    """What may not be separated in a pack: token ids and, of the same length, the ids that the loss counts."""

    input_ids: np.ndarray
    labels: np.ndarray


def render_chat(
    messages: list[dict[str, str]], num_prompt_messages: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """
    A conversation as the pieces of text that are read and those that are learned, up to the last assistant turn.

    A piece ends where a model is asked to answer, so the tokens of a prompt are those that it has when it is used.

    Raises:
        UnreadableExample: for no assistant turn after the prompt, or a template that changes earlier turns later on.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index >= num_prompt_messages
    ]
    if not turns:
        raise UnreadableExample("it has no assistant turn to learn from")
    if turns[0] == 0:
        raise UnreadableExample("it begins with an assistant turn, and no prompt asks for that")
    pieces, done = [], ""
    for index in turns:
        prefix = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (prefix.startswith(done) and whole.startswith(prefix)):
            raise UnreadableExample("the chat template renders its turns differently once more turns follow")
        # An empty answer is context at most: nobody wants a model that ends its turn at once.
        pieces += [(prefix[len(done) :], False), (whole[len(prefix) :], bool(messages[index]["content"]))]
        done = whole
    return pieces


def as_messages(value: Any, role: str | None = None) -> list[dict[str, str]]:
    """Messages of an example: a list as it is (ShareGPT keys renamed); a string, or nothing, as one turn of `role`."""
    if role is not None and (value is None or isinstance(value, str)):
        return [{"role": role, "content": value or ""}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        wanted = "a list of messages" if role is None else f"a string or a list of messages on its {role} side"
        raise UnreadableExample(f"it has {type(value).__name__} instead of {wanted}")
    messages = []
    for message in value:
        if "from" in message and "value" in message:
            message = {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if not {"role", "content"} <= set(message):
            raise UnreadableExample(f"a message has the keys {sorted(message)} and lacks role or content")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UnreadableExample(f"the content of its {message['role']} message is {kind}, not a string")
        messages.append(message)
    return messages


def encode(
    rows: list[dict[str, Any]], kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Document]]:
    """
    Tokenizes examples; each becomes one document, or several where a text exceeds `max_length`.

    A text gets the tokenizer's end token. A conversation that is too long loses its end. What has nothing to learn,
    an empty text or empty answers, becomes no document.

    Raises:
        UnreadableExample: for the first example that is not of its kind.
    """
    if kind == "text":
        texts = [row["text"] or "" for row in rows]
        wrong = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise UnreadableExample(f"its text is {type(texts[wrong]).__name__}, not a string", wrong)
        encoded = []
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            ids = np.array([*ids, tokenizer.eos_token_id] if text else [], dtype=np.int32)
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            encoded.append([Document(piece, piece) for piece in pieces])
        return encoded

    rendered = []
    for place, row in enumerate(rows):
        try:
            prompt = as_messages(row["prompt"], "user") if kind == "pair" else []
            answer = as_messages(row["completion"], "assistant") if kind == "pair" else as_messages(row["messages"])
            messages = prompt + answer
            rendered.append(render_chat(messages, len(prompt), tokenizer))
        except UnreadableExample as error:
            raise UnreadableExample(str(error), place) from error
    pieces = [piece for conversation in rendered for piece, _ in conversation]
    ids = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    encoded = []
    for conversation in rendered:
        parts = [(np.array(next(ids), dtype=np.int32), learned) for _, learned in conversation]
        input_ids = np.concatenate([part for part, _ in parts])[:max_length]
        labels = np.concatenate([part if learned else np.full_like(part, IGNORED) for part, learned in parts])
        labels = labels[:max_length]
        encoded.append([Document(input_ids, labels)] if (labels != IGNORED).any() else [])
    return encoded


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """
    Best-fit decreasing: indices of documents by sequence, no document cut (arXiv 2404.10830).

    Args:
        lengths (`list[int]`): tokens per document, none above `max_length`.
        max_length (`int`): tokens per sequence.
    """
    bins: list[list[int]] = []
    # Ascending (free tokens, bin): the first entry that fits is the tightest.
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place == len(free):
            space, chosen = max_length, len(bins)
            bins.append([])
        else:
            space, chosen = free.pop(place)
        bins[chosen].append(index)
        bisect.insort(free, (space - lengths[index], chosen))
    return bins


def sequence(documents: list[Document], max_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """
    One training sequence: `input_ids`, `labels` and `position_ids`, each `(max_length,)`.

    Positions restart at 0 with every document; transformers' masks read from that which tokens may see each other.
    """
    padding = max_length - sum(len(document.input_ids) for document in documents)
    lengths = [len(document.input_ids) for document in documents] + [padding]
    labels = np.concatenate([*(document.labels for document in documents), np.full(padding, IGNORED)])
    # The first token of a document would be predicted from the end of the one before it.
    labels[np.cumsum([0, *lengths[:-2]])] = IGNORED
    input_ids = np.concatenate([*(document.input_ids for document in documents), np.full(padding, pad_token_id)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


def collate(sequences: list[dict[str, np.ndarray]], flatten: bool = False) -> dict[str, torch.Tensor]:
    """
    A batch `(B, T)` without an attention mask, so that `position_ids` alone separate the documents.

    Args:
        sequences (`list[dict]`): from `sequence`.
        flatten (`bool`, defaults to `False`): one row of B * T tokens, the form in which the FlashAttention kernels
            of transformers keep documents apart.
    """
    batch = {name: torch.from_numpy(np.stack([row[name] for row in sequences])).long() for name in sequences[0]}
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} if flatten else batch


class Source:
    """A `DataSource` opened for a mixture: its data set, what kind of examples it has, and how they are encoded."""

    def __init__(self, source: DataSource, tokenizer: PreTrainedTokenizerBase, max_length: int, mixture_seed: int):
        from datasets import load_dataset

        self.source, self.tokenizer, self.max_length = source, tokenizer, max_length
        arguments = {name: getattr(source, name) for name in ("name", "split", "revision", "data_dir", "data_files")}
        rows = []
        # StopIteration is what `datasets` raises for an empty JSON file.
        with self._readable(), suppress(StopIteration):
            self.dataset = load_dataset(source.path, **arguments, streaming=source.streaming)
            if not source.streaming:
                self.dataset = self.dataset.shuffle(seed=mixture_seed)
            # What is wrong with a source should show before any step.
            rows = list(itertools.islice(self.dataset, 8))
        if not rows:
            raise ValueError(f"Data source {source} has no examples. Correct path, split or data_files.")
        self.kind = source.kind(list(rows[0]))
        if self.kind != "text" and tokenizer.chat_template is None:
            raise ValueError(
                f"Data source {source} holds conversations, but the tokenizer has no chat template. Train on it with "
                "recipes/sft.py, which brings one, or take the tokenizer of a chat model."
            )
        tokens = sum(len(document.input_ids) for documents in self.encode(rows, 0) for document in documents)
        self.mean_length = max(1.0, tokens / len(rows))

    def __str__(self) -> str:
        return str(self.source)

    @contextmanager
    def _readable(self):
        from datasets.exceptions import DatasetsError

        try:
            yield
        # Files that are cut off, not decodable, or unlike the first one raise EOFError and ValueError.
        except (DatasetsError, pa.ArrowException, zlib.error, OSError, EOFError, ValueError) as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"Data source {self.source} cannot be read: {type(reason).__name__}: {reason}. Repair or replace it; "
                "training goes on from the last checkpoint with --resume_from_checkpoint true."
            ) from error

    def part(self, reader: int, num_readers: int):
        """The part of the source that one of `num_readers` reads: whole files where there are enough of them."""
        from datasets.distributed import split_dataset_by_node

        if not self.source.streaming:
            return self.dataset.shard(num_readers, reader, contiguous=True).to_iterable_dataset()
        if self.dataset.num_shards >= num_readers:
            return self.dataset.shard(num_readers, reader, contiguous=False)
        return split_dataset_by_node(self.dataset, rank=reader, world_size=num_readers)

    def encode(self, rows: list[dict], first: int) -> list[list[Document]]:
        """Documents of each row; `first` is the number of the first row, for the message of an error."""
        named = [{ours: row[self.source.columns.get(ours, ours)] for ours in KINDS[self.kind]} for row in rows]
        try:
            return encode(named, self.kind, self.tokenizer, self.max_length)
        except UnreadableExample as error:
            raise ValueError(
                f"Data source {self.source}, example {first + error.place} of this reader: {error}. "
                f"Correct or remove it: {str(named[error.place])[:300]}"
            ) from error

    def draw(self, iterator: Iterator[dict], number: int) -> list[dict]:
        """Up to `number` examples; fewer at the end of the source."""
        with self._readable():
            return list(itertools.islice(iterator, number))


class Reader:
    """
    One of the readers that share a mixture: it draws its part of every source and packs block after block.

    Every block holds the sources in the proportion of their weights, in tokens; what one source gives too much of in
    a block, it gives less of in the next. A source that ends starts again.
    """

    def __init__(self, mixture: "Mixture", index: int, state: dict | None):
        self.mixture = mixture
        self.index = index
        self.parts = [source.part(index, mixture.num_readers) for source in mixture.sources]
        # Sequences given out, and the last blocks that were begun: (sequences given before, the state before). As many
        # as the loader could be ahead by if every block were a single sequence.
        self.taken = 0
        self.begun: deque[tuple[int, dict]] = deque(maxlen=256)
        self.current: deque[list[Document]] = deque()
        self.next: Future | None = None
        self.block = 0
        self.counts = [{"tokens": 0, "rows": 0} for _ in self.parts]
        # Where the block to come starts in each part; `datasets` knows it only once the part is being read.
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
        """The next sequence, while `executor` makes the block after the current one."""
        while not self.current:
            state, block = (self.next or executor.submit(self.next_block)).result()
            # A block is empty where the ones before it already held enough of every source: the next takes its place.
            if self.begun and self.begun[-1][0] == self.taken:
                self.begun.pop()
            self.begun.append((self.taken, state))
            self.current.extend(block)
            self.next = executor.submit(self.next_block)
        self.taken += 1
        return self.current.popleft()

    def state(self, taken: int) -> dict:
        """What it takes to go on after `taken` sequences, which may be some fewer than were given out."""
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
                    f"{self.mixture.num_readers}, in {self.counts[index]['rows']} examples. Lower num_data_readers "
                    "where they are too few, or "
                    "raise max_length where every conversation is cut before its first answer."
                )
            # A new object: one that has loaded a position would start again from there.
            self.parts[index] = source.part(self.index, self.mixture.num_readers)
            self.iterators[index] = iter(self.parts[index])
            rows = source.draw(self.iterators[index], number)
        return rows


class Mixture:
    """
    An endless stream of packed sequences from weighted sources, the same for every run under a seed.

    `num_readers` readers share the sources. Process r of W takes the sequences of readers r, r + W, ... in turn, so
    what an optimizer step trains on does not depend on W, as long as its sequences are a multiple of the readers.

    Args:
        sources (`list[DataSource]`): at least one; the weights sum to 1.
        tokenizer (`PreTrainedTokenizerBase`): with an end token, and for chat a template.
        max_length (`int`): tokens per sequence.
        seed (`int`): of the shuffling.
        num_readers (`int`, defaults to 8): a multiple of `num_processes`.
        num_processes (`int`, defaults to 1): processes that train, each on its own data.
        state (`dict`, *optional*): from `state` of all processes, to go on where another run stopped.

    Raises:
        ValueError: for no source, weights that do not sum to 1, columns or examples that cannot be read, a chat
            source without a chat template, a number of readers that the processes cannot share or that a source has
            too few examples for, or the state of another mixture.
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
    ):
        if not sources:
            raise ValueError("The recipe names no data. Add a `data` list of {path, weight, ...} to the YAML file.")
        self.weights = [source.weight for source in sources]
        if abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) <= 0:
            raise ValueError(
                f"The data weights {self.weights} sum to {sum(self.weights):g}. Set positive weights that sum to 1."
            )
        if num_readers < 1 or num_readers % num_processes:
            raise ValueError(
                f"num_data_readers={num_readers} cannot be shared evenly by {num_processes} processes. "
                f"Set a multiple of {num_processes}."
            )
        described = [dataclasses.asdict(source) for source in sources]
        self.identity = {"data": described, "max_length": max_length, "seed": seed, "num_data_readers": num_readers}
        if state is not None and state["identity"] != self.identity:
            changed = [name for name, value in self.identity.items() if state["identity"][name] != value]
            raise ValueError(
                f"The checkpoint was trained on another mixture ({', '.join(changed)} changed), so there is no place "
                "in this one to go on from. Restore the recipe, or start a new run with `model` set to the checkpoint."
            )
        self.sources = [Source(source, tokenizer, max_length, seed) for source in sources]
        for source in self.sources:
            if not source.source.streaming and len(source.dataset) < num_readers:
                raise ValueError(
                    f"Data source {source} has {len(source.dataset)} examples, too few for num_data_readers="
                    f"{num_readers}. Set it to {len(source.dataset)} or less, or leave the source out."
                )
        self.max_length, self.seed = max_length, seed
        # Llama-3 tokenizers have no token for padding; nothing learns from it or sees it.
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
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
        """The sequences of one process, from the start state on."""
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

    def state(self, num_sequences: int) -> dict:
        """
        Where this process is in the mixture after training on some sequences; JSON-serializable.

        Args:
            num_sequences (`int`): taken by this process since it started. The loader may have asked for more.
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
