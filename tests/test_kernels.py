"""
The C++ kernels: against FP64, against each other, and in the model.

The error bound of a product is half an INT8 step for every input: `sum_k step(k) / 2 * |q[k, n]|`, where the step is
the largest scaled input of its block over 127. Through SwiGLU it is carried by |silu'| < 1.1 and |silu(a)| <= |a|.
"""

import copy
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_mobilemoe import MobileMoEConfig, fused_mobilemoe, kernels, packed_mobilemoe, quantize
from modeling_mobilemoe.cache_mobilemoe import empty_cache
from modeling_mobilemoe.int4_mobilemoe import Int4Format, dequantize_tensor, unpack_int4
from modeling_mobilemoe.kernels import reference as reference_operators
from modeling_mobilemoe.kernels.modules import DecoderLayer, MoEFFN
from modeling_mobilemoe.modeling_mobilemoe import MobileMoERouter, apply_rotary_emb, rms_normalize
from modeling_mobilemoe.packed_mobilemoe import Int4Experts, Int4Linear, Int4Module
from modeling_mobilemoe.tiles_mobilemoe import (
    expert_tiles,
    expert_weights,
    gate_up_tiles,
    gate_up_weights,
    linear_tiles,
    linear_weights,
)


TESTS = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512", "neon", "i8mm")
# As in src/isa.h.
BLOCK = 128
# FP32 sums of some thousand terms, relative to the sum of their magnitudes.
FP32 = 1e-5

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or not kernels.available(), reason="needs a C++ compiler and CMake"
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The C interface of the library that the operators are in."""
    loaded = ctypes.CDLL(str(kernels.build_torch_library()))
    loaded.mobilemoe_isa.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def isas(library):
    """The instruction sets of this machine; whatever a test chooses, the best one is back afterwards."""
    best = library.mobilemoe_isa()
    yield [name for name in ISAS if library.mobilemoe_set_isa(name.encode()) == 0]
    library.mobilemoe_set_isa(best)


def random_experts(num_experts: int, dim: int, expert_dim: int, scale: str = "usual", seed: int = 0) -> dict:
    """Weights of `mobilemoe::moe_ffn`, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(seed)

    def scales(*shape: int) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator)
        # Every exponent that FP16 has, down to its smallest number.
        size = uniform * 0.004 + 0.002 if scale == "usual" else 2.0 ** (uniform * 39.9 - 24)
        return size.to(torch.float16)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return {
        "router": torch.randn(num_experts, dim, generator=generator) * 0.1,
        "bias": torch.randn(num_experts, generator=generator) * 0.1,
        "gate_up_qweight": integers(num_experts, dim, expert_dim),
        "gate_up_scale": scales(num_experts, dim, expert_dim // 16),
        "down_qweight": integers(num_experts, expert_dim, dim // 2),
        "down_scale": scales(num_experts, expert_dim, dim // 32),
    }


def tokens(num_tokens: int, dim: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed))


def in_tiles(weights: dict) -> list[torch.Tensor]:
    return [
        gate_up_tiles(weights["gate_up_qweight"], weights["gate_up_scale"]),
        expert_tiles(weights["down_qweight"], weights["down_scale"]),
    ]


def moe_ffn(x: torch.Tensor, weights: dict, top_k: int, route_scale: float = 2.5) -> torch.Tensor:
    router = (weights["router"], weights["bias"])
    return torch.ops.mobilemoe.moe_ffn(x, *router, *in_tiles(weights), top_k, route_scale)


def int4_linear(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.ops.mobilemoe.int4_linear(x, linear_tiles(qweight, scale), len(qweight))


def route(weights: dict, x: torch.Tensor, top_k: int, route_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (x.double() @ weights["router"].double().T).sigmoid()
    index = torch.sort(scores + weights["bias"].double(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    picked = scores.gather(1, index)
    return index, picked / (picked.sum(dim=-1, keepdim=True) + 1e-20) * route_scale


def multiply(x, x_error, qweight, scale):
    """x times a packed matrix in FP64, and the bound of the kernel's error when x is known up to `x_error`."""
    integers, scale = unpack_int4(qweight).double().abs(), scale.double()
    weight = dequantize_tensor(qweight, scale.half(), torch.float32).double()
    y = x @ weight
    error = (x_error + FP32 * x.abs()) @ weight.abs()
    for first in range(0, x.shape[1], BLOCK):
        rows = slice(first, first + BLOCK)
        # (tokens, rows, groups) -> the step of every (token, group)
        largest = (x.abs() + x_error)[:, rows, None] * scale[rows]
        step = largest.amax(dim=1) / 127
        error += step.repeat_interleave(32, dim=1) / 2 * integers[rows].sum(dim=0)
    return y, error


def reference(weights: dict, x: torch.Tensor, top_k: int, route_scale: float = 2.5):
    """The operator in FP64, and the bound of the kernel's error."""
    index, route_weights = route(weights, x, top_k, route_scale)
    out, bound = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        inputs = x[token].double()
        packed = [weights[name][expert] for name in ("gate_up_qweight", "gate_up_scale", "down_qweight", "down_scale")]
        (gate, up), (gate_error, up_error) = (
            y.chunk(2, dim=1) for y in multiply(inputs, torch.zeros_like(inputs), *packed[:2])
        )
        mid = nn.functional.silu(gate) * up
        mid_error = 1.1 * gate_error * (up.abs() + up_error) + gate.abs() * up_error + FP32 * mid.abs()
        expert_out, expert_error = multiply(mid, mid_error, *packed[2:])
        share = route_weights[token, slot, None]
        out.index_add_(0, token, expert_out * share)
        bound.index_add_(0, token, (expert_error + FP32 * expert_out.abs()) * share)
    return out, bound


def check_against_reference(weights: dict, x: torch.Tensor, top_k: int) -> None:
    actual = moe_ffn(x, weights, top_k).double()
    expected, bound = reference(weights, x, top_k)
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 64, 513])
@pytest.mark.parametrize(("dim", "expert_dim"), [(64, 32), (96, 160), (288, 416)])
def test_error_stays_within_the_int8_step(dim: int, expert_dim: int, num_tokens: int):
    weights, x = random_experts(6, dim, expert_dim), tokens(num_tokens, dim)
    check_against_reference(weights, x, top_k=2)
    expected, _ = reference(weights, x, top_k=2)
    actual = moe_ffn(x, weights, 2).double()
    # The bound is for the worst case; roundings are mostly independent.
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_large_activations_and_outliers():
    weights, x = random_experts(6, 256, 96), tokens(9, 256)
    check_against_reference(weights, x * 1e4, top_k=2)
    x[:, 17] = 1e5
    x[3, 40] = -1e7
    check_against_reference(weights, x, top_k=2)
    check_against_reference(weights, x * 1e-30, top_k=2)


def test_scales_at_the_ends_of_fp16():
    check_against_reference(random_experts(4, 160, 96, scale="wild"), tokens(9, 160) * 1e-3, top_k=2)


@pytest.mark.parametrize("num_tokens", [3, 200])
def test_all_tokens_on_one_expert_leave_the_others_empty(num_tokens: int):
    weights, x = random_experts(12, 64, 32), tokens(num_tokens, 64)
    weights["bias"] = torch.zeros(12)
    weights["bias"][7] = 10.0
    check_against_reference(weights, x, top_k=1)


def test_zero_tokens_and_zero_input():
    weights = random_experts(4, 64, 32)
    assert moe_ffn(torch.zeros(0, 64), weights, 2).shape == (0, 64)
    assert not moe_ffn(torch.zeros(3, 64), weights, 2).any()


def test_selection_follows_the_router_also_in_ties(tiny_config: MobileMoEConfig):
    """The whole operator against its experts with the choice of the model's own router."""
    weights, x = random_experts(8, 64, 32), tokens(40, 64)
    # Equal rows tie exactly: experts 1, 4 and 6 always, and 0 and 5.
    weights["router"][4] = weights["router"][6] = weights["router"][1]
    weights["router"][5] = weights["router"][0]
    weights["bias"] = torch.zeros(8)
    weights["bias"][2] = 0.5
    router = MobileMoERouter(tiny_config)
    router.weight.data = weights["router"]
    _, top_k_weights, top_k_index = router(x, weights["bias"])
    chosen = (top_k_index.contiguous(), top_k_weights.detach())
    routed = torch.ops.mobilemoe.moe_experts(x, *chosen, *in_tiles(weights))
    whole = moe_ffn(x, weights, router.top_k, router.routed_scaling_factor)
    torch.testing.assert_close(whole, routed, rtol=1e-5, atol=1e-6 * whole.abs().max().item())


def test_instruction_sets_threads_and_batches_give_the_same_bits(library, isas):
    assert len(isas) > 1
    weights = random_experts(12, 288, 160)
    x = tokens(150, 288)
    num_threads = torch.get_num_threads()
    library.mobilemoe_set_isa(b"portable")
    expected = moe_ffn(x, weights, 3)
    try:
        for name in isas:
            library.mobilemoe_set_isa(name.encode())
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(moe_ffn(x, weights, 3), expected), name
            for rows in (slice(0, 1), slice(3, 6), slice(20, 31)):
                assert torch.equal(moe_ffn(x[rows], weights, 3), expected[rows])
    finally:
        torch.set_num_threads(num_threads)


def test_a_bad_token_does_not_spread():
    weights, x = random_experts(6, 64, 32), tokens(20, 64)
    expected = moe_ffn(x, weights, 2)
    for value in (float("nan"), float("inf"), 1e38):
        x[5, 9] = value
        out = moe_ffn(x, weights, 2)
        assert not out[5].isfinite().any()
        good = torch.arange(20) != 5
        assert torch.equal(out[good], expected[good])


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 65])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 37), (160, 1), (288, 100), (768, 66)])
def test_linear_stays_within_the_int8_step(library, isas, in_features: int, out_features: int, num_tokens: int):
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out_features, in_features // 32, generator=generator) * 0.01 + 1e-4).half()
    x = tokens(num_tokens, in_features)
    weight = dequantize_tensor(qweight, scale, torch.float32).double()
    step = x.double().abs().unflatten(1, (-1, 32)).amax(dim=2).repeat_interleave(32, dim=1) / 127
    bound = step / 2 @ weight.abs().T + FP32 * (x.double().abs() @ weight.abs().T)
    results = []
    for name in isas:
        library.mobilemoe_set_isa(name.encode())
        results.append(int4_linear(x, qweight, scale))
        assert ((results[-1] - x.double() @ weight.T).abs() <= bound).all(), name
        one_by_one = [int4_linear(row, qweight, scale) for row in x]
        assert torch.equal(torch.stack(one_by_one), results[-1]), name
    assert all(torch.equal(result, results[0]) for result in results)


