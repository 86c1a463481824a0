"""Mixtures: weights, order and packing of their sources, resuming against uninterrupted runs, and errors."""

import copy
import gzip
import itertools
import json
import random
import re
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from test_documents import PAD, assistant, user

from mobilemoe.train import data
from mobilemoe.train.data import DataSource, Mixture, Reader, collate
from mobilemoe.train.recipe import CHAT_TEMPLATE


@pytest.fixture(autouse=True)
def small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_SEQUENCES", 8)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(name, count, words=3):
    """Texts that say which they are; `words` varies their length."""
    return [{"text": f"{name}{i}" + " x" * (i % words)} for i in range(count)]


def take(mixture, number, process=0):
    return list(itertools.islice(mixture.sequences([process]), number))


def ids(sequences):
    return [row["input_ids"].tolist() for row in sequences]


def names(rows, tokenizer):
    """The names of the texts that start in rows of ids."""
    return [name for row in rows for name in re.findall(r"[a-z]+\d+", tokenizer.decode(row))]


@pytest.mark.parametrize(
    ("columns", "available", "kind"),
    [
        ({}, ["text", "id"], "text"),
        # Cosmopedia has the prompt of its texts beside them.
        ({}, ["text", "prompt"], "text"),
        ({}, ["messages", "prompt"], "chat"),
        ({}, ["prompt", "completion", "id"], "pair"),
        ({"text": "content"}, ["content", "messages"], "text"),
        ({"messages": "conversations"}, ["conversations", "text"], "chat"),
        ({"prompt": "prompt", "completion": "answer"}, ["text", "prompt", "answer"], "pair"),
    ],
)
def test_columns_say_what_the_examples_are(columns, available, kind):
    assert DataSource("json", columns=columns).kind(available) == kind


