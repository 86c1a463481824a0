"""The GGUF file: every number in it, and what llama.cpp makes of it where it is installed."""

import inspect
import json
import random
import shutil
import string
import unicodedata
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM

from mobilemoe.cli import main
from mobilemoe.export.relayout import Weight, relayout
from mobilemoe.export.source import Source, weights_of
from mobilemoe.runtime import CheckpointModel
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM
from modeling_mobilemoe.int4_mobilemoe import quantize_tensor


gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mobilemoe[gguf]'")

from mobilemoe.export.gguf import export_gguf, q4_0_blocks, rope_factors  # noqa: E402


def read(path) -> dict[str, tuple[str, torch.Tensor]]:
    """Types and FP32 values by name."""
    reader = gguf.GGUFReader(path / "model.gguf")
    return {
        tensor.name: (
            tensor.tensor_type.name,
            torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()),
        )
        for tensor in reader.tensors
    }


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path / "model.gguf").fields.items()}


# Ours in the new layout, and theirs; written out, as the exporter takes the names from the library.
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def expected_tensors(checkpoint) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    weights = relayout(dict(weights_of(model.state_dict(), model.config)), model.config)
    expected = {
        "token_embd.weight": weights["model.embed_tokens.weight"].float(),
        "output.weight": weights["model.embed_tokens.weight"].float(),
        "output_norm.weight": weights["model.norm.weight"].float(),
        "rope_freqs.weight": torch.from_numpy(rope_factors(model.config)),
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            expected[f"blk.{layer}.{theirs}"] = weights[f"model.layers.{layer}.{ours}"].float()
    return expected


@pytest.fixture(scope="module", params=["float_text_checkpoint", "text_checkpoint", "qat_checkpoint"])
def exported(request, tmp_path_factory):
    """A checkpoint in full precision, in the released INT4, and with experts along the input; and its GGUF."""
    output = tmp_path_factory.mktemp("gguf") / "out"
    checkpoint = request.getfixturevalue(request.param)
    main(["export", "--to", "gguf", "--model", str(checkpoint), "--output", str(output)])
    return request.param, checkpoint, output


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return 10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()).item()


def test_every_number(exported):
    kind, checkpoint, output = exported
    expected, actual = expected_tensors(checkpoint), read(output)
    assert actual.keys() == expected.keys()
    matrices = {"float_text_checkpoint": "F32", "text_checkpoint": "Q4_0", "qat_checkpoint": "Q4_0"}[kind]
    for name, (tensor_type, values) in actual.items():
        is_expert = "_exps" in name
        if "norm" in name or "rope" in name or "gate_inp" in name or "probs" in name:
            assert tensor_type == "F32", name
        else:
            assert tensor_type == ("Q8_0" if is_expert and kind == "text_checkpoint" else matrices), name
        if tensor_type == "Q8_0":
            assert sqnr(expected[name], values) > 40, name
        else:
            assert torch.equal(values, expected[name]), name
    rounding = json.loads((output / "export.json").read_text())["rounding"]
    assert rounding.pop("experts") == "bit-exact" or kind == "text_checkpoint"
    assert set(rounding.values()) == {"bit-exact"}


def test_integers_and_scales_go_through():
    """Not only their product: a block is the scale's two bytes, then element i beside element i + 16, from -8 on."""
    values, scale = quantize_tensor(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    blocks = torch.from_numpy(q4_0_blocks(Weight(values, scale))).unflatten(-1, (2, 18))
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0], scale)
    for block, integers in zip(blocks.flatten(0, 1), values.view(-1, 32), strict=True):
        for i in range(16):
            assert block[2 + i].item() == (integers[i].item() + 8) | (integers[i + 16].item() + 8) << 4


def test_metadata(exported):
    kind, _, output = exported
    found = fields(output)
    assert found["general.architecture"] == "exaone-moe"
    # A scalar: as a list older loaders drop it, and no layer would rotate.
    pattern = gguf.GGUFReader(output / "model.gguf").fields["exaone-moe.attention.sliding_window_pattern"]
    assert (pattern.types, pattern.contents()) == ([gguf.GGUFValueType.UINT32], 0)
    assert found["exaone-moe.attention.sliding_window"] == found["exaone-moe.context_length"] == 256
    assert found["exaone-moe.expert_gating_func"] == 2
    assert found["exaone-moe.expert_weights_scale"] == 2.5
    assert found["exaone-moe.expert_weights_norm"] is True
    assert found["exaone-moe.expert_shared_feed_forward_length"] == 128
    assert found["exaone-moe.rope.scaling.type"] == "none"
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smaug-bpe"
    assert found["tokenizer.ggml.bos_token_id"] == 496
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (497, 504)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert len(found["tokenizer.ggml.tokens"]) == 512
    assert found["tokenizer.ggml.token_type"][495:497] == [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL]
    assert ("tokenizer.chat_template" in found) == (kind != "base")