def random_linear(out_features: int, in_features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qweight = torch.randint(0, 256, (out_features, in_features // 2), generator=generator, dtype=torch.uint8)
    return qweight, (torch.rand(out_features, in_features // 32, generator=generator) * 0.01 + 1e-4).half()


@pytest.mark.parametrize("num_tokens", [1, 3, 65])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 32), (96, 352)])
def test_mlp_is_its_linears(library, isas, dim: int, hidden: int, num_tokens: int):
    gate, up, down = random_linear(hidden, dim, 0), random_linear(hidden, dim, 1), random_linear(dim, hidden, 2)
    x, weights = tokens(num_tokens, dim), [linear_tiles(*linear) for linear in (gate, up, down)]
    mid = nn.functional.silu(int4_linear(x, *gate).double()) * int4_linear(x, *up).double()
    expected = int4_linear(mid.float(), *down)
    results = []
    for name in isas:
        library.mobilemoe_set_isa(name.encode())
        results.append(torch.ops.mobilemoe.mlp(x, weights))
        # An integer may round the other way where SwiGLU differs in its last bit.
        torch.testing.assert_close(results[-1], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert torch.equal(results[-1], results[0]), name
        one_by_one = [torch.ops.mobilemoe.mlp(row, weights) for row in x]
        assert torch.equal(torch.stack(one_by_one), results[-1]), name


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_attention_inputs_are_linears_rotation_and_norm(library, isas, head_dim: int, num_tokens: int):
    qkv = [random_linear(heads * head_dim, 96, heads) for heads in (6, 2, 2)]
    x = tokens(num_tokens, 96)[None]
    angles = tokens(num_tokens, head_dim // 2, seed=2)[None]
    expected = [int4_linear(x, *linear).view(1, num_tokens, -1, head_dim) for linear in qkv]
    expected[:2] = (
        rms_normalize(apply_rotary_emb(states, angles.cos(), angles.sin()), 1e-5) for states in expected[:2]
    )
    results = []
    for name in isas:
        library.mobilemoe_set_isa(name.encode())
        weights = [linear_tiles(*linear) for linear in qkv]
        results.append(torch.ops.mobilemoe.attention_inputs(x, weights, 6, 2, angles.cos(), angles.sin(), 1e-5))
        torch.testing.assert_close(results[-1], tuple(expected), rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, results[-1], results[0])), name


def attend(query, keys, values, start: int, kv_cache: str = "fp32") -> torch.Tensor:
    """Attention over a new cache, which is filled first."""
    cache = empty_cache(keys.shape[2], keys.shape[3], keys.shape[1], kv_cache)
    # What lies behind the last token must not matter, whatever it is.
    cache.fill_(255)
    torch.ops.mobilemoe.update_cache(keys.contiguous(), values.contiguous(), cache, 0)
    return torch.ops.mobilemoe.attention(query, cache, start)


@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (63, 1), (252, 8), (600, 1), (0, 70), (230, 65)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 64), (4, 2, 16), (10, 2, 48)])
def test_attention_is_softmax_over_the_cache(library, isas, kv_cache, start, num_tokens, heads, kv_heads, head_dim):
    length = start + num_tokens
    query = tokens(num_tokens, heads * head_dim).view(1, num_tokens, heads, head_dim)
    keys, values = (tokens(length, kv_heads * head_dim, seed).view(1, length, kv_heads, head_dim) for seed in (2, 3))
    seen = torch.arange(length)[None] <= torch.arange(start, length)[:, None]
    cached = (states.double().transpose(1, 2) for states in (keys, values))
    exact = nn.functional.scaled_dot_product_attention(
        query.double().transpose(1, 2), *cached, attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)
    expected = reference_operators.attention(query, keys, values, start, kv_cache)
    assert (expected - exact).norm() < {"fp32": 1e-6, "bf16": 0.01, "int8": 0.03}[kv_cache] * exact.norm()
    for name in isas:
        library.mobilemoe_set_isa(name.encode())
        assert torch.equal(attend(query, keys, values, start, kv_cache), expected), name
    # Bit for bit what the last token alone gives.
    alone = attend(query[:, -1:].contiguous(), keys, values, length - 1, kv_cache)
    assert torch.equal(alone, expected[:, -1:])


