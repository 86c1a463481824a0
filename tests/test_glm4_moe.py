"""The transformers-native layout computes the same function, in transformers' own class."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeForCausalLM

from mobilemoe.cli import main
from mobilemoe.export.glm4_moe import export_glm4_moe
from mobilemoe.runtime import CheckpointModel


@pytest.mark.parametrize("checkpoint", ["float_text_checkpoint", "text_checkpoint", "qat_checkpoint"])
def test_same_logits_and_tokens(checkpoint, request, tmp_path):
    checkpoint = request.getfixturevalue(checkpoint)
    main(
        ["export", "--to", "glm4_moe", "--weights", "fp32", "--model", str(checkpoint), "--output", f"{tmp_path}/glm"]
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32).eval()
    assert type(exported) is Glm4MoeForCausalLM
    model = CheckpointModel(checkpoint, dtype=torch.float32)
    # RoPE is stretched from position 64 on: to see that takes a sequence beyond it.
    tokens = torch.randint(3, 490, (1, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, actual = model.model(tokens).logits, exported(tokens).logits
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "glm")
    prompt = model.encode("import argparse", chat=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "import argparse"}], add_generation_prompt=True,
                                         return_dict=False) == prompt  # fmt: skip
    generated = exported.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
    expected = list(model.generate(prompt, 30))
    assert generated[: len(expected)].tolist() == expected
    report = json.loads((tmp_path / "glm/export.json").read_text())
    assert set(report["rounding"].values()) == {"bit-exact"}
    assert report["parity"]["sqnr_db"] > 100


def test_packed_becomes_bf16(text_checkpoint, tmp_path):
    export_glm4_moe(text_checkpoint, tmp_path / "glm")
    report = json.loads((tmp_path / "glm/export.json").read_text())
    assert report["weights"] == "bf16"
    # FP16 scales have eleven bits, BF16 has eight.
    assert report["rounding"]["router"] == "bit-exact"
    assert 50 < float(report["rounding"]["experts"].removesuffix(" dB")) < 65
    with safe_open(tmp_path / "glm/model.safetensors", framework="pt") as reader:
        dtypes = {name: reader.get_slice(name).get_dtype() for name in reader.keys()}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        f"model.layers.{layer}.mlp.gate.{name}" for layer in (0, 1) for name in ("weight", "e_score_correction_bias")
    }
    # One module for each expert, as vLLM and SGLang read them.
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in dtypes
    assert "lm_head.weight" not in dtypes


def test_config(text_checkpoint, tmp_path):
    export_glm4_moe(text_checkpoint, tmp_path / "glm")
    config = json.loads((tmp_path / "glm/config.json").read_text())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert config["n_shared_experts"] == 4
    assert config["first_k_dense_replace"] == 0
    # Under both names: runtimes read the one or the other.
    assert config["rope_parameters"]["partial_rotary_factor"] == config["partial_rotary_factor"] == 1.0
    assert config["tie_word_embeddings"] is True
    assert json.loads((tmp_path / "glm/generation_config.json").read_text())["eos_token_id"] == [497, 504]