def test_rope_factors_of_other_rules():
    assert rope_factors(MobileMoEConfig(rope_scaling={"rope_type": "linear", "factor": 4.0})).tolist() == [4.0] * 32
    with pytest.raises(ValueError, match="leaves some channels unrotated"):
        rope_factors(MobileMoEConfig(rope_scaling={"rope_type": "proportional", "partial_rotary_factor": 0.5}))


def test_rope_factors_of_the_release():
    """Pairs 0 to 17 keep their frequency, the others are divided by 16 (released configs)."""
    assert rope_factors(MobileMoEConfig()).tolist() == [1.0] * 18 + [16.0] * 14


@pytest.mark.parametrize(
    ("weights", "expert_weights", "types"),
    [("q4_0", "bf16", ("Q4_0", "BF16")), ("bf16", None, ("BF16", "BF16")), ("f32", None, ("F32", "F32"))],
)
def test_types_of_a_packed_checkpoint(weights, expert_weights, types, text_checkpoint, tmp_path):
    export_gguf(text_checkpoint, tmp_path / "out", weights, expert_weights)
    found = read(tmp_path / "out")
    assert (found["blk.0.attn_q.weight"][0], found["blk.0.ffn_up_exps.weight"][0]) == types
    rounding = json.loads((tmp_path / "out/export.json").read_text())["rounding"]
    # FP16 scales do not fit BF16.
    assert (rounding["experts"] == "bit-exact") == (types[1] == "F32")
    assert (rounding["attention"] == "bit-exact") == (types[0] != "BF16")


def test_full_precision_to_q4_0_by_the_papers_rule(float_text_checkpoint, tmp_path):
    export_gguf(float_text_checkpoint, tmp_path / "out", "q4_0")
    found = read(tmp_path / "out")
    expected = expected_tensors(float_text_checkpoint)
    for name in ("blk.1.attn_q.weight", "blk.1.ffn_down_exps.weight", "token_embd.weight"):
        tensor_type, values = found[name]
        assert tensor_type == "Q4_0"
        integers, scale = quantize_tensor(expected[name])
        assert torch.equal(values, Weight(integers, scale).float()), name
    assert "dB" in json.loads((tmp_path / "out/export.json").read_text())["rounding"]["attention"]


def test_bf16_stays_bf16(float_text_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(float_text_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(float_text_checkpoint / name, tmp_path / "bf16")
    export_gguf(tmp_path / "bf16", tmp_path / "out")
    assert read(tmp_path / "out")["blk.0.ffn_up_exps.weight"][0] == "BF16"
    rounding = json.loads((tmp_path / "out/export.json").read_text())["rounding"]
    assert set(rounding.values()) == {"bit-exact"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": "out.gguf"}, "is made a directory"),
        ({"weights": "q5_k"}, "weights='q5_k' is not written here. Set f32 or bf16 or q4_0"),
        ({"expert_weights": "q4_0"}, "expert_weights='q4_0' is not written here. Set q8_0 or bf16"),
        ({"weights": "bf16", "expert_weights": "q8_0"}, "here all matrices are bf16. Leave it out"),
    ],
)
def test_refused_options(options, message, text_checkpoint, tmp_path):
    output = tmp_path / options.pop("output_dir", "out")
    with pytest.raises(ValueError, match=message):
        export_gguf(text_checkpoint, output, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
            "the splits of",
        ),
        (lambda content: content.update(normalizer={"type": "NFC"}), "the splits of Llama 3"),
    ],
)
def test_another_tokenizer_is_refused(change, message, text_checkpoint, tmp_path):
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    change(content)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        export_gguf(checkpoint, tmp_path / "out")


def test_more_ends_than_a_file_names(text_checkpoint, tmp_path):
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text()) | {"eos_token_id": [497, 498, 504]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"The ids \[498\] end a sequence"):
        export_gguf(checkpoint, tmp_path / "out")


