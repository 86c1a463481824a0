"""A stage that is killed, or stopped by a broken file, ends as if it had never stopped."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mobilemoe.artifacts import file_sha256


ROOT = Path(__file__).parents[1]
NUM_STEPS = 20
# A batch of 8 sequences is 4 of each reader, so that its second block begins with step 17.
RECIPE = {"max_length": 64, "max_steps": NUM_STEPS, "per_device_train_batch_size": 8, "num_data_readers": 2}
SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workspace(tiny_config, tokenizer, tmp_path_factory):
    """Model, tokenizer, recipe, and data of which a streamed part takes a reader from one file to the next."""
    root = tmp_path_factory.mktemp("resume")
    config = copy.deepcopy(tiny_config)
    config.bos_token_id, config.eos_token_id = 496, [497, 504]
    config.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "tokenizer")
    for part in range(4):
        write(root / f"code-{part}.jsonl", [{"text": f"def f{part}_{i}():\n    return {i}\n" * 2} for i in range(110)])
    write(root / "notes.jsonl", [{"text": f"Note {i}: the value is {i * i}."} for i in range(30)])
    recipe = yaml.safe_load((ROOT / "recipes/tiny/pretrain.yaml").read_text()) | RECIPE
    recipe |= {"model": str(root / "model"), "tokenizer": str(root / "tokenizer")}
    recipe["data"] = [
        {"path": "json", "data_files": str(root / "code-*.jsonl"), "weight": 0.75, "streaming": True},
        {"path": "json", "data_files": str(root / "notes.jsonl"), "weight": 0.25},
    ]
    (root / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    return root


def start(workspace, output_dir, *overrides, script="pretrain"):
    command = [sys.executable, ROOT / f"recipes/{script}.py", "--config", workspace / f"{script}.yaml"]
    command += ["--output_dir", output_dir, *SAVING, *overrides]
    # One thread: sums in one order, so that losses are equal to the last bit.
    environment = os.environ | {"HF_HOME": str(workspace / "hf"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    errors = Path(f"{output_dir}.stderr").open("a")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def finish(process, output_dir):
    process.communicate()
    errors = Path(f"{output_dir}.stderr").read_text()
    assert process.returncode == 0, errors[-3000:]
    return errors


def kill_after_steps(process, number):
    """As soon as the run has printed so many losses."""
    losses = 0
    for line in process.stdout:
        losses += "'loss'" in line
        if losses == number:
            break
    kill(process)


def kill_at_checkpoint(process, checkpoint):
    """As soon as the directory is there, so that its files are not, or not all."""
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.0002)
    kill(process)


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def complete(output_dir):
    """Steps of the checkpoints whose last file is whole."""
    steps = []
    for path in output_dir.glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append(json.loads(path.read_text())["global_step"])
        except json.JSONDecodeError:
            continue
    return sorted(steps)


def outcome(output_dir):
    """Logs without clock times, place in the mixture, and weights with expert biases."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    logs = [row for row in state["log_history"] if "loss" in row]
    weights = load_file(output_dir / "model.safetensors")
    last = json.loads((output_dir / f"checkpoint-{NUM_STEPS}/trainer_state.json").read_text())
    return logs, last["stateful_callbacks"]["MixtureCallback"], weights


def assert_same_outcome(output_dir, expected_dir):
    logs, place, weights = outcome(output_dir)
    expected_logs, expected_place, expected_weights = outcome(expected_dir)
    assert [row["step"] for row in logs] == list(range(1, NUM_STEPS + 1))
    assert logs == expected_logs
    assert place == expected_place
    assert set(weights) == set(expected_weights)
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, expected_weights[name])] == []
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if name.endswith("expert_bias"))


@pytest.fixture(scope="module")
def uninterrupted(workspace):
    output_dir = workspace / "uninterrupted"
    finish(start(workspace, output_dir), output_dir)
    return output_dir


