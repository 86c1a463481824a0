"""Two processes train as one does: under DDP and under FSDP2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe.train.sharding import save_whole


ROOT = Path(__file__).parents[1]
# One thread each: two processes of two threads would wait for each other on two cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


FSDP2 = [ROOT / "tests/fsdp2_recipe.py", ROOT / "recipes/accelerate/fsdp2.yaml"]


def run(command, cwd, **environment):
    command, environment = list(map(str, command)), ENVIRONMENT | environment
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def ddp_runs(base_checkpoint, tmp_path_factory):
    """Output directories: one process with two micro-batches a step, two with one, and two that were resumed."""
    root = tmp_path_factory.mktemp("ddp")
    rows = [{"text": f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 7)} for i in range(300)]
    (root / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "recipe.json").write_text(
        json.dumps(
            {
                "model": str(base_checkpoint),
                "data": [{"path": "json", "data_files": str(root / "code.jsonl")}],
                "num_data_readers": 2,
                "max_length": 64,
                "capacity_factor": 1.25,
                "router_z_loss_coef": 0.01,
                "max_steps": 20,
                "per_device_train_batch_size": 1,
                "learning_rate": 3e-3,
                "bf16": False,
                "activation_checkpointing": False,
                "logging_steps": 1,
                "save_steps": 9,
                "report_to": "none",
                "use_cpu": True,
            }
        )
    )
    recipe = [ROOT / "recipes/pretrain.py", "--config", root / "recipe.json"]
    run([sys.executable, *recipe, "--output_dir", "one", "--gradient_accumulation_steps", "2"], root)
    run([*TORCHRUN, *recipe, "--output_dir", "two"], root)
    (root / "resumed").mkdir()
    (root / "two/checkpoint-9").rename(root / "resumed/checkpoint-9")
    run([*TORCHRUN, *recipe, "--output_dir", "resumed", "--resume_from_checkpoint", "true"], root)
    return {name: root / name for name in ("one", "two", "resumed")}


def losses(output_dir):
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([row["loss"] for row in history if "loss" in row])


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_two_processes_equal_one_with_two_micro_batches(ddp_runs, name):
    assert len(losses(ddp_runs["one"])) == 20
    torch.testing.assert_close(losses(ddp_runs[name]), losses(ddp_runs["one"]), rtol=0, atol=1e-5)
    one, other = (load_file(ddp_runs[run] / "model.safetensors") for run in ("one", name))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=0 if "expert_bias" in key else 1e-5, msg=key)
    biases = torch.stack([tensor for key, tensor in one.items() if "expert_bias" in key])
    assert biases.unique().numel() > 2


@pytest.fixture(scope="module")
def fsdp2_runs(ddp_runs):
    """Output directories of two processes under the shipped `fsdp2.yaml`, and of two that were resumed."""
    root = ddp_runs["one"].parent
    recipe = [*FSDP2, ROOT / "recipes/pretrain.py", "--config", root / "recipe.json"]
    run([*TORCHRUN, *recipe, "--output_dir", "sharded"], root)
    (root / "sharded-resumed").mkdir()
    (root / "sharded/checkpoint-9").rename(root / "sharded-resumed/checkpoint-9")
    run([*TORCHRUN, *recipe, "--output_dir", "sharded-resumed", "--resume_from_checkpoint", "true"], root)
    return {name: root / name for name in ("sharded", "sharded-resumed")}


@pytest.mark.parametrize("name", ["sharded", "sharded-resumed"])
def test_fsdp2_equals_one_process_with_two_micro_batches(ddp_runs, fsdp2_runs, name):
    one, other = ddp_runs["one"], fsdp2_runs[name]
    torch.testing.assert_close(losses(other), losses(one), rtol=0, atol=1e-5)
    # A sharded model saves what a plain one does: its own class in config.json, and the tied head once.
    assert (other / "config.json").read_text() == (one / "config.json").read_text()
    expected, actual = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=0, atol=0 if "expert_bias" in key else 1e-5, msg=key)
    assert AutoModelForCausalLM.from_pretrained(other).num_parameters() > 0


def compare(one: Path, other: Path, atol: float) -> None:
    torch.testing.assert_close(losses(other), losses(one), rtol=0, atol=atol)
    assert losses(one).numel() == 6
    assert (other / "config.json").read_text() == (one / "config.json").read_text()
    expected, actual = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.dtype == torch.uint8:
            # A weight beside a tie is rounded to its other neighbour.
            assert (actual[key] != tensor).float().mean() < 0.002, key
        else:
            torch.testing.assert_close(actual[key], tensor, rtol=2e-3, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def answers(base_checkpoint, tmp_path_factory):
    """A directory with a recipe of fine-tuning and QAT."""
    root = tmp_path_factory.mktemp("answers")
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f"It is {2 * i + 1}."} for i in range(60)]
    (root / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(base_checkpoint),
        "data": [{"path": "json", "data_files": str(root / "answers.jsonl")}],
        "num_data_readers": 2,
        "max_length": 64,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    (root / "recipe.json").write_text(json.dumps(recipe))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("qat", []),
        ("qat", ["--distill", "0.5", "--activation_grid", "per_token"]),
        ("sft", ["--lora_scope", "dense", "--lora_rank", "4"]),
        ("sft", ["--lora_scope", "all", "--lora_rank", "4"]),
    ],
)
def test_qat_and_lora_are_the_same_under_ddp_and_fsdp2(answers, tmp_path, script, options):
    recipe = [ROOT / f"recipes/{script}.py", "--config", answers / "recipe.json", *options]
    run([sys.executable, *recipe, "--output_dir", "one", "--gradient_accumulation_steps", "2"], tmp_path)
    run([*TORCHRUN, *recipe, "--output_dir", "ddp"], tmp_path)
    run([*TORCHRUN, *FSDP2, *recipe, "--output_dir", "fsdp2"], tmp_path)
    for other in ("ddp", "fsdp2"):
        compare(tmp_path / "one", tmp_path / other, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft", "qat"])
def test_fsdp2_in_bf16_has_the_losses_of_one_process(answers, trained_model, base_checkpoint, tmp_path, script):
    # In a random model, a last bit of BF16 sends a token to other experts, and changes its loss by a percent.
    shutil.copytree(base_checkpoint, tmp_path / "trained")
    trained_model.save_pretrained(tmp_path / "trained")
    recipe = [ROOT / f"recipes/{script}.py", "--config", answers / "recipe.json", "--bf16", "true"]
    recipe += ["--model", tmp_path / "trained"]
    # Near that of S. At the learning rate of the other tests, the last bits of two processes grow to 1e-2 within six
    # steps, also under DDP.
    recipe += ["--learning_rate", "2e-5"]
    run([sys.executable, *recipe, "--output_dir", "one", "--gradient_accumulation_steps", "2"], tmp_path)
    run([*TORCHRUN, *FSDP2, *recipe, "--output_dir", "fsdp2"], tmp_path, PRECISION="bf16")
    torch.testing.assert_close(losses(tmp_path / "fsdp2"), losses(tmp_path / "one"), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_sharded_checkpoint_resumes_on_other_numbers_of_processes(ddp_runs, tmp_path):
    """Four sequences per step, whatever the number."""
    recipe = [*FSDP2, ROOT / "recipes/pretrain.py", "--config", ddp_runs["one"].parent / "recipe.json"]
    recipe += ["--num_data_readers", "4", "--max_steps", "8", "--save_steps", "4", "--resume_from_checkpoint"]

    def train(num_processes: int, output: Path, resume: str) -> torch.Tensor:
        launcher = [*TORCHRUN[:4], num_processes, *TORCHRUN[5:]]
        options = ["--gradient_accumulation_steps", 4 // num_processes, "--output_dir", output]
        run([*launcher, *recipe, resume, *options], tmp_path)
        return losses(output)

    expected = train(2, tmp_path / "begun", "false")
    for num_processes in (1, 2, 4):
        output = tmp_path / f"resumed-{num_processes}"
        shutil.copytree(tmp_path / "begun/checkpoint-4", output / "checkpoint-4")
        torch.testing.assert_close(train(num_processes, output, "true"), expected, rtol=0, atol=1e-5)


def test_whole_model_of_a_sharded_checkpoint(ddp_runs, fsdp2_runs, tmp_path):
    checkpoint = fsdp2_runs["sharded-resumed"] / "checkpoint-18"
    save_whole(checkpoint, tmp_path / "whole")
    expected = load_file(ddp_runs["two"] / "checkpoint-18/model.safetensors")
    found = load_file(tmp_path / "whole/model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0 if "expert_bias" in key else 1e-5, msg=key)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == 512
    with pytest.raises(ValueError, match="whole exists already"):
        save_whole(checkpoint, tmp_path / "whole")
    with pytest.raises(ValueError, match="no complete checkpoint of a run under FSDP2"):
        save_whole(ddp_runs["two"] / "checkpoint-18", tmp_path / "other")
