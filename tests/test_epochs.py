"""Passes over finite data: each document once an epoch, the same after a resume; evaluation and the best model."""

import itertools
import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import ROOT, run, write_jsonl
from transformers import AutoModelForCausalLM

from mobilemoe.train.data import DataSource
from mobilemoe.train.documents import IGNORED
from mobilemoe.train.epochs import Epochs


LENGTH, PER_STEP = 64, 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    rows = [{"prompt": f"What is {i} times {i}?", "completion": f"It is {i * i}."} for i in range(37)]
    return DataSource("json", data_files=write_jsonl(tmp_path / "pairs.jsonl", rows))


def take(epochs, number, process=0):
    return list(itertools.islice(epochs.sequences([process]), number))


def documents(rows):
    """The token ids of every document in some sequences, without padding."""
    found = Counter()
    for row in rows:
        starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["position_ids"])]
        for begin, end in itertools.pairwise(starts):
            if (row["labels"][begin:end] != IGNORED).any():
                found[tuple(row["input_ids"][begin:end].tolist())] += 1
    return found


def test_every_document_comes_once_in_each_epoch(source, chat_tokenizer):
    epochs = Epochs([source], chat_tokenizer, LENGTH, 0, PER_STEP)
    per_epoch = epochs.steps_per_epoch * PER_STEP
    # The last step is not full, which padding sequences make up for.
    assert 0 < per_epoch - len(epochs.bins) < PER_STEP
    rows = take(epochs, 3 * per_epoch)
    passes = [rows[start : start + per_epoch] for start in range(0, len(rows), per_epoch)]
    assert len(documents(passes[0])) == 37
    assert [set(documents(rows).values()) for rows in passes] == [{1}] * 3
    orders = [[row["input_ids"].tolist() for row in rows] for rows in passes]
    assert orders[0] != orders[1] != orders[2]
    empty = [row for row in rows if (row["labels"] == IGNORED).all()]
    assert len(empty) == 3 * (per_epoch - len(epochs.bins))


