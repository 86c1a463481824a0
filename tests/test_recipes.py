"""Every tiny recipe runs from its command line, one stage after the other, on a small part of the demo's data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mobilemoe.train.routing import read_routing
from modeling_mobilemoe.quantization_mobilemoe import INT4_BLOCK


ROOT = Path(__file__).parents[1]
STAGES = {"pretrain": "pretrain", "midtrain": "pretrain", "sft": "sft", "qat": "qat"}


def run_recipe(workspace, script, config, *overrides):
    # The workspace's own copy, whose `tiny` is smaller.
    command = [sys.executable, f"recipes/{script}.py", "--config", config]
    environment = os.environ | {"HF_HOME": str(workspace / "hf"), "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *overrides], cwd=workspace, env=environment, capture_output=True, text=True)


def test_four_stages_end_in_a_packed_checkpoint(workspace):
    previous = None
    for number, (stage, script) in enumerate(STAGES.items(), start=1):
        config = f"recipes/tiny/{stage}.yaml"
        result = run_recipe(workspace, script, config, "--max_steps", "3", "--logging_steps", "1")
        assert result.returncode == 0, result.stderr[-3000:]
        output = workspace / f"out/demo/{number}-{stage}"
        losses = [row["loss"] for row in json.loads((output / "trainer_state.json").read_text())["log_history"][:3]]
        assert len(losses) == 3
        load = json.loads((output / "expert_load.json").read_text())
        assert len(load["load"]) == 2
        assert [row["step"] for row in read_routing(output)] == [1, 2, 3]
        assert (output / "routing.png").exists()
        model = AutoModelForCausalLM.from_pretrained(output)
        if previous is not None and stage != "qat":
            moved = [
                not torch.equal(parameter, previous.get_parameter(name))
                for name, parameter in model.named_parameters()
            ]
            assert all(moved), stage
        previous = model
    assert model.config.quantization == INT4_BLOCK
    assert (output / "chat_template.jinja").exists()
    # Base checkpoints have no chat template.
    assert not (workspace / "out/demo/1-pretrain/chat_template.jinja").exists()


def test_lora_leaves_an_adapter_and_the_merged_model(workspace):
    options = ("--max_steps", "2", "--lora_scope", "all", "--lora_budget", "40000", "--output_dir", "out/lora")
    result = run_recipe(workspace, "sft", "tiny/sft", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "self_attn.q_proj" in result.stdout and "trainable: 3" in result.stdout
    base = AutoModelForCausalLM.from_pretrained(workspace / "out/demo/2-midtrain")
    merged = AutoModelForCausalLM.from_pretrained(workspace / "out/lora")
    adapted = PeftModel.from_pretrained(base, workspace / "out/lora/adapter")
    input_ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        logits = merged(input_ids).logits
        assert (logits - adapted(input_ids).logits).abs().max() <= 1e-5 * logits.abs().max()
        with adapted.disable_adapter():
            assert (logits - adapted(input_ids).logits).abs().max() > 1e-4
    # QAT goes on from it.
    options = ("--max_steps", "2", "--model", "out/lora", "--output_dir", "out/lora-qat")
    result = run_recipe(workspace, "qat", "tiny/qat", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "INT8 per 32 inputs, as the head" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(workspace / "out/lora-qat").config.quantization == INT4_BLOCK


def test_lora_over_a_packed_model_leaves_the_adapter(workspace):
    """TRL's loss reads the packed head as a matrix; the packed tensors themselves do not change."""
    options = ("--max_steps", "2", "--model", "out/demo/4-qat", "--output_dir", "out/qlora")
    result = run_recipe(workspace, "sft", "tiny/sft", *options)
    assert result.returncode != 0 and "purely quantized" in result.stderr
    result = run_recipe(workspace, "sft", "tiny/sft", *options, "--lora_scope", "dense", "--lora_rank", "4")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (workspace / "out/qlora/adapter/adapter_model.safetensors").exists()
    assert not (workspace / "out/qlora/model.safetensors").exists()


def test_unknown_field_stops_before_any_step(workspace, tmp_path):
    config = yaml.safe_load((ROOT / "recipes/tiny/pretrain.yaml").read_text()) | {"learning_rat": 1}
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    result = run_recipe(workspace, "pretrain", tmp_path / "typo.yaml")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("pretrain.py: ")
    assert "typo.yaml: the key learning_rat is no field of this recipe. Did you mean learning_rate?" in result.stderr
    assert result.returncode == 1 and "Traceback" not in result.stderr