def strings(count: int) -> list[str]:
    """Code, runs of whitespace, digits, Unicode of all planes, emoji with joiners, special tokens, mixtures."""
    generator = random.Random(0)
    lines = [line for module in (inspect, shutil, string) for line in inspect.getsource(module).splitlines(True)]
    assigned = [chr(i) for i in range(0x20, 0x1FAFF) if unicodedata.category(chr(i))[0] not in "C"]
    emoji = ["😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "✅", "🦙", "é", "e\u0301", "ﷺ", "한국어", "日本語", "हिन्दी", "\u200d"]
    special = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|unknown|>"]
    blanks = [" ", "  ", "\t", "\n", "\r\n", "\n\n\n", "   \n  ", "\u00a0", "\u3000", " " * 30]
    kinds = [
        lambda: generator.choice(lines),
        lambda: "".join(generator.choices(lines, k=3)),
        lambda: "".join(generator.choices(string.printable, k=generator.randrange(1, 40))),
        lambda: "".join(generator.choices(assigned, k=generator.randrange(1, 12))),
        lambda: "".join(generator.choices(emoji + blanks + ["a", "'S", "'re", "12345", "..."], k=8)),
        lambda: "".join(generator.choices(blanks, k=6)),
        lambda: "".join(generator.choices(special + blanks + lines[:50], k=5)),
    ]
    return [generator.choice(kinds)() for _ in range(count)]


@pytest.fixture(scope="module")
def llama(exported):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    file = str(exported[2] / "model.gguf")
    # One sequence with every logit; a second batch of one token each, as decoding is.
    with closing(llama_cpp.Llama(file, n_ctx=256, logits_all=True, n_gpu_layers=0, verbose=False, **cache)) as llama:
        yield llama


def test_llama_cpp_computes_the_model(exported, llama):
    kind, checkpoint, _ = exported
    tokens = torch.randint(3, 490, (1, 200), generator=torch.Generator().manual_seed(3))
    model = CheckpointModel(checkpoint, dtype=torch.float32)
    expected = model.all_logits(tokens[0].tolist())
    llama.reset()
    llama.eval(tokens[0, :150].tolist())
    for token in tokens[0, 150:].tolist():
        llama.eval([token])
    actual = torch.from_numpy(llama.scores[:200].copy())
    if kind == "float_text_checkpoint":
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    else:
        # It rounds activations to 8 bits where weights have 4 or 8.
        assert torch.cosine_similarity(actual, expected).median() > 0.999


def test_llama_cpp_generates_the_same(exported, llama):
    kind, checkpoint, _ = exported
    if kind != "float_text_checkpoint":
        pytest.skip("activations are rounded, so near-ties may fall otherwise")
    model = CheckpointModel(checkpoint, dtype=torch.float32)
    for prompt, chat in (("import argparse", False), ("What does it do?", True)):
        tokens = model.encode(prompt, chat=chat)
        produced = []
        for token in llama.generate(tokens, temp=0, reset=True):
            if token in model.eos_ids or len(produced) == 60:
                break
            produced.append(token)
        assert produced == list(model.generate(tokens, 60))


def test_llama_cpp_splits_text_the_same(exported, llama):
    tokenizer = Source(exported[1], exported[2] / "nothing").tokenizer
    for text in strings(10_000 if exported[0] == "text_checkpoint" else 100):
        expected = tokenizer(text).input_ids
        # A text that begins with BOS gets no second one in either.
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == expected, repr(text)
    assert llama.token_eos() == 497


def test_llama_cpp_knows_the_template(exported, llama):
    template = llama.metadata["tokenizer.chat_template"]
    assert "<|header_start|>" in template


def test_licence_and_merges_of_llama_3(text_checkpoint, tmp_path):
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: fair-noncommercial\n---\n")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    export_gguf(checkpoint, tmp_path / "out")
    found = fields(tmp_path / "out")
    assert (found["general.license"], found["general.license.name"]) == ("other", "fair-noncommercial")
    assert found["general.name"] == "checkpoint"
    assert found["tokenizer.ggml.pre"] == "llama-bpe"


def test_rows_that_do_not_divide_into_blocks(tiny_config, tokenizer, tmp_path):
    sizes = {"intermediate_size": 48, "intermediate_size_mlp": 96, "bos_token_id": 496, "eos_token_id": 497}
    config = tiny_config.__class__(**tiny_config.to_dict() | sizes)
    MobileMoEForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="rows of 48 numbers, and q4_0 stores blocks of 32. Set"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "out", "q4_0")
    export_gguf(tmp_path / "checkpoint", tmp_path / "out")


def test_an_old_llama_cpp_costs_the_comparison_only(text_checkpoint, tmp_path, monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")

    def fail(*arguments, **options):
        raise ValueError("Failed to load model")

    monkeypatch.setattr(llama_cpp, "Llama", fail)
    export_gguf(text_checkpoint, tmp_path / "out")
    assert "does not load it (Failed to load" in json.loads((tmp_path / "out/export.json").read_text())["not_compared"]
