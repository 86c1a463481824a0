"""The operators in PyTorch against the C++ and against the model, bit for bit, at the width of the S model."""

import shutil

import pytest
import torch
from torch import nn

from mobilemoe.export.parity import reference_logits
from mobilemoe.export.program import ExportModel, ProgramOptions
from mobilemoe.export.roundings import rounded_as
from modeling_mobilemoe import kernels
from modeling_mobilemoe.kernels import reference
from modeling_mobilemoe.kernels.modules import MoEFFN
from modeling_mobilemoe.modeling_mobilemoe import apply_rotary_emb, rms_normalize
from modeling_mobilemoe.quantization_mobilemoe import dequantize_tensor, pack_int4, quantize_tensor
from modeling_mobilemoe.tiles_mobilemoe import expert_tiles, gate_up_tiles, linear_tiles


needs_kernels = pytest.mark.skipif(
    shutil.which("c++") is None or not kernels.available(), reason="needs a C++ compiler and CMake"
)
EPS = 1e-5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    integers, scale = quantize_tensor(normal(*shape, seed=seed) * 0.02)
    return pack_int4(integers), scale


def inputs_of_operators(num_tokens: int, dim: int, hidden: int, expert_dim: int, head_dim: int) -> dict[str, tuple]:
    """By operator; 12 query heads, 4 key heads and 12 experts."""
    x, angles = normal(1, num_tokens, dim), normal(1, num_tokens, head_dim // 2)
    qkv = [tensor for heads in (12, 4, 4) for tensor in packed(heads * head_dim, dim, seed=heads)]
    mlp = [*packed(hidden, dim), *packed(hidden, dim, seed=1), *packed(dim, hidden, seed=2)]
    experts = [*packed(12, dim, 2 * expert_dim), *packed(12, expert_dim, dim, seed=1)]
    return {
        "rms_norm": (x, normal(dim, seed=3), EPS),
        "int4_linear": (x, *packed(100, dim)),
        "int4_embedding": (torch.arange(9)[None], *packed(9, dim)),
        "mlp": (x, mlp),
        "attention_inputs": (x, qkv, angles.cos(), angles.sin(), EPS),
        "moe_ffn": (x[0], normal(12, dim) * 0.02, normal(12, seed=4) * 0.1, *experts, 4, 2.5),
    }


def in_tiles(name: str, arguments: tuple) -> tuple:
    """Arguments of the reference as the operator takes them."""
    x, *rest = arguments
    if name in ("int4_linear", "int4_embedding"):
        return x, linear_tiles(*rest), len(rest[0])
    if name in ("mlp", "attention_inputs"):
        weights = [linear_tiles(*pair) for pair in zip(rest[0][::2], rest[0][1::2], strict=True)]
        return (x, weights) if name == "mlp" else (x, weights, 12, 4, *rest[1:])
    if name == "moe_ffn":
        return x, *rest[:2], gate_up_tiles(*rest[2:4]), expert_tiles(*rest[4:6]), *rest[6:]
    return arguments


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [(24, 768, 1536, 384, 64), (1, 768, 1536, 384, 64), (1, 288, 352, 96, 48), (40, 96, 32, 416, 16)],
    ids=["S", "S-decode", "small-decode", "small"],
)
def test_operators_have_the_bits_of_the_reference(shape):
    for name, arguments in inputs_of_operators(*shape).items():
        expected = getattr(reference, name)(*arguments)
        actual = getattr(torch.ops.mobilemoe, name)(*in_tiles(name, arguments))
        pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
        assert all(torch.equal(*pair) for pair in pairs), name


def test_rounding_to_int8_is_the_grid():
    x = normal(50, 6, 32)
    x[3, 2], x[4, 1] = 0, 1e-35
    # Halves go to the even integer, as embeddings have them: the largest of a group is 8 scales, others are 4.
    x[5, 0, :5] = torch.tensor([127, 63.5, 62.5, -63.5, 0.5])
    integers, step = reference.round_to_int8(x)
    assert torch.equal(integers, integers.round()) and integers.abs().max() == 127
    largest = x.abs().amax(dim=-1)
    bound = 0.5001 * largest[..., None] / 127 + reference.SMALLEST
    assert ((integers * step[..., None] - x).abs() <= bound).all()
    assert not step[3, 2] and not step[4, 1] and not integers[3, 2].any() and not integers[4, 1].any()
    assert step[5, 0] == 1 and integers[5, 0, :5].tolist() == [127, 64, 62, -64, 0]


def test_elementwise_arithmetic_is_that_of_pytorch():
    """To some units in the last place; what the bits are is for the test above."""
    x, weight = normal(30, 768) * 3, normal(768, seed=1)
    torch.testing.assert_close(reference.sigmoid(x), x.sigmoid())
    torch.testing.assert_close(reference.silu_multiply(x, weight), nn.functional.silu(x) * weight)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), rms_normalize(x, EPS) * weight)
    extremes = torch.tensor([-200.0, -87, 0, 1e-8, 88, 200])
    torch.testing.assert_close(reference.exponential(extremes), extremes.clamp(-87, 88).exp())
    states, angles = normal(2, 5, 3, 48), normal(2, 5, 24, seed=1)
    expected = rms_normalize(apply_rotary_emb(states, angles.cos(), angles.sin()), EPS)
    torch.testing.assert_close(
        reference.rotate_and_normalize(states, angles.cos(), angles.sin(), EPS), expected, rtol=1e-5, atol=1e-5
    )


def test_products_are_those_of_rounded_inputs():
    """In FP64, of inputs that are already rounded."""
    x = normal(7, 288)
    integers, step = reference.round_to_int8(x.unflatten(-1, (-1, 32)))
    rounded = (integers.double() * step[..., None].double()).flatten(1)
    qweight, scale = packed(40, 288)
    expected = rounded @ dequantize_tensor(qweight, scale, torch.float32).double().T
    torch.testing.assert_close(reference.int4_linear(x, qweight, scale).double(), expected, rtol=1e-5, atol=1e-6)
    query, states = normal(2, 9, 6, 32), normal(2, 90, 2, 32, seed=1)
    seen = torch.arange(90) <= torch.arange(81, 90)[:, None]
    expected = nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), states.transpose(1, 2), states.transpose(1, 2), attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(reference.attention(query, states, states, 81), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_a_program_of_full_width_has_the_bits_of_the_model(wide_model):
    """Random weights: what a difference in the last bit would grow to is tens of dB after a few layers."""
    model = wide_model(4)
    tokens = torch.randint(0, 1024, (1, 13), generator=torch.Generator().manual_seed(1))
    prompts = [tokens[0].tolist(), tokens[0, 4:9].tolist()]
    with rounded_as(model, {"INT8 activations", "INT8 expert activations"}, 4, on_kernels=True):
        expected, shorter = reference_logits(model, prompts)
    program = ExportModel(model, ProgramOptions(max_seq_len=16, expert_bits=4, all_logits=True), MoEFFN)
    for length in (13, 1, 2, 3, 5):
        parts = [program(part, torch.tensor([i * length])) for i, part in enumerate(tokens.split(length, dim=1))]
        assert torch.equal(torch.cat(parts, dim=1)[0], expected), length
    assert torch.equal(program(tokens[:, 4:9], torch.tensor([0]))[0], shorter)