def test_mixture_pads_with_the_end_token_where_there_is_no_other(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    source = DataSource("json", data_files=write(tmp_path / "a.jsonl", numbered("a", 20)))
    batch = collate(take(Mixture([source], tokenizer, 50, 0, 1), 4))
    assert batch["input_ids"].dtype == torch.long
    # Begin tokens and padding.
    assert batch["input_ids"][batch["labels"] == -100].unique().tolist() == [496, PAD]


@pytest.fixture
def two_sources(tmp_path):
    """Long texts and short ones, with weights that go the other way."""
    return [
        DataSource("json", 0.3, data_files=write(tmp_path / "a.jsonl", numbered("a", 300, words=120))),
        DataSource("json", 0.7, data_files=write(tmp_path / "b.jsonl", numbered("b", 90, words=4))),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_follow_the_weights(two_sources, tokenizer, streaming):
    for source in two_sources:
        source.streaming = streaming
    tokens = Counter()
    for row in take(Mixture(two_sources, tokenizer, 128, 0, 2), 160):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == 128
        starts = np.flatnonzero(row["position_ids"] == 0)
        for start, end in zip(starts, [*starts[1:], 128], strict=True):
            text = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            # A long text may continue in another sequence, without its name.
            tokens["b" if text.startswith("b") else "a" if text else "padding"] += end - start
    assert tokens["b"] / (tokens["a"] + tokens["b"]) == pytest.approx(0.7, abs=0.02)
    assert tokens["padding"] < 0.1 * tokens.total()


@pytest.mark.parametrize("streaming", [False, True])
def test_order_is_that_of_the_seed(two_sources, tokenizer, streaming):
    for source in two_sources:
        source.streaming = streaming
    first, again, other = (ids(take(Mixture(two_sources, tokenizer, 64, seed, 2), 40)) for seed in (0, 0, 1))
    assert first == again != other
    # What is fetched whole is shuffled by the seed too, and not only within blocks.
    started = [{name for name in names(order[:16], tokenizer) if name[0] == "a"} for order in (first, other)]
    assert (len(started[0] & started[1]) > len(started[0]) / 2) is streaming


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_files", [1, 5])
def test_every_row_comes_before_any_comes_again(tmp_path, tokenizer, num_readers, streaming, num_files):
    for number in range(num_files):
        write(tmp_path / f"part-{number}.jsonl", numbered("abcde"[number], 100 // num_files))
    source = DataSource("json", data_files=str(tmp_path / "part-*.jsonl"), streaming=streaming)
    mixture = Mixture([source], tokenizer, 16, 0, num_readers)
    seen = []
    for index in range(num_readers):
        reader, counts = Reader(mixture, index, None), Counter()
        own = [row["text"].split()[0] for row in mixture.sources[0].part(index, num_readers)]
        while min(counts[name] for name in own) < 3:
            _, block = reader.next_block()
            counts.update(tokenizer.decode(document.input_ids[1:-1]).split()[0] for row in block for document in row)
            # A block may hold the end of one epoch and the begin of the next.
            assert max(counts.values()) - min(counts[name] for name in own) <= 1
        assert set(counts) == set(own)
        seen += own
    assert sorted(seen) == sorted(row["text"].split()[0] for row in mixture.sources[0].dataset)
    assert len(set(seen)) == 100


def test_whole_sources_are_shuffled_and_streams_are_not(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", numbered("a", 400))
    early = []
    for streaming in (False, True):
        source = DataSource("json", data_files=path, streaming=streaming)
        early.append(names(ids(take(Mixture([source], tokenizer, 16, 0, 1), 8)), tokenizer))
    assert max(int(name[1:]) for name in early[0]) > 100
    assert max(int(name[1:]) for name in early[1]) < 40
    # Within a block the sequences of a stream are in another order.
    assert early[1] != sorted(early[1], key=lambda name: int(name[1:]))


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_what_one_would_take(two_sources, tokenizer, streaming):
    for source in two_sources:
        source.streaming = streaming
    steps = {}
    for num_processes in (1, 2, 4):
        parts = []
        for rank in range(num_processes):
            # As the trainer does it: a shard of the whole per process.
            dataset = Mixture(two_sources, tokenizer, 64, 0, 4, num_processes).dataset()
            assert dataset.num_shards == num_processes
            shard = dataset.shard(num_processes, rank) if num_processes > 1 else dataset
            parts.append([tuple(row["input_ids"]) for row in shard.take(80 // num_processes)])
        assert len({tuple(part) for part in parts}) == num_processes
        # Steps of 8 sequences, twice the readers.
        per_step = 8 // num_processes
        steps[num_processes] = [
            Counter(row for part in parts for row in part[start : start + per_step])
            for start in range(0, 80 // num_processes, per_step)
        ]
    assert steps[1] == steps[2] == steps[4]
    assert len(steps[1]) == 10


# Resuming


def round_trip(state):
    return json.loads(json.dumps(state))


@pytest.fixture(params=["whole", "streaming", "streamed files"])
def repeating_sources(request, tmp_path):
    """The second source repeats every few blocks."""
    num_files = 3 if request.param == "streamed files" else 1
    for number in range(num_files):
        write(tmp_path / f"a-{number}.jsonl", numbered(f"a{number}n", 360 // num_files, words=20))
    write(tmp_path / "b.jsonl", numbered("b", 25, words=4))
    streaming = request.param != "whole"
    return [
        DataSource("json", 0.6, data_files=str(tmp_path / "a-*.jsonl"), streaming=streaming),
        DataSource("json", 0.4, data_files=str(tmp_path / "b.jsonl"), streaming=streaming),
    ]


@pytest.mark.parametrize("num_readers", [1, 3])
def test_resumed_mixture_goes_on_at_the_exact_sequence(repeating_sources, tokenizer, num_readers):
    arguments = (repeating_sources, tokenizer, 64, 0, num_readers)
    total = 130
    whole = ids(take(Mixture(*arguments), total + 20))
    # Source b, of 25 texts, has come again many times.
    assert Counter(names(whole[:total], tokenizer))["b0"] > 4
    # At a block's begin, its end and between; before the first sequence; while the loader has asked for more.
    for cut, ahead in [(0, 0), (0, 3), (7, 2), (8, 0), (25, 16), (48, 1), (77, 4), (120, 3)]:
        mixture = Mixture(*arguments)
        assert ids(take(mixture, cut + ahead)) == whole[: cut + ahead]
        again = Mixture(*arguments, state=round_trip(mixture.state(cut)))
        assert ids(take(again, 10)) == whole[cut : cut + 10], (cut, ahead)
        # And from there once more, after fewer sequences than were read.
        third = Mixture(*arguments, state=round_trip(again.state(6)))
        assert ids(take(third, 24)) == whole[cut + 6 : cut + 30], (cut, ahead)
        # A checkpoint before any step of a resumed run is the one it came from.
        fourth = Mixture(*arguments, state=round_trip(third.state(0)))
        assert ids(take(fourth, 2)) == whole[cut + 6 : cut + 8], (cut, ahead)


def test_place_is_kept_after_a_document_of_many_blocks(tmp_path, tokenizer):
    """Such a document leaves blocks without a sequence of their own; the loader meanwhile is some sequences ahead."""
    rows = [{"text": "x = 1\n" * (data.BLOCK_SEQUENCES * 100 if i == 20 else 5)} for i in range(200)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ([DataSource(path="json", data_files=str(path), streaming=True)], tokenizer, 32, 0, 1)
    mixture, whole = Mixture(*arguments), []
    for row in itertools.islice(mixture.sequences([0]), 1500):
        whole.append(row)
        mixture.state(max(0, len(whole) - 3))
    again = Mixture(*arguments, state=round_trip(mixture.state(1490)))
    assert ids(take(again, 10)) == ids(whole[1490:])


def test_readers_that_were_not_asked_again_keep_their_place(two_sources, tokenizer):
    arguments = (two_sources, tokenizer, 64, 0, 3)
    whole = ids(take(Mixture(*arguments), 60))
    mixture = Mixture(*arguments)
    take(mixture, 45)
    # Where the last reader begins a block and the first one is next: after a stop, one sequence asks the first only.
    cut = next(cut for cut in range(3, 45, 3) if mixture.state(cut)["readers"]["2"]["skip"] == 0)
    again = Mixture(*arguments, state=round_trip(mixture.state(cut)))
    take(again, 1)
    third = Mixture(*arguments, state=round_trip(again.state(1)))
    assert ids(take(third, 12)) == whole[cut + 1 : cut + 13]


@pytest.mark.parametrize("streaming", [False, True])
def test_chat_and_pairs_resume_too(tmp_path, chat_tokenizer, streaming):
    chats = [
        {"messages": [user(f"a{i}"), assistant("x " * (i % 7 + 1)), user("b"), assistant("y")]} for i in range(60)
    ]
    # Every third answer is empty, so that rows and documents differ in number.
    pairs = [{"prompt": f"b{i}", "completion": "z" if i % 3 else ""} for i in range(60)]
    sources = [
        DataSource("json", 0.5, data_files=write(tmp_path / f"{number}.jsonl", rows), streaming=streaming)
        for number, rows in enumerate((chats, pairs))
    ]
    whole = ids(take(Mixture(sources, chat_tokenizer, 96, 0, 2), 60))
    for cut in (5, 16, 31):
        mixture = Mixture(sources, chat_tokenizer, 96, 0, 2)
        take(mixture, cut + 2)
        again = Mixture(sources, chat_tokenizer, 96, 0, 2, state=round_trip(mixture.state(cut)))
        assert ids(take(again, 25)) == whole[cut : cut + 25]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_another_number_of_processes_goes_on_where_the_readers_are(repeating_sources, tokenizer, before, after):
    def processes(count, state=None):
        return [Mixture(repeating_sources, tokenizer, 64, 0, 4, count, state) for _ in range(count)]

    reference = [[] for _ in range(4)]
    for turn, row in enumerate(ids(take(Mixture(repeating_sources, tokenizer, 64, 0, 4), 160))):
        reference[turn % 4].append(row)
    # Eleven turns of each process, so that the readers of one are not equally far.
    mixtures = processes(before)
    for rank, mixture in enumerate(mixtures):
        take(mixture, 11 + 2, rank)
    states = [mixture.state(11) for mixture in mixtures]
    state = states[0] | {"readers": {index: value for part in states for index, value in part["readers"].items()}}
    taken = {index: value["taken"] for index, value in state["readers"].items()}
    assert sum(taken.values()) == 11 * before
    for rank, mixture in enumerate(processes(after, round_trip(state))):
        own = range(rank, 4, after)
        rows = ids(take(mixture, 6 * len(own), rank))
        for place, reader in enumerate(own):
            assert rows[place :: len(own)] == reference[reader][taken[str(reader)] :][:6]


@pytest.mark.parametrize("changed", ["data", "max_length", "seed", "num_data_readers"])
def test_state_of_another_mixture_is_refused(two_sources, tokenizer, changed):
    mixture = Mixture(two_sources, tokenizer, 64, 0, 2)
    take(mixture, 3)
    state = round_trip(mixture.state(3))
    arguments = {"max_length": 64, "seed": 0, "num_data_readers": 2} | {changed: 4}
    if changed == "data":
        two_sources[0].streaming = True
    with pytest.raises(ValueError, match=rf"another mixture \({changed} changed\).*Restore the recipe"):
        Mixture(
            two_sources,
            tokenizer,
            arguments["max_length"],
            arguments["seed"],
            arguments["num_data_readers"],
            state=state,
        )


# Errors


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = lines(*numbered("a", 40))
CHAT = lines(*[{"messages": [user("a"), assistant("b")]}] * 20)
# What the file holds, the arguments of `DataSource` and `Mixture` that differ, and the parts of the message.
WRONG = {
    "weights above 1": (GOOD, {"weight": 1.1}, {}, ["weight=1.1 cannot work", "from 1e-12 to 1"]),
    "weight of 0": (GOOD, {"weight": 0.0}, {}, ["weight=0.0 cannot work", "from 1e-12 to 1"]),
    "missing column": (
        lines({"txt": "a", "id": 1}),
        {},
        {},
        ["a.jsonl", "sets no `columns`", "['id', 'txt']", "no text, no messages", "Map the right ones"],
    ),
    "missing mapped column": (
        GOOD,
        {"columns": {"text": "content"}},
        {},
        ["a.jsonl", "{'text': 'content'}", "['text']", "Map the right ones"],
    ),
    "half a pair": (
        lines({"prompt": "a", "answer": "b"}),
        {"columns": {"prompt": "prompt"}},
        {},
        ["['answer', 'prompt']", "no prompt with completion"],
    ),
    "no assistant turn": (
        CHAT + lines({"messages": [user("only a question")]}),
        {"streaming": True},
        {},
        ["a.jsonl", "example 20", "no assistant turn", "Correct or remove it", "only a question"],
    ),
    "no assistant turn at the start": (
        lines({"messages": [user("only a question")]}),
        {},
        {},
        ["a.jsonl", "example 0", "no assistant turn", "Correct or remove it", "only a question"],
    ),
    "assistant turn first": (
        lines({"messages": [assistant("b"), user("a"), assistant("b")]}),
        {},
        {},
        ["example 0", "begins with an assistant turn", "Correct or remove it"],
    ),
    "messages as a string": (
        lines({"messages": json.dumps([user("a"), assistant("b")])}),
        {},
        {},
        ["example 0", "str instead of a list of messages", "Correct or remove it"],
    ),
    "no messages": (
        lines({"messages": [user("a"), assistant("b")]}, {"messages": None}),
        {"streaming": True},
        {},
        ["example 1", "NoneType instead of a list of messages", "Correct or remove it"],
    ),
    "message without role": (
        lines({"messages": [{"speaker": "a", "content": "b"}]}),
        {},
        {},
        ["['content', 'speaker'] and lacks role", "Correct or remove it"],
    ),
    "message without content": (
        lines({"messages": [user("a"), assistant(None)]}),
        {},
        {},
        ["content of its assistant message is NoneType", "Correct or remove it"],
    ),
    "number as a completion": (
        lines({"prompt": "a", "completion": 4}),
        {},
        {},
        ["int instead of a string or a list of messages on its assistant side", "Correct or remove it"],
    ),
    "text that is none": (
        GOOD + lines({"text": ["a", "b"]}),
        {"streaming": True},
        {},
        ["a.jsonl", "example 40", "its text is list, not a string", "Correct or remove it"],
    ),
    "no chat template": (CHAT, {}, {"template": None}, ["a.jsonl", "no chat template", "recipes/sft.py"]),
    "readers and processes": (
        GOOD,
        {},
        {"num_readers": 3, "num_processes": 2},
        ["num_data_readers=3", "2 processes", "Set a multiple of 2"],
    ),
    "no readers": (GOOD, {}, {"num_readers": 0}, ["num_data_readers=0", "Set a multiple of 1"]),
    "fewer examples than readers": (
        lines(*[{"text": "a b c " * 300}] * 3),
        {},
        {"num_readers": 8},
        ["a.jsonl has 3 examples", "num_data_readers=8", "Set it to 3 or less"],
    ),
    "fewer streamed examples than readers": (
        lines(*[{"text": "a b c " * 300}] * 3),
        {"streaming": True},
        {"num_readers": 8},
        ["a.jsonl", "nothing to learn for reader 3 of 8", "in 0 examples", "Lower num_data_readers"],
    ),
    "answers beyond max_length": (
        lines(*[{"messages": [user("a b c " * 20), assistant("b")]}] * 40),
        {},
        {},
        ["a.jsonl", "nothing to learn", "20 examples", "raise max_length"],
    ),
    "empty file": ("", {}, {}, ["a.jsonl has no examples", "Correct path, split or data_files"]),
    "empty streamed file": ("", {"streaming": True}, {}, ["a.jsonl has no examples", "Correct path"]),
    "null": ("null\n", {}, {}, ["a.jsonl cannot be read", "begins with null", "Repair or replace it"]),
    "missing file": (None, {}, {}, ["a.jsonl cannot be read", "FileNotFoundError", "Repair or replace it"]),
    "missing streamed file": (
        None,
        {"streaming": True},
        {},
        ["a.jsonl cannot be read", "FileNotFoundError", "Repair or replace it"],
    ),
    "missing split": (GOOD, {"split": "trian"}, {}, ["a.jsonl cannot be read", "trian", "['train']"]),
    "missing data set": (GOOD, {"path": "nobody/nothing", "data_files": None}, {}, ["nobody/nothing cannot be read"]),
}


def open_and_read(path, source, options, tokenizer):
    tokenizer.chat_template = options.get("template", CHAT_TEMPLATE)
    source = DataSource(**{"path": "json", "data_files": str(path)} | source)
    num_readers = options.get("num_readers", 1 if source.streaming else 2)
    mixture = Mixture([source], tokenizer, 64, 0, num_readers, options.get("num_processes", 1))
    take(mixture, 1500)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(tmp_path, tokenizer, name):
    content, source, options, parts = WRONG[name]
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError) as raised:
        open_and_read(tmp_path / "a.jsonl", source, options, copy.deepcopy(tokenizer))
    assert [part for part in parts if part not in str(raised.value)] == [], raised.value


def test_no_data_is_refused(tokenizer):
    with pytest.raises(ValueError, match="names no data. Add a `data` list"):
        Mixture([], tokenizer, 64, 0)


def break_json(path):
    rows = [line + "\n" for line in lines(*numbered("a", 3000, words=40)).splitlines()]
    path.write_text("".join(rows[:2000] + ["{broken\n"] + rows[2000:]))


def cut_json(path):
    path.write_text(lines(*numbered("a", 3000, words=40))[:-5])


def undecodable_json(path):
    path.write_bytes(lines(*numbered("a", 3000)).encode() + b'{"text": "\xff\xfe"}\n')


def cut_gzip(path):
    packed = gzip.compress(lines(*numbered("a", 3000)).encode())
    path.write_bytes(packed[: len(packed) // 2])


def corrupt_parquet(path):
    table = pa.table({"text": [random.Random(i).randbytes(40).hex() for i in range(1000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)


def other_columns(path):
    write(path.with_name("a-1.jsonl"), numbered("a", 300))
    write(path.with_name("a-2.jsonl"), [{"body": "b", "id": i} for i in range(300)])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (break_json, "a.jsonl", "JSON parse error"),
        (cut_json, "a.jsonl", "JSON parse error"),
        (undecodable_json, "a.jsonl", "UnicodeDecodeError"),
        (cut_gzip, "a.jsonl.gz", "Compressed file ended"),
        (corrupt_parquet, "a.parquet", "OSError"),
        (other_columns, "a-*.jsonl", "column names don't match"),
    ],
)
def test_broken_file_is_named(tmp_path, tokenizer, damage, file, reason, streaming):
    damage(tmp_path / file)
    path = "parquet" if file.endswith("parquet") else "json"
    source = {"path": path, "streaming": streaming}
    with pytest.raises(ValueError) as raised:
        open_and_read(tmp_path / file, source, {}, copy.deepcopy(tokenizer))
    for part in (f"Data source {path} {tmp_path / file} cannot be read", reason, "Repair or replace it"):
        assert part in str(raised.value)


def test_sequences_before_a_broken_place_are_all_given(tmp_path, tokenizer, monkeypatch):
    """`datasets` reads a streamed file in chunks, and one that is broken gives nothing; the ones before it do."""
    good = lines(*numbered("a", 400, words=10))
    (tmp_path / "a-1.jsonl").write_text(good)
    (tmp_path / "a-2.jsonl").write_text(good)
    source = DataSource("json", data_files=str(tmp_path / "a-*.jsonl"), streaming=True)
    whole = ids(take(Mixture([source], tokenizer, 64, 0, 1), 250))
    (tmp_path / "a-2.jsonl").write_text(good.replace("\n", "\n{broken\n", 1))
    mixture, given = Mixture([source], tokenizer, 64, 0, 1), []
    with pytest.raises(ValueError, match="cannot be read"):
        for row in itertools.islice(mixture.sequences([0]), 500):
            given.append(row)
    # All blocks that the first file fills.
    assert len(given) >= 48
    assert ids(given) == whole[: len(given)]
    # Training can resume before the error once the file is repaired.
    state = round_trip(mixture.state(len(given) - 3))
    (tmp_path / "a-2.jsonl").write_text(good)
    again = Mixture([source], tokenizer, 64, 0, 1, state=state)
    assert ids(take(again, 40)) == whole[len(given) - 3 : len(given) + 37]