def test_attention_of_extreme_scores():
    query, keys, values = (tokens(4, 32, seed).view(1, 4, 1, 32) for seed in (1, 2, 3))
    out = attend(query * 1e4, keys * 1e4, values, 0)
    best = (query[0, :, 0].double() @ keys[0, :, 0].double().T).tril().masked_fill(torch.ones(4, 4).triu(1) > 0, -1e9)
    assert torch.equal(out[0, :, 0], values[0, best.argmax(dim=1), 0])


def test_a_cache_that_does_not_fit_is_an_error_and_stays_as_it_is():
    query, keys, values = (tokens(4, 32, seed).view(1, 4, 1, 32) for seed in (1, 2, 3))
    cache = empty_cache(1, 32, 64, "int8")
    with pytest.raises(ValueError, match="positions 61 to 64 are not in a cache of 64"):
        torch.ops.mobilemoe.attention(query, cache, 61)
    with pytest.raises(ValueError, match="positions -1 to 2 are not in a cache of 64"):
        torch.ops.mobilemoe.update_cache(keys, values, cache, -1)
    with pytest.raises(ValueError, match="blocks of 4608 bytes hold no heads of 16: neither FP32, BF16 nor INT8"):
        torch.ops.mobilemoe.attention(query.view(1, 4, 2, 16), cache, 0)
    with pytest.raises(ValueError, match=r"value is Float \[1, 4, 1, 32\]"):
        torch.ops.mobilemoe.update_cache(keys.view(1, 2, 2, 32), values, cache, 0)
    with pytest.raises(ValueError, match="cache is Float"):
        torch.ops.mobilemoe.update_cache(keys, values, cache.float(), 0)
    assert not cache.any()


