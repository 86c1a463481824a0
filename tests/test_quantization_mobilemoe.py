import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RELEASED_BLOCK
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_mobilemoe import (
    MobileMoEConfig,
    MobileMoEForCausalLM,
    MobileMoEModel,
    dequantize,
    kernels,
    packed_mobilemoe,
    quantize,
)
from modeling_mobilemoe.fused_mobilemoe import Int4AttentionInputs, Int4FeedForward
from modeling_mobilemoe.int4_mobilemoe import Int4Format, dequantize_tensor, pack_int4, quantize_tensor, unpack_int4
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEFeedForward
from modeling_mobilemoe.packed_mobilemoe import Int4Embedding, Int4Experts, Int4Linear, Int4Module
from modeling_mobilemoe.quantization_mobilemoe import MobileMoEInt4Config


# By hand: two's complement, even index in the low nibble, odd in the high one.
@pytest.mark.parametrize(
    ("values", "packed"),
    [
        ([1, 2], [0x21]),
        ([0, 7], [0x70]),
        ([7, 0], [0x07]),
        ([-1, 0], [0x0F]),
        ([0, -1], [0xF0]),
        ([-8, 7], [0x78]),
        ([7, -8], [0x87]),
        ([-8, -8, 3, -5, -1, -1], [0x88, 0xB3, 0xFF]),
        ([[0, 1, 2, 3], [-4, -3, -2, -1]], [[0x10, 0x32], [0xDC, 0xFE]]),
    ],
    ids=str,
)
def test_pack_and_unpack_vectors(values: list, packed: list):
    values, packed = torch.tensor(values, dtype=torch.int8), torch.tensor(packed, dtype=torch.uint8)
    assert pack_int4(values).dtype == torch.uint8
    assert torch.equal(pack_int4(values), packed)
    assert unpack_int4(packed).dtype == torch.int8
    assert torch.equal(unpack_int4(packed), values)


def test_every_byte_survives_unpacking():
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def naive_quantize(weight: torch.Tensor) -> tuple[list[int], list[float]]:
    """Equation 6 of the paper on one row, one group and one value at a time, in FP32 with an FP16 scale."""
    integers, scales = [], []
    for group in weight.split(32):
        largest = max(abs(np.float32(value)) for value in group.tolist())
        # The smallest FP16 number, where the scale would round to zero and could not divide.
        scale = max(np.float16(largest / np.float32(7.5)), np.float16(2**-24))
        for value in group.tolist():
            # Python rounds half to even.
            integer = round(float(np.float32(value) / np.float32(scale)))
            integers.append(max(-8, min(7, integer)))
        scales.append(float(scale))
    return integers, scales


def ramp(first: float, last: float) -> torch.Tensor:
    return torch.linspace(first, last, 32)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(96, generator=torch.Generator().manual_seed(0)),
        torch.cat((ramp(-7.5, 7.5), torch.zeros(32), ramp(-1e-3, 2e-3))),
        ramp(-1e-8, 1e-8),
        ramp(-1e-6, 1e-6),
        ramp(-4e5, 4e5),
    ],
    ids=["random", "group by group", "below the smallest scale", "subnormal scale", "near the largest scale"],
)
def test_quantize_equals_the_naive_loop(weight: torch.Tensor):
    quantized, scale = quantize_tensor(weight)
    integers, scales = naive_quantize(weight)
    assert quantized.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert quantized.tolist() == integers
    assert scale.tolist() == scales


def test_quantize_rounds_ties_to_even_and_clamps():
    ties = [7.5, -7.5, 6.5, -6.5, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5]
    quantized, scale = quantize_tensor(torch.tensor(ties + [0.0] * 22))
    assert scale.tolist() == [1.0]
    # 7.5 rounds to 8, which four bits do not hold; -8 they do.
    assert quantized[:10].tolist() == [7, -8, 6, -6, 0, 0, 2, -2, 2, -2]


def test_quantize_group_of_zeros():
    quantized, scale = quantize_tensor(torch.zeros(2, 64))
    assert quantized.count_nonzero() == 0
    assert torch.equal(scale, torch.full((2, 2), 2.0**-24, dtype=torch.float16))
    assert dequantize_tensor(pack_int4(quantized), scale, torch.float32).count_nonzero() == 0


