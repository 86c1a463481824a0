"""Shards: the sequences of online tokenizing, resumed at any place, written whole, and refused for other settings."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from test_data import ids, numbered, round_trip, take, two_sources, write  # noqa: F401
from test_documents import assistant, user
from toy_tokenizer import train_tokenizer
from trl import SFTConfig

from mobilemoe.artifacts import file_sha256
from mobilemoe.train import data, shards
from mobilemoe.train.data import DataSource, Mixture
from mobilemoe.train.epochs import Epochs
from mobilemoe.train.recipe import CHAT_TEMPLATE, RecipeArguments, parse_arguments
from mobilemoe.train.shards import FINISHED_FILE, PREPARED_FILE, Prepared, Shards, prepare
from mobilemoe.train.stages import LoRAArguments, QATArguments, prepare_data, pretrain


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Several blocks, files and record batches of a few rows."""
    monkeypatch.setattr(data, "BLOCK_SEQUENCES", 8)
    monkeypatch.setattr(shards, "PIECE_ROWS", 64)
    monkeypatch.setattr(shards, "BATCH_ROWS", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["whole", "one file streamed", "files streamed"])
def sources(request, tmp_path):
    """Texts of which some are longer than a sequence and some empty, conversations, and pairs without an answer."""
    streaming, num_files = request.param != "whole", 7 if request.param == "files streamed" else 1
    texts = numbered("a", 210, words=150)
    texts[5]["text"] = texts[90]["text"] = ""
    for number in range(num_files):
        write(tmp_path / f"a-{number}.jsonl", texts[number::num_files])
    chats = [{"messages": [user(f"b{i}"), assistant("x " * (i % 50)), user("c"), assistant("y")]} for i in range(70)]
    pairs = [{"prompt": f"d{i}", "completion": "z" if i % 7 else ""} for i in range(60)]
    return [
        DataSource("json", 0.5, data_files=str(tmp_path / "a-*.jsonl"), streaming=streaming),
        DataSource("json", 0.3, data_files=write(tmp_path / "chats.jsonl", chats), streaming=streaming),
        DataSource("json", 0.2, data_files=write(tmp_path / "pairs.jsonl", pairs), streaming=streaming),
    ]


def rows(sequences):
    return [{name: (array.dtype, array.tolist()) for name, array in row.items()} for row in sequences]


@pytest.mark.parametrize("num_readers", [1, 3, 8])
def test_sequences_are_those_of_online_tokenizing(sources, chat_tokenizer, tmp_path, num_readers):
    prepare(sources, chat_tokenizer, 64, 3, tmp_path / "shards")
    opened = Shards(str(tmp_path / "shards"), chat_tokenizer, 64, 3)
    # Every source comes again some times.
    online = rows(take(Mixture(sources, chat_tokenizer, 64, 3, num_readers), 300))
    assert online == rows(take(Mixture(sources, chat_tokenizer, 64, 3, num_readers, open_source=opened.source), 300))


def test_weights_readers_and_processes_are_chosen_when_reading(sources, chat_tokenizer, tmp_path):
    prepare(sources, chat_tokenizer, 64, 3, tmp_path / "shards")
    for source, weight in zip(sources, (0.1, 0.2, 0.7), strict=True):
        source.weight = weight
    for process in range(2):
        opened = Shards(str(tmp_path / "shards"), chat_tokenizer, 64, 3)
        online = Mixture(sources[::-1], chat_tokenizer, 64, 3, 4, 2)
        prepared = Mixture(sources[::-1], chat_tokenizer, 64, 3, 4, 2, open_source=opened.source)
        assert rows(take(online, 80, process)) == rows(take(prepared, 80, process))


def test_epochs_are_those_of_online_tokenizing(tmp_path, chat_tokenizer):
    source = DataSource("json", data_files=write(tmp_path / "a.jsonl", numbered("a", 150, words=90)))
    prepare([source], chat_tokenizer, 64, 3, tmp_path / "shards")
    opened = Shards(str(tmp_path / "shards"), chat_tokenizer, 64, 3)
    online = Epochs([source], chat_tokenizer, 64, 3, 4)
    prepared = Epochs([source], chat_tokenizer, 64, 3, 4, open_source=opened.source)
    number = 2 * 4 * online.steps_per_epoch
    assert rows(take(online, number)) == rows(take(prepared, number))


