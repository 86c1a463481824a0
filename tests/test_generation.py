"""Stop sequences, and the nucleus of a distribution."""

import random

import pytest
import torch

from mobilemoe.generation import common_length, nucleus, until


def test_text_ends_before_the_first_stop_sequence():
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("abc", k=generator.randrange(12)))
        stop = ["".join(generator.choices("abc", k=generator.randrange(1, 4))) for _ in range(generator.randrange(3))]
        cuts = sorted(generator.choices(range(len(text) + 1), k=3))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = list(until(pieces, stop))
        ends = [text.index(sequence) for sequence in stop if sequence in text]
        # A shorter sequence may end first although a longer one began before it.
        whole = "".join(found)
        assert text.startswith(whole) and not any(sequence in whole for sequence in stop)
        assert whole == text if not ends else len(whole) >= min(ends)
        # What cannot begin a sequence is not held back.
        assert stop or found[:-1] == pieces


def test_an_empty_stop_sequence_is_refused():
    with pytest.raises(ValueError, match="A stop sequence is empty"):
        list(until(["a"], ["b", ""]))


def test_common_length_of_lists_and_tuples():
    for one, other, length in (
        ([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ((1, 2, 3), (1, 5, 3), 1), ([4], [5], 0),
    ):  # fmt: skip
        assert common_length(one, other) == common_length(other, one) == length


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_sum():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    assert nucleus(probabilities, 1.0).tolist() == probabilities.tolist()
    for top_p, kept in ((0.5, [1]), (0.51, [1, 3]), (0.84, [1, 3]), (0.9, [1, 3, 0]), (1e-6, [1])):
        assert sorted(nucleus(probabilities, top_p).nonzero().flatten().tolist()) == sorted(kept)