def test_groups_run_along_the_last_dimension():
    weight = torch.ones(2, 3, 64)
    weight[1, 2, 32:] = 2.0
    quantized, scale = quantize_tensor(weight)
    assert scale.shape == (2, 3, 2)
    expected = torch.full((2, 3, 2), 1 / 7.5)
    expected[1, 2, 1] = 2 / 7.5
    assert torch.equal(scale, expected.half())
    restored = dequantize_tensor(pack_int4(quantized), scale, torch.float32)
    assert torch.equal(restored[1, 2, 32:], 2 * restored[1, 2, :32])


def test_groups_along_the_input_are_those_of_the_transpose():
    weight = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    quantized, scale = quantize_tensor(weight, dim=-2)
    assert scale.shape == (3, 2, 96)
    expected, expected_scale = quantize_tensor(weight.mT)
    assert torch.equal(quantized, expected.mT)
    assert torch.equal(scale, expected_scale.mT)
    restored = dequantize_tensor(pack_int4(quantized), scale, torch.float32, dim=-2)
    assert torch.equal(restored, dequantize_tensor(pack_int4(expected), expected_scale, torch.float32).mT)


def test_dequantizing_is_exact_in_fp32():
    quantized = torch.randint(-8, 8, (4, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).half()
    weight = dequantize_tensor(pack_int4(quantized), scale, torch.float32)
    for row in range(4):
        for column in range(96):
            assert weight[row, column].item() == quantized[row, column].item() * scale[row, column // 32].item()


@pytest.mark.parametrize("shape", [(48,), (64, 16), (2, 32, 33)], ids=str)
def test_width_must_divide_into_groups(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=f"{shape[-1]}.*last dimension.*32"):
        quantize_tensor(torch.ones(shape))


def test_input_must_divide_into_groups():
    with pytest.raises(ValueError, match="48.*input dimension.*32"):
        quantize_tensor(torch.ones(2, 48, 64), dim=-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e6])
def test_values_without_a_scale_are_refused(value: float):
    weight = torch.zeros(2, 64)
    weight[1, 40] = value
    with pytest.raises(ValueError, match="not finite or whose scale exceeds FP16"):
        quantize_tensor(weight)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.feed_forward.router.weight"])
def test_a_model_with_values_that_are_not_finite_is_not_quantized(name: str, tiny_model: MobileMoEForCausalLM):
    names = tiny_model.state_dict().keys()
    with torch.no_grad():
        tiny_model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        quantize(tiny_model)
    # Nothing was packed.
    assert tiny_model.config.quantization is None and tiny_model.state_dict().keys() == names


@pytest.mark.parametrize("token", [-1, 512])
def test_ids_outside_the_vocabulary_are_refused_alike(token: int, tiny_checkpoint: Path, int4_checkpoint: Path):
    for path in (tiny_checkpoint, int4_checkpoint):
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            with pytest.raises(ValueError, match=f"input_ids hold {token}, and the vocabulary has the ids 0 to 511"):
                model(torch.tensor([[3, token, 4]]))


def test_quantizing_a_model_of_another_width_is_refused(tiny_config: MobileMoEConfig):
    model = MobileMoEForCausalLM(MobileMoEConfig(**tiny_config.to_dict() | {"hidden_size": 48}))
    with pytest.raises(ValueError, match="48.*32"):
        quantize(model)


def once_rounded(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`integer * scale` in FP64, which is exact, rounded once."""
    scales = scale.double().repeat_interleave(32, dim=-1)
    return (unpack_int4(packed).double() * scales).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_packed_modules_use_weights_that_were_rounded_once(int4_checkpoint: Path, dtype: torch.dtype, monkeypatch):
    # In BF16 the C++ kernels would round activations too (test_kernels.py).
    monkeypatch.setattr(packed_mobilemoe, "has_cpu_kernels", bool)
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=dtype)
    embedding, linear = model.model.embed_tokens, model.model.layers[1].self_attn.k_proj
    assert (type(embedding), type(linear)) == (Int4Embedding, Int4Linear)
    token_ids = torch.tensor([[3, 511, 3], [40, 7, 1]])
    table = once_rounded(embedding.qweight, embedding.weight_scale, dtype)
    assert torch.equal(embedding(token_ids), table[token_ids])

    hidden_states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = once_rounded(linear.qweight, linear.weight_scale, dtype)
    assert torch.equal(linear(hidden_states), F.linear(hidden_states, weight))
    assert torch.equal(model.lm_head(hidden_states), F.linear(hidden_states, table))


@torch.no_grad()
def test_packed_experts_read_scales_along_the_output(tiny_config: MobileMoEConfig):
    experts = Int4Experts(2, 64, 32, nn.SiLU())
    generator = torch.Generator().manual_seed(0)
    for name, buffer in experts.named_buffers():
        random = torch.randint(0, 256, buffer.shape, generator=generator)
        buffer.copy_(random if name.endswith("qweight") else random / 2048)
    gate_up = once_rounded(experts.gate_up_qweight, experts.gate_up_scale, torch.float32)[1]  # (64, 2 * 32)
    down = once_rounded(experts.down_qweight, experts.down_scale, torch.float32)[1]  # (32, 64)
    x = torch.randn(64, generator=generator)
    gate, up = x @ gate_up[:, :32], x @ gate_up[:, 32:]
    expected = 2.5 * ((F.silu(gate) * up) @ down)
    output = experts(x[None], torch.tensor([[1]]), torch.tensor([[2.5]]))
    torch.testing.assert_close(output[0], expected)


def test_unknown_expert_axis_is_refused():
    with pytest.raises(ValueError, match="expert_axis='in' is no axis.*Set 'output'.*'input'"):
        Int4Format("in")


@torch.no_grad()
def test_checkpoint_with_experts_along_the_input(
    tiny_model: MobileMoEForCausalLM, tiny_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path
):
    originals = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    quantize(tiny_model, Int4Format("input")).save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization"]
    # Readers that know only the released grid compare this string and refuse.
    assert block == RELEASED_BLOCK | {"expert_group_axis": "in (middle dim of [E, in, out])"}
    table = tensor_table(tmp_path / "model.safetensors")
    assert table["model.layers.0.feed_forward.experts.gate_up_qweight"] == ("U8", [8, 64, 32])
    assert table["model.layers.0.feed_forward.experts.gate_up_scale"] == ("F16", [8, 64 // 32, 64])
    assert table["model.layers.0.feed_forward.experts.down_scale"] == ("F16", [8, 32 // 32, 64])

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(input_ids).logits, tiny_model(input_ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert sha256(tmp_path / "again/model.safetensors") == sha256(tmp_path / "model.safetensors")
    plain = dequantize(loaded)
    plain.set_experts_implementation("eager")
    assert torch.equal(plain(input_ids).logits, tiny_model(input_ids).logits)
    for name, parameter in plain.named_parameters():
        if "experts." in name:
            quantized, scale = quantize_tensor(originals[name].mT)
            expected = dequantize_tensor(pack_int4(quantized), scale, torch.float32).mT
        elif name.endswith(("_proj.weight", "embed_tokens.weight")):
            quantized, scale = quantize_tensor(originals[name])
            expected = dequantize_tensor(pack_int4(quantized), scale, torch.float32)
        else:
            continue
        assert torch.equal(parameter, expected), name


@torch.no_grad()
def test_head_in_chunks_equals_the_whole(int4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    # 512 rows fit into one chunk, 128,256 do not; 100 does not divide 512.
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint)
    hidden_states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = model.lm_head(hidden_states)
    monkeypatch.setattr(Int4Embedding, "chunk_size", 100)
    torch.testing.assert_close(model.lm_head(hidden_states), expected)


@torch.no_grad()
def test_packed_logits_equal_the_dequantized_model(int4_checkpoint: Path, input_ids: torch.Tensor):
    packed = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    plain = dequantize(AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32))
    plain.set_experts_implementation("eager")
    assert torch.equal(packed(input_ids).logits, plain(input_ids).logits)


def test_fused_modules_come_and_go_with_the_packed_weights(tiny_model: MobileMoEForCausalLM, int4_checkpoint: Path):
    plain_modules = {name: type(module) for name, module in tiny_model.named_modules()}
    bias = tiny_model.model.layers[0].feed_forward.expert_bias
    for model in (quantize(tiny_model), AutoModelForCausalLM.from_pretrained(int4_checkpoint)):
        for layer in model.model.layers:
            assert type(layer.feed_forward) is Int4FeedForward
            assert type(layer.self_attn.inputs) is Int4AttentionInputs
        assert {name: type(module) for name, module in dequantize(model).named_modules()} == plain_modules
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert tiny_model.model.layers[0].feed_forward.expert_bias is bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_modules_one_by_one_compute_the_plain_block(int4_checkpoint: Path, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(packed_mobilemoe, "has_cpu_kernels", bool)
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=dtype)
    packed, plain = model.model.layers[0].feed_forward, MobileMoEFeedForward(model.config)
    plain.router, plain.experts, plain.shared_expert = packed.router, packed.experts, packed.shared_expert
    plain.expert_bias.copy_(packed.expert_bias)
    hidden_states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(packed(hidden_states), plain(hidden_states))


def packed_weights(model: MobileMoEForCausalLM) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Integers and scales under the name of the parameter that they stand for."""
    buffers, weights = dict(model.named_buffers()), {}
    for name, buffer in buffers.items():
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            weights[f"{prefix}weight"] = buffer, buffers[f"{prefix}weight_scale"]
        elif name.endswith("_qweight"):
            prefix = name.removesuffix("qweight")
            weights[f"{prefix}proj"] = buffer, buffers[f"{prefix}scale"]
    return weights


def test_quantizing_a_model_keeps_every_weight_within_half_a_step(tiny_model: MobileMoEForCausalLM):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    quantize(tiny_model)
    packed = packed_weights(tiny_model)
    # The embedding, and per layer four attention, three shared and two expert weights.
    assert len(packed) == 1 + 9 * tiny_model.config.num_hidden_layers
    for name, (integers, scale) in packed.items():
        error = (once_rounded(integers, scale, torch.float32) - before[name]).abs()
        step = scale.float().repeat_interleave(32, dim=-1)
        # The scale itself was rounded to FP16: of eight steps that is 8 * 2^-11 of one.
        assert (error <= (0.5 + 2**-8) * step).all(), name
    for name, tensor in tiny_model.state_dict().items():
        if name.endswith("router.weight"):
            assert torch.equal(tensor, before[name]), name
        elif name.endswith(("norm.weight", "expert_bias")):
            assert torch.equal(tensor, before[name].bfloat16().float()), name


@torch.no_grad()
def test_quantized_in_memory_equals_what_was_saved(
    tiny_model: MobileMoEForCausalLM, int4_checkpoint: Path, input_ids: torch.Tensor
):
    quantize(tiny_model)
    loaded = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    assert torch.equal(tiny_model(input_ids).logits, loaded(input_ids).logits)


def test_dequantized_model_is_a_plain_one(int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path):
    model = dequantize(AutoModelForCausalLM.from_pretrained(int4_checkpoint))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "quantization" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    # It trains: every parameter is one again.
    loaded(input_ids, labels=input_ids).loss.backward()
    assert {name for name, parameter in loaded.named_parameters() if parameter.grad is None} == set()


def expected_tensors(config: MobileMoEConfig) -> dict[str, tuple[str, list[int]]]:
    """The tensors of the -QAT releases, for this shape."""
    hidden, width, shared = config.hidden_size, config.intermediate_size, config.intermediate_size_mlp
    experts, vocab = config.num_local_experts, config.vocab_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    tensors = {"model.norm.weight": ("BF16", [hidden])}

    def add_linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.qweight"] = ("U8", [rows, columns // 2])
        tensors[f"{name}.weight_scale"] = ("F16", [rows, columns // 32])

    add_linear("model.embed_tokens", vocab, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = ("BF16", [hidden])
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ("BF16", [hidden])
        add_linear(f"{prefix}.self_attn.q_proj", query, hidden)
        add_linear(f"{prefix}.self_attn.k_proj", key, hidden)
        add_linear(f"{prefix}.self_attn.v_proj", key, hidden)
        add_linear(f"{prefix}.self_attn.o_proj", hidden, query)
        prefix += ".feed_forward"
        tensors[f"{prefix}.router.weight"] = ("F32", [experts, hidden])
        tensors[f"{prefix}.expert_bias"] = ("BF16", [experts])
        tensors[f"{prefix}.experts.gate_up_qweight"] = ("U8", [experts, hidden, width])
        tensors[f"{prefix}.experts.gate_up_scale"] = ("F16", [experts, hidden, 2 * width // 32])
        tensors[f"{prefix}.experts.down_qweight"] = ("U8", [experts, width, hidden // 2])
        tensors[f"{prefix}.experts.down_scale"] = ("F16", [experts, width, hidden // 32])
        add_linear(f"{prefix}.shared_expert.gate_proj", shared, hidden)
        add_linear(f"{prefix}.shared_expert.up_proj", shared, hidden)
        add_linear(f"{prefix}.shared_expert.down_proj", hidden, shared)
    return tensors


def tensor_table(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}


def test_saved_tensors_are_those_of_the_format(tiny_config: MobileMoEConfig, int4_checkpoint: Path):
    table = tensor_table(int4_checkpoint / "model.safetensors")
    # 22 tensors per layer and 3 others.
    assert len(table) == 22 * tiny_config.num_hidden_layers + 3
    assert table == expected_tensors(tiny_config)


def test_cast_model_saves_the_dtypes_of_the_format(
    tiny_config: MobileMoEConfig, int4_checkpoint: Path, tmp_path: Path
):
    # The cast rounds the router too, but the file still has it in FP32.
    AutoModelForCausalLM.from_pretrained(int4_checkpoint).to(torch.bfloat16).save_pretrained(tmp_path)
    assert tensor_table(tmp_path / "model.safetensors") == expected_tensors(tiny_config)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_and_saving_keeps_the_bytes(int4_checkpoint: Path, tmp_path: Path, dtype: torch.dtype):
    AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=dtype).save_pretrained(tmp_path)
    assert sha256(tmp_path / "model.safetensors") == sha256(int4_checkpoint / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == RELEASED_BLOCK
    assert "quantization_config" not in config


def test_base_model_is_packed_too(int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path):
    causal = AutoModelForCausalLM.from_pretrained(int4_checkpoint)
    base = AutoModel.from_pretrained(int4_checkpoint)
    assert type(base) is MobileMoEModel
    assert type(base.embed_tokens) is Int4Embedding
    with torch.no_grad():
        assert torch.equal(base(input_ids).last_hidden_state, causal.model(input_ids).last_hidden_state)


@torch.no_grad()
def test_casting_keeps_the_scales(int4_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items() if "scale" in name or "qw" in name}
    model.to(torch.bfloat16)
    assert len(packed) == 2 + 18 * model.config.num_hidden_layers
    for name, tensor in packed.items():
        assert model.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(model.state_dict()[name], tensor), name
    # The cast reached what computes.
    assert model(input_ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("written", ["float32", "float16", None])
@torch.no_grad()
def test_packed_model_runs_in_the_kernels_whatever_dtype_is_written(
    int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path, written: str | None
):
    if not kernels.available():
        pytest.skip("the kernels cannot be built here")
    # As a trainer in FP32 wrote it.
    shutil.copytree(int4_checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
            model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
            model(input_ids)
            assert model.dtype == torch.bfloat16
            # The form of the weights in which the kernels read them, and only they.
            assert all(module.is_tiled for module in model.modules() if isinstance(module, Int4Module))


def test_another_dtype_than_the_kernels_take_is_kept_with_one_warning(int4_checkpoint: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match="Leave dtype out") as caught:
        model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    assert len(caught) == 1 and model.dtype == torch.float32
    # What the files hold.
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_packed_model_in_bf16_says_so(int4_checkpoint: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.skipif(not kernels.available(), reason="needs the C++ kernels")
@torch.no_grad()
def test_a_model_quantized_in_memory_runs_the_kernels_and_expands_again(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor
):
    model = quantize(tiny_model.bfloat16())
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(input_ids)
    modules = [module for module in model.modules() if isinstance(module, Int4Module)]
    assert not model.training and all(module.is_tiled for module in modules)
    expanded = dequantize(model).state_dict()
    linears = [name.removesuffix("qweight") for name in packed if name.endswith(".qweight")]
    assert len(linears) > 10
    for name in linears:
        weight = dequantize_tensor(packed[f"{name}qweight"], packed[f"{name}weight_scale"], torch.bfloat16)
        assert torch.equal(expanded[f"{name}weight"], weight)


def test_dequantizing_a_bf16_model_gives_bf16_weights(int4_checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    packed = packed_weights(model)
    parameters = dict(dequantize(model).named_parameters())
    for name, (integers, scale) in packed.items():
        assert parameters[name].dtype == torch.bfloat16, name
        assert torch.equal(parameters[name], once_rounded(integers, scale, torch.bfloat16)), name


@torch.no_grad()
def test_packed_model_never_holds_an_expanded_weight(int4_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint)
    model(input_ids)
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=2, pad_token_id=2)
    # That of k_proj, twice the size of the largest scale.
    smallest_weight = 32 * 64
    attributes = [value for module in model.modules() for value in vars(module).values()]
    held = [value for value in attributes if isinstance(value, torch.Tensor)] + [*model.parameters(), *model.buffers()]
    floating = [tensor for tensor in held if tensor.is_floating_point()]
    assert [tuple(tensor.shape) for tensor in floating if tensor.numel() >= smallest_weight] == []
    assert sum(tensor.numel() for tensor in held if tensor.dtype == torch.uint8) > smallest_weight


def test_quantizing_twice_is_refused(tiny_model: MobileMoEForCausalLM, int4_checkpoint: Path):
    quantize(tiny_model)
    with pytest.raises(ValueError, match="INT4 already"):
        quantize(tiny_model)
    with pytest.raises(ValueError, match="INT4 already"):
        quantize(AutoModelForCausalLM.from_pretrained(int4_checkpoint))


def test_dequantizing_a_plain_model_is_refused(tiny_model: MobileMoEForCausalLM, int4_checkpoint: Path):
    with pytest.raises(ValueError, match="not packed"):
        dequantize(tiny_model)
    model = dequantize(AutoModelForCausalLM.from_pretrained(int4_checkpoint))
    with pytest.raises(ValueError, match="not packed"):
        dequantize(model)


def test_released_block_is_accepted_and_written():
    assert MobileMoEInt4Config(**RELEASED_BLOCK).quant_method == "mobilemoe"


# A value of the same type and one that only compares equal: 1 is not `true`.
WRONG_VALUES = [
    ("format", "mobilemoe-int4-g64"),
    ("group_size", 64),
    ("group_size", "32"),
    ("embedding_group_size", 64),
    ("embedding_group_size", 32.0),
    ("qmin", -7),
    ("qmax", 8),
    ("symmetric", False),
    ("symmetric", 1),
    ("packed", False),
    ("packed", 1),
    ("scale_dtype", "bfloat16"),
    ("linear_group_axis", "out (first dim of [out, in])"),
    ("expert_group_axis", "in"),
    ("expert_group_axis", None),
    ("linear_group_axis", "out (last dim of [E, in, out])"),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=str)
def test_wrong_value_in_the_block_is_named(key: str, value: object):
    with pytest.raises(ValueError, match=re.escape(f" {key}={value!r}, which")):
        MobileMoEInt4Config(**RELEASED_BLOCK | {key: value})


@pytest.mark.parametrize("key", RELEASED_BLOCK)
def test_missing_key_in_the_block_is_named(key: str):
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        MobileMoEInt4Config(**{name: value for name, value in RELEASED_BLOCK.items() if name != key})


@pytest.mark.parametrize(("key", "value"), [("qmax", None), ("group_size", 64)])
def test_bad_block_stops_loading(int4_checkpoint: Path, tmp_path: Path, key: str, value: int | None):
    path = tmp_path / "checkpoint"
    shutil.copytree(int4_checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization"][key] = value
    if value is None:
        del config["quantization"][key]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prompt_lookup_of_transformers_writes_what_greedy_decoding_does(text_checkpoint: Path, dtype: torch.dtype):
    """In BF16, PyTorch's attention may round several tokens differently: texts part only where two tokens tie."""
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(output.logits.shape[1]))
    for prompt in ("import os\n" * 3, "return x\nreturn y\nreturn", "def a(b):\n    return b\n"):
        input_ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": 48, "do_sample": False, "attention_mask": torch.ones_like(input_ids)}
        expected = model.generate(input_ids, **options)[0].tolist()
        calls.clear()
        actual = model.generate(input_ids, prompt_lookup_num_tokens=7, **options)[0].tolist()
        # Verified several at once, and accepted some.
        assert max(calls[1:]) > 1 and len(calls) < len(actual) - input_ids.shape[1]
        apart = next((i for i, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]), None)
        if apart is None:
            assert actual == expected
            continue
        assert dtype == torch.bfloat16
        logits = model(torch.tensor([expected[:apart]])).logits[0, -1].float()
        between = (logits[expected[apart]] - logits[actual[apart]]).abs()
        assert between <= 4 * torch.finfo(dtype).eps * logits.abs().max()
