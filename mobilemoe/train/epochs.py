"""A finite number of passes over data that fit in memory, resumed at the exact sequence."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data import DataSource, Source, padding_id
from .documents import Document, pack, sequence
from .shards import PreparedSource


# Examples tokenized at a time.
BATCH_EXAMPLES = 1000


def read_documents(sources: Sequence[Source | PreparedSource]) -> list[Document]:
    """
    All documents of some sources, in their order.

    Raises:
        ValueError: for an example that cannot be used, or when nothing of a source can be learnt.
    """
    documents: list[Document] = []
    for source in sources:
        begin, first, rows = len(documents), 0, iter(source.dataset)
        while batch := source.draw(rows, BATCH_EXAMPLES):
            documents += [document for encoded in source.encode(batch, first) for document in encoded]
            first += len(batch)
        if len(documents) == begin:
            raise ValueError(
                f"Data source {source} has nothing to learn in {first} examples. Raise max_length if conversations "
                "are cut before the first answer."
            )
    return documents


def packed_sequences(documents: list[Document], max_length: int, pad_token_id: int) -> list[dict[str, np.ndarray]]:
    """The documents as packed rows of [`sequence`], for an evaluation."""
    bins = pack([len(document.input_ids) for document in documents], max_length)
    return [sequence([documents[index] for index in rows], max_length, pad_token_id) for rows in bins]


class Epochs:
    """
    Passes over all examples of some sources: packed once, shuffled anew in every epoch.

    An epoch is a whole number of optimizer steps: the last one is filled up with empty sequences, from which the loss
    counts nothing. So every document is learnt from exactly once in each epoch.

    Args:
        sources (`list[DataSource]`): at least one, without weights and not streamed.
        tokenizer (`PreTrainedTokenizerBase`): with an end token, and with a chat template if a source is chat.
        max_length (`int`): tokens per sequence.
        seed (`int`): seed of the shuffling.
        sequences_per_step (`int`): of all processes together.
        num_processes (`int`, defaults to 1): training processes, each with its own data.
        state (`dict`, *optional*): from [`Epochs.state`], to resume another run.
        open_source (`Callable`, *optional*): gives a source that is tokenized already, such as [`Shards.source`]; the
            sequences are the same.

    Raises:
        ValueError: for no source, a streamed or weighted one, examples that cannot be read, or a state of other data.
    """

    def __init__(
        self,
        sources: list[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        sequences_per_step: int,
        num_processes: int = 1,
        state: dict | None = None,
        open_source: Callable[[DataSource], Source | PreparedSource] | None = None,
    ):
        if not sources:
            raise ValueError("The recipe names no data. Add a `data` list of {path, ...} to the YAML file.")
        for source in sources:
            if source.streaming or source.weight != 1:
                raise ValueError(
                    f"Data source {source} has {'streaming' if source.streaming else f'weight={source.weight:g}'}, "
                    "but an epoch reads every example once. Leave it out, or set max_steps in place of "
                    "num_train_epochs."
                )
        described = [dataclasses.asdict(source) for source in sources]
        open_source = open_source or partial(Source, tokenizer=tokenizer, max_length=max_length, mixture_seed=seed)
        self.documents = read_documents([open_source(source) for source in sources])
        self.bins = pack([len(document.input_ids) for document in self.documents], max_length)
        self.max_length, self.seed, self.pad_token_id = max_length, seed, padding_id(tokenizer)
        self.sequences_per_step, self.num_processes = sequences_per_step, num_processes
        self.identity = {
            "epochs_of": described,
            "max_length": max_length,
            "seed": seed,
            "sequences_per_step": sequences_per_step,
            "tokens": self.num_tokens,
        }
        if state is not None and state["identity"] != self.identity:
            changed = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
            raise ValueError(
                f"The checkpoint was trained on other data ({', '.join(changed)} changed), so its position does not "
                "exist in these. Restore the recipe, or start a new run with `model` set to the checkpoint."
            )
        # Sequences of all processes.
        self.taken = 0 if state is None else state["taken"]

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, without padding."""
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.bins) / self.sequences_per_step)

    def epoch(self, step: int, max_steps: int) -> float:
        return step / self.steps_per_epoch

    def dataset(self):
        """The passes as a `datasets.IterableDataset` of `sequence` rows without an end, one shard per process."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(self.sequences, gen_kwargs={"process": list(range(self.num_processes))})

    def sequences(self, process: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """The sequences of one process from the start state onwards."""
        per_epoch = self.steps_per_epoch * self.sequences_per_step
        order, shuffled = np.empty(0), -1
        for index in itertools.count(self.taken + process[0], self.num_processes):
            epoch, place = divmod(index, per_epoch)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.bins)), epoch
            documents = [self.documents[i] for i in self.bins[order[place]]] if place < len(order) else []
            yield sequence(documents, self.max_length, self.pad_token_id)

    def state(self, num_sequences: int) -> dict:
        """
        The position in the data after some training sequences; JSON-serializable.

        Args:
            num_sequences (`int`): trained on by this process since it started.
        """
        taken = self.taken + num_sequences * self.num_processes
        return {"identity": self.identity, "taken": taken, "readers": {}}