def test_run_killed_three_times_ends_like_one_never_killed(workspace, uninterrupted):
    output_dir = workspace / "killed"
    resume = ("--resume_from_checkpoint", "true")
    generator = random.Random(0)
    # In the first block, before it has been used up, and in the second.
    first, second, third = generator.randint(3, 7), 2 * generator.randint(5, 6), generator.randint(1, 4)
    kill_after_steps(start(workspace, output_dir), first)
    assert complete(output_dir)
    kill_at_checkpoint(start(workspace, output_dir, *resume), output_dir / f"checkpoint-{second}")
    # What a kill in the middle of the last file leaves, whenever the one above came.
    last = output_dir / f"checkpoint-{complete(output_dir)[-1]}"
    cut_off = output_dir / f"checkpoint-{second + 2}"
    shutil.copytree(last, cut_off)
    state = (cut_off / "trainer_state.json").read_text()
    (cut_off / "trainer_state.json").write_text(state[: len(state) // 2])
    (cut_off / "optimizer.pt").unlink()
    kill_after_steps(start(workspace, output_dir, *resume), NUM_STEPS - 1 - third - int(last.name.split("-")[1]))
    assert NUM_STEPS not in complete(output_dir)
    errors = finish(start(workspace, output_dir, *resume), output_dir)
    assert f"{cut_off} is incomplete and skipped" in errors
    assert_same_outcome(output_dir, uninterrupted)


def test_broken_file_stops_a_run_that_goes_on_once_it_is_repaired(workspace, uninterrupted):
    output_dir, broken = workspace / "broken", workspace / "code-3.jsonl"
    good = broken.read_text()
    broken.write_text(good.replace("\n", "\n{broken\n", 1))
    try:
        process = start(workspace, output_dir)
        process.communicate()
    finally:
        broken.write_text(good)
    assert process.returncode == 1
    errors = Path(f"{output_dir}.stderr").read_text()
    assert re.search(r"pretrain.py: Data source json \S+code-\*\.jsonl cannot be read: ArrowInvalid", errors)
    assert "training resumes from the last checkpoint with --resume_from_checkpoint true" in errors
    # All that the whole files gave has been trained on, and the last checkpoint is there.
    assert complete(output_dir) == list(range(2, 17, 2))
    finish(start(workspace, output_dir, "--resume_from_checkpoint", "true"), output_dir)
    assert_same_outcome(output_dir, uninterrupted)


def test_run_killed_after_its_last_checkpoint_trains_no_further_step(workspace, uninterrupted):
    output_dir = workspace / "finished"
    output_dir.mkdir()
    for name in ("run.json", "routing.jsonl", "expert_load.json", f"checkpoint-{NUM_STEPS}"):
        copy_ = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy_(uninterrupted / name, output_dir / name)
    finish(start(workspace, output_dir, "--resume_from_checkpoint", "true"), output_dir)
    assert_same_outcome(output_dir, uninterrupted)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == [f"checkpoint-{NUM_STEPS}"]
    for name in ("model.safetensors", "routing.jsonl", "expert_load.json"):
        assert file_sha256(output_dir / name) == file_sha256(uninterrupted / name), name


@pytest.mark.slow
def test_killed_fine_tuning_ends_like_one_never_killed(workspace, tiny_checkpoint):
    chats = [{"prompt": f"What is {i} plus 1?", "completion": f"It is {i + 1}." if i % 5 else ""} for i in range(150)]
    write(workspace / "chat.jsonl", chats)
    recipe = yaml.safe_load((ROOT / "recipes/tiny/sft.yaml").read_text()) | RECIPE
    recipe |= {"model": str(tiny_checkpoint), "tokenizer": str(workspace / "tokenizer")}
    recipe["data"] = [{"path": "json", "data_files": str(workspace / "chat.jsonl")}]
    (workspace / "sft.yaml").write_text(yaml.safe_dump(recipe))
    expected_dir, output_dir = workspace / "sft", workspace / "sft-killed"
    finish(start(workspace, expected_dir, script="sft"), expected_dir)
    kill_after_steps(start(workspace, output_dir, script="sft"), 9)
    kill_at_checkpoint(
        start(workspace, output_dir, "--resume_from_checkpoint", "true", script="sft"), output_dir / "checkpoint-16"
    )
    finish(start(workspace, output_dir, "--resume_from_checkpoint", "true", script="sft"), output_dir)
    assert_same_outcome(output_dir, expected_dir)


@pytest.mark.slow
def test_resumed_quantization_ends_in_the_same_packed_checkpoint(workspace, tiny_checkpoint):
    write(
        workspace / "pairs.jsonl", [{"prompt": f"What is {i} plus 1?", "completion": f"{i + 1}."} for i in range(150)]
    )
    recipe = yaml.safe_load((ROOT / "recipes/tiny/qat.yaml").read_text()) | RECIPE
    recipe |= {"model": str(tiny_checkpoint), "tokenizer": str(workspace / "tokenizer"), "quantize_from_step": 4}
    recipe["data"] = [{"path": "json", "data_files": str(workspace / "pairs.jsonl")}]
    (workspace / "qat.yaml").write_text(yaml.safe_dump(recipe))
    expected_dir, output_dir = workspace / "qat", workspace / "qat-resumed"
    finish(start(workspace, expected_dir, script="qat"), expected_dir)
    # In the middle of what is trained in INT4.
    output_dir.mkdir()
    shutil.copytree(expected_dir / "checkpoint-10", output_dir / "checkpoint-10")
    finish(start(workspace, output_dir, "--resume_from_checkpoint", "true", script="qat"), output_dir)
    logs, place, weights = outcome(output_dir)
    expected_logs, expected_place, expected_weights = outcome(expected_dir)
    assert (logs, place) == (expected_logs, expected_place)
    assert any(name.endswith("qweight") and tensor.dtype == torch.uint8 for name, tensor in weights.items())
    assert weights.keys() == expected_weights.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, expected_weights[name])] == []