def test_norm_and_embedding_are_those_of_the_model(library, isas, int4_checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    norm, embedding, x = model.model.norm, model.get_input_embeddings(), tokens(40, model.config.hidden_size)
    ids = torch.arange(40)[None]
    table, results = linear_tiles(embedding.qweight, embedding.weight_scale), []
    for name in isas:
        library.mobilemoe_set_isa(name.encode())
        rows = torch.ops.mobilemoe.int4_embedding(ids, table, 512)
        assert torch.equal(rows, embedding(ids))
        results.append(torch.ops.mobilemoe.rms_norm(x, norm.weight.detach(), norm.variance_epsilon))
        torch.testing.assert_close(results[-1], norm(x).detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(results[-1], results[0]), name
    with pytest.raises(ValueError, match=r"tokens\[1\]=512 is not one of 512"):
        torch.ops.mobilemoe.int4_embedding(torch.tensor([3, 512]), table, 512)


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 32), (37, 160), (64, 96)])
def test_tiles_hold_the_integers_and_scales_of_a_checkpoint(out_features: int, in_features: int):
    linear = random_linear(out_features, in_features, 0)
    tiles = linear_tiles(*linear)
    assert tiles.shape == (-(-out_features // 32), in_features // 32, 576)
    assert all(map(torch.equal, linear_weights(tiles, out_features), linear))
    weights = random_experts(3, in_features, 32, scale="wild")
    for name, to_tiles, back in (("gate_up", gate_up_tiles, gate_up_weights), ("down", expert_tiles, expert_weights)):
        packed = (weights[f"{name}_qweight"], weights[f"{name}_scale"])
        tiles = to_tiles(*packed)
        assert tiles.is_contiguous() and tiles.numel() == sum(tensor.nbytes for tensor in packed)
        assert all(map(torch.equal, back(tiles), packed))


def test_bf16_is_the_fp32_result_rounded_once():
    weights, x = random_experts(6, 64, 32), tokens(20, 64).bfloat16()
    expected = moe_ffn(x.float(), weights, 2).bfloat16()
    assert torch.equal(moe_ffn(x, weights, 2), expected)
    linear = (weights["down_qweight"][0], weights["down_scale"][0])
    expected = int4_linear(x.float(), *linear).bfloat16()
    assert torch.equal(int4_linear(x, *linear), expected)


def test_bad_arguments_are_errors(library):
    weights, x = random_experts(4, 64, 32), tokens(3, 64)
    with pytest.raises(ValueError, match="top_k=5 does not fit 4 experts"):
        moe_ffn(x, weights, 5)
    with pytest.raises(ValueError, match="x is Half, the kernels take FP32 and BF16"):
        moe_ffn(x.half(), weights, 2)
    with pytest.raises(ValueError, match=r"router is Float \[4, 64\], not contiguous"):
        moe_ffn(x, {**weights, "router": weights["router"].T.contiguous().T}, 2)
    with pytest.raises(ValueError, match=r"down is Byte \[4, 2, 576\].* needs a contiguous Byte \[4, 3, 576\]"):
        moe_ffn(
            tokens(3, 96),
            random_experts(4, 96, 32) | {"down_qweight": weights["down_qweight"], "down_scale": weights["down_scale"]},
            2,
        )
    with pytest.raises(ValueError, match=r"the weight is Byte \[2, 1, 576\].* needs a contiguous Byte \[3, 1, 576\]"):
        torch.ops.mobilemoe.int4_linear(tokens(3, 32), linear_tiles(*random_linear(64, 32, 0)), 65)
    index = torch.tensor([[0, 1], [2, 3], [4, 0]])
    packed = in_tiles(weights)
    with pytest.raises(ValueError, match=r"top_k_index\[4\]=4 is not one of 4 experts"):
        torch.ops.mobilemoe.moe_experts(x, index, torch.ones(3, 2), *packed)
    assert library.mobilemoe_moe_ffn(None, None) == library.mobilemoe_linear(None, None) == 1
    assert library.mobilemoe_set_isa(b"mmx") == 1


def test_operators_have_shapes_for_tracing():
    weights, x = random_experts(4, 64, 32), tokens(3, 64)
    for operator, arguments in (
        (torch.ops.mobilemoe.moe_ffn, (x, weights["router"], weights["bias"], *in_tiles(weights), 2, 2.5)),
        (torch.ops.mobilemoe.int4_linear, (x, linear_tiles(*random_linear(37, 64, 0)), 37)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
def test_packed_bf16_model_runs_on_the_kernels(int4_checkpoint: Path, input_ids: torch.Tensor, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast = model(input_ids).logits.float()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("mobilemoe::")}
    layers = model.config.num_hidden_layers
    # The output projection of every layer, and the head.
    assert calls == {
        "mobilemoe::int4_embedding": 1,
        "mobilemoe::attention_inputs": layers,
        "mobilemoe::feed_forward": layers,
        "mobilemoe::int4_linear": layers + 1,
    }
    monkeypatch.setattr(packed_mobilemoe, "has_cpu_kernels", bool)
    exact = model(input_ids).logits.float()
    similarity = torch.cosine_similarity(fast, exact, dim=-1)
    # In random weights a token whose fourth and fifth expert nearly tie may take the other one.
    assert similarity.median() > 0.999
    assert not torch.equal(fast, exact)


@torch.no_grad()
def test_a_packed_model_holds_its_weights_once(int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = model.get_memory_footprint()
    logits = model(input_ids).logits
    packed = [module for module in model.modules() if isinstance(module, Int4Module)]
    assert packed and all(module.is_tiled for module in packed)
    assert model.get_memory_footprint() == size
    # What is saved, read, loaded or copied is the checkpoint's.
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (int4_checkpoint / "model.safetensors").read_bytes()
    assert torch.equal(packed[1].qweight, state["model.layers.0.self_attn.q_proj.qweight"])
    with pytest.raises(AttributeError, match="no_such_weight"):
        _ = packed[1].no_such_weight
    copied = copy.deepcopy(model)
    model.load_state_dict(state)
    assert torch.equal(model(input_ids).logits, logits) and torch.equal(copied(input_ids).logits, logits)
    exact = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16).train()(input_ids).logits
    assert torch.equal(model.train()(input_ids).logits, exact) and not any(module.is_tiled for module in packed)
    assert torch.equal(model.eval()(input_ids).logits, logits) and all(module.is_tiled for module in packed)


@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_fused_operators_equal_their_modules(int4_checkpoint: Path, length: int, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    config, layer = model.config, model.model.layers[0]
    x = tokens(2 * length, config.hidden_size).view(2, length, -1).bfloat16()
    feed_forward = layer.feed_forward(x)
    # Positions of their own for each row of the batch, and then the same ones for both.
    for position_ids in (torch.arange(2 * length).view(2, length) + 3, torch.arange(length)[None] + 500):
        cos, sin = model.model.rotary_emb(x, position_ids)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        fused = layer.self_attn.inputs(x, *projections, cos, sin)
        query, key, value = (linear(x).view(2, length, -1, config.head_dim) for linear in projections)
        query, key = (
            rms_normalize(apply_rotary_emb(states, cos, sin), config.rms_norm_eps) for states in (query, key)
        )
        for actual, expected in zip(fused, (query, key, value), strict=True):
            # At most the last bit of BF16, where FP32 sums in another order meet a tie.
            torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=2**-7, atol=0)
            assert (actual != expected.transpose(1, 2)).float().mean() < 0.01
        assert torch.equal(fused[2], value.transpose(1, 2))
    monkeypatch.setattr(fused_mobilemoe, "is_untouched", lambda *modules: False)
    expected = layer.feed_forward(x)
    # The modules round the experts' weights and each sum to BF16.
    torch.testing.assert_close(feed_forward, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
    assert not torch.equal(feed_forward, expected * 1.02)


@torch.no_grad()
def test_fused_operators_leave_the_model_to_those_who_watch_it(int4_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    logits = model(input_ids).logits
    seen = []
    feed_forward, attention = model.model.layers[0].feed_forward, model.model.layers[1].self_attn
    watched = (feed_forward.router, feed_forward.experts, feed_forward.shared_expert.up_proj, attention.k_proj)
    for module in watched:
        handle = module.register_forward_hook(lambda module, *_: seen.append(module))
        # Other roundings: a token whose fourth and fifth expert nearly tie may take the other one.
        watched_logits = model(input_ids).logits
        assert torch.cosine_similarity(watched_logits.float(), logits.float(), dim=-1).median() > 0.999
        handle.remove()
    assert tuple(seen) == watched
    assert torch.equal(model(input_ids).logits, logits)
    router_logits = model(input_ids, output_router_logits=True).router_logits
    assert len(router_logits) == model.config.num_hidden_layers


def test_fused_operators_are_not_for_training(int4_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16)
    model.requires_grad_(False)
    routers = [layer.feed_forward.router for layer in model.model.layers]
    for router in routers:
        router.weight.requires_grad_()
    model(input_ids).logits.float().square().mean().backward()
    assert all(router.weight.grad is not None and router.weight.grad.any() for router in routers)


def test_training_and_fp32_take_the_exact_path():
    linear, experts = Int4Linear(64, 32), Int4Experts(4, 64, 32, nn.SiLU())
    x = tokens(3, 64).bfloat16()
    index, route_weights = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    for inputs in (x.requires_grad_(), x.detach().float()):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear(inputs)
            experts(inputs, index, route_weights.to(inputs.dtype))
        assert not any(event.key.startswith("mobilemoe::") for event in profile.key_averages())


def test_without_a_compiler_it_warns_once(monkeypatch):
    def fail(*_, **__):
        raise kernels.BuildError("CMake is missing: pip install cmake.")

    monkeypatch.setattr(kernels, "build", fail)
    kernels.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match="correct, but slow. CMake is missing") as caught:
            assert not kernels.available()
            assert not kernels.available()
        assert len(caught) == 1
    finally:
        kernels.available.cache_clear()


def test_build_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(kernels.BuildError, match="need a C\\+\\+ compiler(.|\n)*no_such_compiler"):
        kernels.build("mobilemoe_kernels", "-DCMAKE_CXX_COMPILER=no_such_compiler")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(kernels.BuildError, match="pip install cmake"):
        kernels.build("mobilemoe_kernels")
    assert not list(tmp_path.rglob("*.so"))


def cached_build(directory):
    (path,) = directory.glob("mobilemoe/kernels/libmobilemoe_read_rate-*")
    return path


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_build_is_compiled_again(damage, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernels.build("mobilemoe_read_rate")
    content = path.read_bytes()
    caplog.clear()
    assert path == cached_build(tmp_path) and kernels.build("mobilemoe_read_rate") == path and not caplog.text
    path.write_bytes(damage(content))
    assert kernels.build("mobilemoe_read_rate").read_bytes() == content
    assert caplog.messages[0] == f"{path} is damaged and is compiled again."
    assert kernels.memory_read_rate(1) > 0


def test_without_a_cache_the_build_is_temporary(tmp_path, monkeypatch, caplog):
    # A file in the place of the directory: root may write to directories that are read-only.
    (tmp_path / "mobilemoe").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernels.build("mobilemoe_read_rate")
    assert path.is_file() and path.parent.stat().st_mode & 0o77 == 0
    assert "cannot be kept in" in caplog.text and "Set XDG_CACHE_HOME" in caplog.text
    assert kernels.build("mobilemoe_read_rate") == path


def test_a_full_cache_is_not_blamed_on_the_compiler(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    run = subprocess.run

    def fail_in_cache(command, **options):
        if str(tmp_path) in " ".join(command):
            return subprocess.CompletedProcess(command, 1, stdout="fatal error: cannot write")
        return run(command, **options)

    monkeypatch.setattr(kernels.subprocess, "run", fail_in_cache)
    monkeypatch.setattr(kernels.shutil, "disk_usage", lambda path: full)
    path = kernels.build("mobilemoe_read_rate")
    assert tmp_path not in path.parents and "No space left on device" in caplog.text


@pytest.mark.parametrize("kv_cache", ["fp32", "int8"])
@torch.no_grad()
def test_exported_program_gives_the_same_bits(int4_checkpoint: Path, kv_cache: str):
    pytest.importorskip("executorch", reason="needs the `export` extra")
    from executorch.runtime import Runtime

    from mobilemoe.export.exporter import Stages, lower
    from mobilemoe.export.program import ExportModel, ProgramOptions

    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    options = ProgramOptions(64, expert_bits=4, kv_cache=kv_cache, all_logits=True)
    module = ExportModel(model, options, MoEFFN).eval()
    kernels.load_executorch()
    program = Runtime.get().load_program(lower(module, {}, False, Stages()).buffer)
    method = program.load_method("forward")
    generator = torch.Generator().manual_seed(0)
    whole = []
    # Many tokens and few, also across the block of the cache.
    for start, length in ((0, 20), (20, 1), (21, 3), (24, 8), (32, 27), (59, 1)):
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        position = torch.tensor([start])
        (logits,) = method.execute((ids, position))
        assert torch.equal(logits, module(ids, position))
        whole.append((ids, logits))
    # What is computed in pieces is what is computed at once.
    ids, logits = (torch.cat(parts, dim=1) for parts in zip(*whole, strict=True))
    assert torch.equal(module(ids, torch.tensor([0])), logits)


def test_a_layer_that_does_not_fit_is_an_error_and_touches_nothing(int4_checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)
    layer = DecoderLayer(model.model.layers[0], 64, "int8", MoEFFN(model.model.layers[0]))
    x = tokens(3, model.config.hidden_size)[None]
    angles = torch.zeros(1, 3, model.config.head_dim // 2)
    with pytest.raises(ValueError, match="positions 62 to 64 are not in a cache of 64"):
        layer(x, angles, angles, 62)
    with pytest.raises(ValueError, match="cos is Float"):
        layer(x, angles[:, :2], angles, 0)
    layer.moe.top_k = 99
    with pytest.raises(ValueError, match="top_k=99 does not fit"):
        layer(x, angles, angles, 0)
    assert not layer.kv_cache.any()


def test_module_for_export_refuses_experts_that_the_operator_cannot_read(tiny_model):
    with pytest.raises(ValueError, match="mobilemoe::decoder_layer multiplies packed INT4 experts"):
        MoEFFN(tiny_model.model.layers[0])
    quantize(tiny_model, Int4Format("input"))
    with pytest.raises(ValueError, match="grouped along their input. Export them with llama::quantized_moe_ffn"):
        MoEFFN(tiny_model.model.layers[0])


def build_driver(directory: Path, compiler: str, *flags: str) -> Path:
    """Compiles kernels and tests/kernels_driver.cpp into one program."""
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"] if "aarch64" in compiler else []
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", *arm]
    for command in (
        ["cmake", "-S", kernels.SOURCES, "-B", directory, *options],
        ["cmake", "--build", directory, "--target", "mobilemoe_kernels", "--parallel", "2"],
        [compiler, "-std=c++17", "-O1", *flags, f"-I{kernels.SOURCES / 'include'}", TESTS / "kernels_driver.cpp"]
        + [directory / "libmobilemoe_kernels.a", "-o", directory / "driver", "-lpthread", "-ldl"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return directory / "driver"


def run_driver(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_arm_gives_the_same_bits(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    arm = run_driver(emulator, "-cpu", "max", build_driver(tmp_path / "arm", compiler, "-static"), 2000, 1)
    here = run_driver(build_driver(tmp_path / "here", "c++"), 2000, 1)
    assert arm.startswith("portable neon i8mm agree: 2000 shapes")
    assert arm.split("agree:")[1] == here.split("agree:")[1]


@pytest.mark.skipif(platform.system() != "Linux", reason="--wrap is of GNU's linker")
@pytest.mark.parametrize("sanitizer", [(), ("-fsanitize=thread",)], ids=["plain", "thread-sanitizer"])
def test_threads_take_every_unit_once_and_wait_for_none_that_has_not_begun(tmp_path, monkeypatch, sanitizer):
    source = kernels.SOURCES / "src"
    command = ["c++", "-std=c++17", "-O1", "-g", *sanitizer, f"-I{source}", f"-I{kernels.SOURCES / 'include'}"]
    command += [source / "threads.cpp", source / "errors.cpp", TESTS / "threads_driver.cpp"]
    command += ["-Wl,--wrap=pthread_create", "-o", tmp_path / "driver", "-lpthread"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    # The sanitizer does not expect threads in a child of fork; ours begins them anew.
    monkeypatch.setenv("TSAN_OPTIONS", "die_after_fork=0 halt_on_error=1")
    assert run_driver(tmp_path / "driver", 1000) == "every unit once: 1000 regions"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_of_fork_neither_hangs_nor_dies():
    """PyTorch's operators use GNU OpenMP, whose threads a child has not, and waits for them."""
    script = """
import os, signal, sys
import torch
from modeling_mobilemoe import kernels
from modeling_mobilemoe.packed_mobilemoe import Int4Linear

assert kernels.available()
torch.set_num_threads(3)
linear = Int4Linear(256, 512).eval()
x = torch.randn(64, 256).bfloat16()
with torch.no_grad():
    expected = linear(x)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if torch.equal(linear(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(x), expected)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are set up for Linux")
@pytest.mark.parametrize(
    ("flags", "num_shapes"),
    [("-fsanitize=address,undefined -fno-sanitize-recover=all", 10000), ("-fsanitize=thread", 500)],
)
def test_sanitizers_are_clean_over_fuzzed_shapes(tmp_path, monkeypatch, flags: str, num_shapes: int):
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    driver = build_driver(tmp_path, "c++", *flags.split(), "-g")
    for seed in range(2, 12):
        assert f"agree: {num_shapes} shapes" in run_driver(driver, num_shapes, seed)