@pytest.mark.parametrize("num_readers", [1, 3])
def test_resumed_at_any_place(sources, chat_tokenizer, tmp_path, num_readers):
    prepare(sources, chat_tokenizer, 64, 0, tmp_path / "shards")
    opened = Shards(str(tmp_path / "shards"), chat_tokenizer, 64, 0)
    arguments = (sources, chat_tokenizer, 64, 0, num_readers)
    whole = ids(take(Mixture(*arguments), 160))
    for cut, ahead in [(0, 3), (8, 0), (25, 16), (77, 4), (140, 3)]:
        mixture = Mixture(*arguments, open_source=opened.source)
        take(mixture, cut + ahead)
        again = Mixture(*arguments, state=round_trip(mixture.state(cut)), open_source=opened.source)
        assert ids(take(again, 12)) == whole[cut : cut + 12], (cut, ahead)
        third = Mixture(*arguments, state=round_trip(again.state(6)), open_source=opened.source)
        assert ids(take(third, 12)) == whole[cut + 6 : cut + 18], (cut, ahead)


def test_resuming_reads_nothing_of_what_came_before(tmp_path, tokenizer, monkeypatch):
    """A position is a number: the rows before it are not looked at, wherever it is."""
    source = DataSource("json", data_files=write(tmp_path / "a.jsonl", numbered("a", 3000)))
    prepare([source], tokenizer, 64, 0, tmp_path / "shards")
    arguments = ([source], tokenizer, 64, 0, 1)
    # Without a look at rows that later ones do not need.
    read = Counter()
    real = shards.PreparedSource._read_batch

    def counting(self, file, batch):
        read[file, batch] += 1
        return real(self, file, batch)

    monkeypatch.setattr(shards.PreparedSource, "_read_batch", counting)
    costs = []
    for cut in (10, 300):
        mixture = Mixture(*arguments, open_source=Shards(str(tmp_path / "shards"), tokenizer, 64, 0).source)
        take(mixture, cut)
        state = round_trip(mixture.state(cut))
        opened = Shards(str(tmp_path / "shards"), tokenizer, 64, 0)
        read.clear()
        take(Mixture(*arguments, state=state, open_source=opened.source), 1)
        costs.append(len(read))
    # At most the current block and the one after it.
    assert max(costs) <= 2 * (8 * 64 // 5 // 16 + 2) < 3000 // 16


def test_mixture_of_shards_is_another_one_for_a_checkpoint(two_sources, tokenizer, tmp_path):  # noqa: F811
    prepare(two_sources, tokenizer, 64, 0, tmp_path / "shards")
    arguments = (two_sources, tokenizer, 64, 0, 2)
    online, prepared = Mixture(*arguments), Mixture(*arguments, open_source=opened(tmp_path, tokenizer).source)
    for mixture, other in ((online, opened(tmp_path, tokenizer).source), (prepared, None)):
        take(mixture, 3)
        with pytest.raises(ValueError, match=r"another mixture \(data changed\)"):
            Mixture(*arguments, state=round_trip(mixture.state(3)), open_source=other)


def opened(directory, tokenizer, length=64, seed=0):
    return Shards(str(directory / "shards"), tokenizer, length, seed)


def test_statistics(tmp_path, chat_tokenizer):
    texts = [{"text": "x"}, {"text": ""}, {"text": "x = 1\n" * 100}]
    chats = [{"messages": [user("a"), assistant("b")]}] * 5
    sources = [
        DataSource("json", data_files=write(tmp_path / f"{number}.jsonl", each))
        for number, each in enumerate((texts, chats))
    ]
    whole = [len(chat_tokenizer(row["text"])["input_ids"]) + 1 for row in (texts[0], texts[2])]
    answer = len(chat_tokenizer("b<|eot|>", add_special_tokens=False)["input_ids"])
    for each, expected in zip(
        prepare(sources, chat_tokenizer, 64, 0, tmp_path / "shards"),
        [{"rows": 3, "documents": 1 + -(-whole[1] // 64), "tokens": sum(whole)}, {"rows": 5, "documents": 5}],
        strict=True,
    ):
        assert {name: each.total(name) for name in expected} == expected
        assert each.total("learnt") == (sum(whole) if each.kind == "text" else 5 * answer)


def test_files_are_arrow_that_datasets_reads(two_sources, tokenizer, tmp_path):  # noqa: F811
    (first, _) = prepare(two_sources, tokenizer, 64, 0, tmp_path / "shards")
    files = sorted(str(path) for path in (tmp_path / "shards").glob("*/*.arrow"))
    dataset = datasets.load_dataset("arrow", data_files=files, split="train")
    texts = {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in dataset}
    names = {row["text"] for source in two_sources for row in map(json.loads, Path(source.data_files).open())}
    assert texts == names
    assert len(first.files) == 5


# Written whole


def worker(directory, *arguments):
    """`prepare` in another process with the small sizes of these tests, one moment per file."""
    code = f"""
import time, yaml
from mobilemoe.artifacts import load_tokenizer
from mobilemoe.train import shards
from mobilemoe.train.data import DataSource
shards.PIECE_ROWS = shards.BATCH_ROWS = 16
real = shards._write_piece
def slow(*arguments):
    time.sleep(0.02)
    return real(*arguments)
shards._write_piece = slow
source = DataSource("json", data_files={str(directory / "a.jsonl")!r})
shards.prepare([source], load_tokenizer({str(directory / "tokenizer")!r}), 64, 0, *{arguments!r})
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def contents(directory):
    return {path.name: file_sha256(path) for path in sorted(directory.glob("*/*"))}


def test_killed_and_run_again_ends_like_one_never_killed(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", numbered("a", 800, words=9))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = worker(tmp_path, str(tmp_path / "whole"))
    assert process.wait() == 0, process.stderr.read()
    source = DataSource("json", data_files=str(tmp_path / "a.jsonl"))
    killed, kept, generator = tmp_path / "shards", {}, random.Random(0)
    for _ in range(3):
        process, number = worker(tmp_path, str(killed)), len(kept) + generator.randint(2, 8)
        while process.poll() is None and len(list(killed.glob("*/*.arrow"))) < number:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        # What had been finished before was not written again.
        times = {path.name: path.stat().st_mtime_ns for path in killed.glob("*/*.arrow")}
        assert kept.items() <= times.items()
        (log,) = killed.glob(f"*/{FINISHED_FILE}")
        # As a kill in the middle of a line leaves it.
        names = [json.loads(line)["name"] for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = {name: times[name] for name in names}
        log.write_text(log.read_text() + '{"name": "0000')
        with pytest.raises(ValueError, match="It has data that are not finished. Run recipes/prepare.py"):
            Shards(str(killed), tokenizer, 64, 0).source(source)
    assert 0 < len(kept) < 50
    process = worker(tmp_path, str(killed))
    assert process.wait() == 0, process.stderr.read()
    assert contents(killed) == contents(tmp_path / "whole")
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in killed.glob("*/*.arrow")}.items()


def test_row_that_cannot_be_read_leaves_what_is_finished(tmp_path, tokenizer):
    path = Path(write(tmp_path / "a-0.jsonl", numbered("a", 30)))
    broken = path.with_name("a-1.jsonl")
    broken.write_text('{"text": "x"}\n{broken\n')
    source = DataSource("json", data_files=str(tmp_path / "a-*.jsonl"), streaming=True)
    with pytest.raises(ValueError, match="cannot be read: ArrowInvalid"):
        prepare([source], tokenizer, 64, 0, tmp_path / "shards")
    assert [path.name for path in (tmp_path / "shards").glob("*/*.arrow")] == ["000000.arrow"]
    broken.write_text('{"text": "x"}\n')
    (prepared,) = prepare([source], tokenizer, 64, 0, tmp_path / "shards")
    assert prepared.total("rows") == 31


# Refused


def test_shards_of_other_settings_are_refused(two_sources, tokenizer, tmp_path):  # noqa: F811
    prepare(two_sources, tokenizer, 64, 0, tmp_path / "shards")
    with pytest.raises(ValueError, match="with max_length=64, this run has 128: .* Run recipes/prepare.py .* restore"):
        opened(tmp_path, tokenizer, length=128).source(two_sources[0])
    with pytest.raises(ValueError, match="with seed=0, this run has 1: "):
        opened(tmp_path, tokenizer, seed=1).source(two_sources[0])
    other = train_tokenizer(iter(["x = 1\n" * 9, Path(__file__).read_text()]), 512)
    with pytest.raises(ValueError, match="with another tokenizer and max_length=64, this run has 32: "):
        opened(tmp_path, other, length=32).source(two_sources[0])
    # Every part of a tokenizer counts.
    for change in ({"eos_token": "<|eot|>"}, {"post_processor": None}):
        changed = copy.deepcopy(tokenizer)
        if "eos_token" in change:
            changed.eos_token = change["eos_token"]
        else:
            changed.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor[0]
        with pytest.raises(ValueError, match="with another tokenizer: "):
            opened(tmp_path, changed).source(two_sources[0])
    used = copy.deepcopy(tokenizer)
    used("text", truncation=True, max_length=5, padding="max_length")
    opened(tmp_path, used).source(two_sources[0])
    # The order of what is streamed is its own.
    two_sources[0].streaming = True
    with pytest.raises(ValueError, match=r"has nothing of the data source json \S+a.jsonl. Run recipes/prepare.py"):
        opened(tmp_path, tokenizer).source(two_sources[0])
    prepare(two_sources[:1], tokenizer, 64, 0, tmp_path / "shards")
    opened(tmp_path, tokenizer, seed=1).source(two_sources[0])


def test_chat_template_counts_for_conversations_only(tmp_path, chat_tokenizer):
    rows = {"text": numbered("a", 20), "chat": [{"messages": [user("a"), assistant("b")]}] * 20}
    sources = {
        name: DataSource("json", data_files=write(tmp_path / f"{name}.jsonl", each)) for name, each in rows.items()
    }
    prepare(list(sources.values()), chat_tokenizer, 64, 0, tmp_path / "shards")
    other = copy.deepcopy(chat_tokenizer)
    other.chat_template = CHAT_TEMPLATE + " "
    opened(tmp_path, other).source(sources["text"])
    with pytest.raises(ValueError, match="with another chat template: "):
        opened(tmp_path, other).source(sources["chat"])


def test_missing_truncated_and_damaged_files_are_refused(two_sources, tokenizer, tmp_path):  # noqa: F811
    prepare(two_sources, tokenizer, 64, 0, tmp_path / "shards")
    path = next((tmp_path / "shards").glob("*/000001.arrow"))
    source = next(
        each
        for each in two_sources
        if Prepared.load(path.parent / PREPARED_FILE).source["data_files"] == each.data_files
    )
    content, size = path.read_bytes(), path.stat().st_size
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"000001.arrow .* has {size - 10:,} bytes, and {size:,} were"):
        opened(tmp_path, tokenizer).source(source)
    path.unlink()
    with pytest.raises(ValueError, match=r"000001.arrow of the data source .* is missing, and .* Copy it again, or"):
        opened(tmp_path, tokenizer).source(source)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"000001.arrow cannot be read: .* Remove .* and run recipes/prepare.py"):
        opened(tmp_path, tokenizer).source(source).encode(list(range(64, 70)), 0)
    path.write_bytes(content)
    opened(tmp_path, tokenizer).source(source)
    (path.parent / PREPARED_FILE).write_text("{}")
    with pytest.raises(ValueError, match="does not hold the description of prepared data"):
        opened(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="shards=nowhere is no directory. Run recipes/prepare.py"):
        Shards("nowhere", tokenizer, 64, 0)


def test_weights_that_do_not_sum_to_one_are_refused(two_sources, tokenizer, tmp_path):  # noqa: F811
    prepare(two_sources, tokenizer, 64, 0, tmp_path / "shards")
    two_sources[0].weight = 0.4
    with pytest.raises(ValueError, match=r"\[0.4, 0.7\] sum to 1.1. Set positive weights that sum to 1"):
        Mixture(two_sources, tokenizer, 64, 0, 2, open_source=opened(tmp_path, tokenizer).source)


# Recipes


@pytest.mark.slow
def test_recipe_trains_on_shards_as_on_texts(workspace):
    def recipe(script, output, *options):
        command = [sys.executable, f"recipes/{script}.py", "--config", "tiny/pretrain", "--max_steps", "4"]
        command += ["--logging_steps", "1", "--max_length", "64", "--save_steps", "2", "--save_strategy", "steps"]
        environment = os.environ | {"HF_HOME": str(workspace / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += ["--output_dir", str(workspace / output), *options]
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)

    def succeeds(*arguments):
        result = recipe(*arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    def logs(output):
        state = json.loads((workspace / output / "trainer_state.json").read_text())
        return [(row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row]

    assert "tokens" in succeeds("prepare", "p", "--shards", "shards", "--dataset_num_proc", "2").stdout
    succeeds("pretrain", "online")
    succeeds("pretrain", "shards-run", "--shards", "shards")
    assert len(logs("online")) == 4
    assert logs("online") == logs("shards-run")
    # From the middle.
    for path in ("checkpoint-4", "model.safetensors"):
        subprocess.run(["rm", "-r", workspace / "shards-run" / path], check=True)
    succeeds("pretrain", "shards-run", "--shards", "shards", "--resume_from_checkpoint", "true")
    assert logs("online") == logs("shards-run")


def test_what_cannot_be_prepared_is_refused(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    parts = (RecipeArguments, LoRAArguments, QATArguments, SFTConfig)

    def run(stage, *options, parts=parts):
        stage(*parse_arguments(ROOT / "recipes", parts, ["--config", "recipes/tiny/pretrain.yaml", *options]))

    for options, problem in [
        ([], "shards is not set, so there is no place for what is prepared. Add --shards DIR"),
        (["--shards", "x", "--dataset_num_proc", "0"], "dataset_num_proc=0 cannot work. Set 1 or more"),
        (["--shards", "x", "--max_length", "1"], "max_length=1 is no length of a sequence. Set 2 or more"),
    ]:
        with pytest.raises(ValueError, match=problem):
            run(prepare_data, *options)
        assert not Path("x").exists()
    run(prepare_data, "--shards", "other-seed", "--seed", "5")
    with pytest.raises(ValueError, match="with seed=5, this run has 42"):
        run(pretrain, "--shards", "other-seed", "--output_dir", "refused", parts=(RecipeArguments, SFTConfig))
    # As it would have been without shards: before anything is written.
    assert not Path("refused").exists()