def test_processes_share_every_step(source, chat_tokenizer):
    whole = take(Epochs([source], chat_tokenizer, LENGTH, 0, PER_STEP), 24)
    parts = [take(Epochs([source], chat_tokenizer, LENGTH, 0, PER_STEP, 2), 12, process) for process in range(2)]
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(whole[::2], parts[0], strict=True))
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(whole[1::2], parts[1], strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_passes_resume_at_the_exact_sequence(source, chat_tokenizer, processes):
    arguments = ([source], chat_tokenizer, LENGTH, 0, PER_STEP)
    whole = take(Epochs(*arguments), 60)
    state = json.loads(json.dumps(Epochs(*arguments, processes).state(16 // processes)))
    rest = take(Epochs(*arguments, 1, state), 44)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(whole[16:], rest, strict=True))


def test_other_data_do_not_resume(source, chat_tokenizer, tmp_path):
    state = Epochs([source], chat_tokenizer, LENGTH, 0, PER_STEP).state(4)
    with pytest.raises(ValueError, match=r"other data \(seed, sequences_per_step changed\)"):
        Epochs([source], chat_tokenizer, LENGTH, 1, 2 * PER_STEP, 1, state)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=r"other data \(tokens changed\)"):
        Epochs([source], chat_tokenizer, LENGTH, 0, PER_STEP, 1, state)


@pytest.mark.parametrize(("change", "word"), [({"weight": 0.5}, "weight=0.5"), ({"streaming": True}, "streaming")])
def test_sources_without_an_epoch_are_refused(source, chat_tokenizer, change, word):
    with pytest.raises(ValueError, match=f"has {word}, but an epoch reads every example once"):
        Epochs([DataSource("json", data_files=source.data_files, **change)], chat_tokenizer, LENGTH, 0, PER_STEP)


# Through a recipe


@pytest.fixture
def recipe(tmp_path, tokenizer, tiny_checkpoint):
    """Two epochs of four steps, each of which is evaluated and saved."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pairs = [{"prompt": f"What is {i} plus 1?", "completion": f"It is {i + 1}."} for i in range(40)]
    tiny = yaml.safe_load((ROOT / "recipes/tiny/sft.yaml").read_text())
    del tiny["max_steps"]
    return tiny | {
        "model": str(tiny_checkpoint),
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": [{"path": "json", "data_files": write_jsonl(tmp_path / "train.jsonl", pairs[:32])}],
        "eval_data": [{"path": "json", "data_files": write_jsonl(tmp_path / "held-out.jsonl", pairs[32:])}],
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def history(directory):
    return json.loads((directory / "trainer_state.json").read_text())


def weights_equal(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The loss falls, so that the first checkpoint is the best where a greater loss is better.
FIRST_IS_BEST = {"metric_for_best_model": "loss", "greater_is_better": True}


@pytest.mark.parametrize("changes", [{}, FIRST_IS_BEST], ids=["last", "first"])
def test_best_model_is_loaded_at_the_end(recipe, tmp_path, changes):
    run(recipe | changes, tmp_path, "sft")
    state = history(tmp_path / "out")
    evaluations = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    steps = sorted(evaluations)
    bits = [row["eval_bits_per_byte"] for row in state["log_history"] if "eval_loss" in row]
    assert bits == sorted(bits, reverse=True) and bits[-1] > 0
    assert len(steps) == 3 and steps == [steps[0], 2 * steps[0], 3 * steps[0]] and state["max_steps"] == steps[-1]
    assert [row["epoch"] for row in state["log_history"] if "eval_loss" in row] == [1, 2, 3]
    assert evaluations[steps[0]] > evaluations[steps[1]] > evaluations[steps[2]]
    best = steps[0] if changes else steps[-1]
    assert weights_equal(tmp_path / "out", tmp_path / f"out/checkpoint-{best}")
    assert best == steps[-1] or not weights_equal(tmp_path / "out", tmp_path / f"out/checkpoint-{steps[-1]}")
    # The loss of the evaluation is that of the held-out answers alone.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert evaluations[best] == pytest.approx(held_out_loss(model, recipe, tmp_path), rel=0.05)


def held_out_loss(model, recipe, tmp_path):
    """Nats per token of the answers, one conversation at a time."""
    from transformers import AutoTokenizer

    tokenizer, losses = AutoTokenizer.from_pretrained(tmp_path / "out"), []
    for line in (tmp_path / "held-out.jsonl").read_text().splitlines():
        row = json.loads(line)
        user, assistant = (
            {"role": role, "content": row[key]} for role, key in (("user", "prompt"), ("assistant", "completion"))
        )
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = torch.tensor(tokenizer.apply_chat_template([user, assistant], return_dict=False))
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, whole[len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("changes", [{}, {"lora_scope": "all", "lora_rank": 4}], ids=["full", "lora"])
def test_resumed_epochs_end_as_if_never_stopped(recipe, tmp_path, changes):
    run(recipe | changes, tmp_path, "sft")
    first = min(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    again = recipe | changes | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": True}
    (tmp_path / "again").mkdir()
    for name in ("routing.jsonl", "expert_load.json"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "again" / name)
    shutil.copy(tmp_path / "out/run.json", tmp_path / "again/run.json")
    shutil.copytree(tmp_path / f"out/checkpoint-{first}", tmp_path / f"again/checkpoint-{first}")
    run(again, tmp_path, "sft")
    assert weights_equal(tmp_path / "out", tmp_path / "again")
    losses = [
        [row["eval_loss"] for row in history(tmp_path / name)["log_history"] if "eval_loss" in row]
        for name in ("out", "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_only_better_checkpoints_are_saved(recipe, tmp_path):
    changes = FIRST_IS_BEST | {"save_strategy": "best"}
    run(recipe | changes, tmp_path, "sft")
    evaluations = [
        (row["step"], row["eval_loss"]) for row in history(tmp_path / "out")["log_history"] if "eval_loss" in row
    ]
    assert len(evaluations) == 3
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert saved.name == f"checkpoint-{evaluations[0][0]}"
    # It holds its place in the data, so that a run can resume from it.
    run(recipe | changes | {"resume_from_checkpoint": True}, tmp_path, "sft")


def test_best_checkpoint_that_is_gone_is_named(recipe, tmp_path):
    run(recipe | FIRST_IS_BEST, tmp_path, "sft")
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[0])
    with pytest.raises(ValueError, match=f"{checkpoints[0].name} is the best so far, and it is gone"):
        run(recipe | FIRST_IS_BEST | {"resume_from_checkpoint": True}, tmp_path, "sft")


def test_quantization_of_epochs_loads_the_best_and_packs_it(recipe, tmp_path):
    run(recipe | {"num_train_epochs": 2}, tmp_path, "qat")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization is not None
    with pytest.raises(ValueError, match="quantize_from_step=1000 with max_steps="):
        run(recipe | {"quantize_from_step": 1000, "output_dir": str(tmp_path / "late")}, tmp_path, "qat")
