"""The stages after fine-tuning: what they learn, what they record, how they resume and stop, and what they refuse."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import ROOT
from make_sums import main as make_sums
from transformers import AutoModelForCausalLM

from mobilemoe.train import post_training
from mobilemoe.train.data import DataSource
from mobilemoe.train.post_training import distill, exact_answer, last_number, prefer, read_prompts, reinforce
from mobilemoe.train.recipe import RecipeArguments, parse_arguments
from mobilemoe.train.routing import read_routing
from modeling_mobilemoe import MobileMoEForCausalLM


STAGES = {"dpo": prefer, "grpo": reinforce, "distill": distill}


@pytest.fixture(scope="module")
def place(tiny_config, tokenizer, tmp_path_factory):
    """The working directory of the tiny recipes: two checkpoints, of which the second is the first after a change."""
    root = tmp_path_factory.mktemp("post")
    config = copy.deepcopy(tiny_config)
    config.bos_token_id, config.eos_token_id = 496, [497, 504]
    torch.manual_seed(0)
    model = MobileMoEForCausalLM(config)
    for name in ("2-midtrain", "3-sft"):
        model.save_pretrained(root / "out/demo" / name)
        tokenizer.save_pretrained(root / "out/demo" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_sums.py", str(root / "out/sums.jsonl")])
        make_sums()
    return root


@pytest.fixture(autouse=True)
def there(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(stage, output, *options, data=None):
    function, config = STAGES[stage], f"tiny/{stage}"
    if data is not None:
        config = f"{output}.yaml"
        recipe = yaml.safe_load((ROOT / f"recipes/tiny/{stage}.yaml").read_text())
        Path(config).write_text(yaml.safe_dump(recipe | {"data": [{"path": "json", "data_files": str(data)}]}))
    parts = (RecipeArguments, function.__annotations__["training_args"])
    args = ["--config", config, "--output_dir", str(output), "--disable_tqdm", "true"]
    function(*parse_arguments(ROOT / "recipes", parts, [*args, *options]))
    state = json.loads((Path(output) / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.parametrize("stage", STAGES)
def test_trains_and_records_the_load_of_the_experts(stage, tmp_path):
    log = run(stage, tmp_path / "out", "--max_steps", "3")
    assert [row["step"] for row in log] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in log)
    before = AutoModelForCausalLM.from_pretrained("out/demo/2-midtrain" if stage == "distill" else "out/demo/3-sft")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # With one reward for all completions, GRPO learns nothing; the z-loss moves the routers.
    moved = [name for name, each in after.named_parameters() if not torch.equal(each, before.get_parameter(name))]
    assert any("router" in name for name in moved)
    assert len(moved) == len(list(after.parameters())) or stage == "grpo"
    assert any(buffer.abs().max() > 0 for name, buffer in after.named_buffers() if name.endswith("expert_bias"))
    routing = read_routing(tmp_path / "out")
    assert [row["step"] for row in routing] == [1, 2, 3]
    assert all(len(row["imbalance"]) == 2 and row["dropped"] == [0, 0] for row in routing)
    assert log[-1]["load_imbalance"] == max(routing[-1]["imbalance"])
    assert (tmp_path / "out/routing.png").exists() and (tmp_path / "out/chat_template.jinja").exists()


def test_load_counts_the_tokens_that_train_and_no_generation(tmp_path):
    log = run("grpo", tmp_path / "out", "--max_steps", "1", "--gradient_accumulation_steps", "1")
    (load,) = {sum(layer) for layer in json.loads((tmp_path / "out/expert_load.json").read_text())["load"]}
    # Four experts for every token of prompts and completions, padded to the longest of each.
    row = log[0]
    assert load % (4 * 16) == 0
    assert row["num_tokens"] <= load / 4 < row["num_tokens"] + 16 * 16 + 16 * 4


def test_first_loss_of_dpo_is_that_of_a_model_equal_to_its_reference(tmp_path):
    rows = Path("out/sums.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    options = ("--max_steps", "12", "--learning_rate", "1.0e-3")
    log = run("dpo", tmp_path / "out", *options, data=tmp_path / "few.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[-1]["rewards/margins"] > 0.1


def test_distillation_comes_closer_to_its_teacher(tmp_path):
    log = run("distill", tmp_path / "out", "--max_steps", "25")
    assert sum(row["loss"] for row in log[-5:]) < 0.8 * sum(row["loss"] for row in log[:5])
    (again,) = run("distill", tmp_path / "same", "--max_steps", "1", "--model", "out/demo/3-sft")
    assert abs(again["loss"]) < 1e-6


def test_rewards_are_for_the_right_number(tmp_path, monkeypatch):
    texts = ["7", "It is 7.", "3 + 4 = 7", "7 or 8", "-7", "7.0", "1,007", "", "seven", "07"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert exact_answer(completions, ["7"] * len(texts)) == [1, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    assert last_number("costs 1,234.50 each") == last_number("1234.5")
    # What is rewarded gets more probable: one token that some completions have.
    monkeypatch.setattr(
        post_training,
        "exact_answer",
        lambda completions, answer, **columns: [float(len(each[-1]["content"]) > 30) for each in completions],
    )
    log = run("grpo", tmp_path / "out", "--max_steps", "15", "--learning_rate", "3.0e-3")
    rewards = [row["reward"] for row in log]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_ends_like_one_that_never_stopped(stage, one_thread, tmp_path):
    options = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    whole = run(stage, tmp_path / "whole", *options)
    # As a kill after the checkpoint of step 2 leaves it.
    (tmp_path / "stopped").mkdir()
    for name in ("run.json", "routing.jsonl", "checkpoint-2"):
        copy_ = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy_(tmp_path / "whole" / name, tmp_path / "stopped" / name)
    resumed = run(stage, tmp_path / "stopped", *options, "--resume_from_checkpoint", "true")
    same = ("step", "loss", "grad_norm", "load_imbalance", "router_z_loss")
    assert [[row[name] for name in same] for row in resumed] == [[row[name] for name in same] for row in whole]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        run(stage, tmp_path / "whole", *options)


@pytest.mark.parametrize("stage", STAGES)
def test_stops_before_a_step_that_is_not_finite(stage, tmp_path, monkeypatch):
    real, calls = post_training.StopsAtNonFinite._get_grad_norm, []

    def broken(self, model, grad_norm=None):
        calls.append(self.state.global_step)
        if self.state.global_step == 1:
            grad_norm = torch.tensor(math.nan)
        return real(self, model, grad_norm)

    monkeypatch.setattr(post_training.StopsAtNonFinite, "_get_grad_norm", broken)
    with pytest.raises(
        ValueError, match="stopped before step 2, which would spoil the weights: .*/checkpoint-1: start a new run"
    ):
        run(stage, tmp_path / "out", "--max_steps", "3")
    assert calls == [0, 1]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-1")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    output = tmp_path / "out"
    for stage, options, problem in [
        ("dpo", ["--capacity_factor", "1.5"], "capacity_factor=1.5 is set, and DPO has no use for it"),
        ("grpo", ["--shards", "x"], "shards=x is set, and GRPO has no use for it. Leave it out"),
        ("dpo", ["--save_only_model", "true"], "save_only_model=true"),
        ("dpo", ["--max_steps", "-1"], "Nothing says when to stop. Set max_steps"),
        ("dpo", ["--eval_strategy", "steps", "--eval_steps", "1"], "with 0 sources in eval_data"),
        ("dpo", ["--learning_rate", "nan"], "learning_rate=nan cannot work"),
        ("distill", ["--teacher_model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
    ]:
        with pytest.raises((ValueError, OSError), match=problem):
            run(stage, output, *options)
    assert not (output / "model.safetensors").exists()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource("json", data_files=str(path))


def test_rows_become_messages(tmp_path):
    turns = [{"from": "human", "value": "a"}]
    source = write(tmp_path / "a.jsonl", {"question": "a", "gold": 3, "other": 1}, {"question": "b", "gold": 4})
    source.columns = {"prompt": "question", "answer": "gold"}
    rows = read_prompts([source, write(tmp_path / "b.jsonl", {"prompt": turns, "answer": "5"})], "GRPO")
    assert rows.column_names == ["prompt", "answer"]
    assert [row["prompt"][0]["content"] for row in rows] == ["a", "b", "a"]
    assert {row["prompt"][0]["role"] for row in rows} == {"user"} and rows["answer"][:] == ["3", "4", "5"]


def test_rows_that_cannot_be_used_are_refused(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for stage, rows, problem in [
        ("DPO", [{"prompt": "a", "chosen": "b"}], r"has the columns \['prompt', 'chosen'\] in 1 rows, and DPO reads"),
        ("DPO", [good, good | {"chosen": [{"role": "user"}]}], "cannot be read|lacks role or content"),
        (
            "DPO",
            [good | {"rejected": 5}],
            "row 0, column rejected: it has int instead of a string .* Correct or",
        ),
        (
            "GRPO",
            [{"prompt": "a", "answer": "none"}],
            "row 0, column answer: it has no number, so no completion",
        ),
    ]:
        with pytest.raises(ValueError, match=problem):
            read_prompts([write(tmp_path / "a.jsonl", *rows)], stage)
    with pytest.raises(ValueError, match="names no data"):
        read_prompts([], "DPO")
    weighted = write(tmp_path / "a.jsonl", good)
    weighted.weight = 0.5
    with pytest.raises(ValueError, match="has weight=0.5, but DPO reads every row as often"):
        read_prompts([weighted], "DPO")
    with pytest.raises(ValueError, match="cannot be read: .* Repair or replace it"):
        read_prompts([DataSource("json", data_files=str(tmp_path / "none.jsonl"))], "DPO")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_script(stage, place, tmp_path):
    command = [sys.executable, ROOT / f"recipes/{stage}.py", "--config", ROOT / f"recipes/tiny/{stage}.yaml"]
    command += ["--max_steps", "2", "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out/model.safetensors").exists()
