"""
The operators once more, in PyTorch alone: the definition that the C++ is tested against, bit for bit.

FP32 in and out. Whatever is rounded or summed here happens in the places and in the order that src/isa.h states, and
nowhere else: products of integers are exact, and no sum is left to a library, whose order may change with the shape.
Shapes as in include/mobilemoe.h. It computes every operator in many small steps, so it is for tests and comparisons.
"""

import math

import torch
from torch import nn

from ..int4_mobilemoe import Int4Format, dequantize_tensor, unpack_int4


# As in src/isa.h and src/vectors.h.
BLOCK = 128  # inputs of an expert that share an INT8 step
NUM_SUMS = 4  # FP32 sums of a linear's output
LANES = 16
KEYS = 64  # of a block of the cache
SEGMENT = 256  # keys that have a softmax of their own
SMALLEST = 2.0**-100  # below it a group of inputs counts as zero
ROWS = 8192  # of a linear, multiplied at a time


def round_to_int8(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rounds groups of activations, which lie along the last dimension, to INT8 with one step for each.

    Returns:
        Integers of -127 to 127 in FP32, of the same shape, and the steps, without the last dimension. Their product is
        the rounded value.
    """
    largest = inputs.abs().amax(dim=-1)
    is_zero = largest <= SMALLEST
    # By the reciprocal, half to even. `127 / largest` would be a product with 1 / largest in PyTorch, rounded twice.
    inverse = torch.where(is_zero, 0, torch.full_like(largest, 127) / largest)
    return (inputs * inverse[..., None]).round(), torch.where(is_zero, 0, largest / 127)


def sum_lanes(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension: every sixteenth value to one of 16 sums, in order, and those by halves."""
    padded = nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    lanes = torch.zeros_like(padded[..., :LANES])
    for part in padded.split(LANES, dim=-1):
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        first, second = lanes.chunk(2, dim=-1)
        lanes = first + second
    return lanes[..., 0]


def inverse_norm(squares: torch.Tensor, num_channels: int, eps: float) -> torch.Tensor:
    mean = sum_lanes(squares) / num_channels
    # PyTorch's FP32 square root may be wrong in the last bit; rounded from FP64 it is right.
    return 1 / (mean + eps).double().sqrt().float()


def exponential(x: torch.Tensor) -> torch.Tensor:
    """Cephes' `expf`: a polynomial after the reduction to a power of two."""
    x = x.clamp(-87, 88)
    n = (x * 1.44269504088896341).round()
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + r + 1
    return p * ((n.int() + 127) << 23).view(torch.float32)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + exponential(-x))


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + exponential(-gate)) * up


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * inverse_norm(x * x, x.shape[-1], eps)[..., None] * weight


def rotate_and_normalize(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """`states` of shape `(B, T, heads, D)`, `cos` and `sin` of shape `(B, T, D / 2)`."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    real, imaginary = even * cos - odd * sin, even * sin + odd * cos
    scale = inverse_norm(real * real + imaginary * imaginary, states.shape[-1], eps)
    return torch.stack((real, imaginary), dim=-1).flatten(-2) * scale[..., None]


def int4_linear(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    integers, step = round_to_int8(x.flatten(0, -2).unflatten(-1, (-1, Int4Format.group_size)))
    out = []
    for rows, scales in zip(qweight.split(ROWS), scale.float().split(ROWS), strict=True):
        weight = unpack_int4(rows).float().unflatten(-1, (-1, Int4Format.group_size))  # (N, K / 32, 32)
        sums = torch.zeros(NUM_SUMS, len(integers), len(rows))
        for g in range(weight.shape[1]):
            # At most 32 * 127 * 8: an integer in FP32, whatever the order.
            products = integers[:, g] @ weight[:, g].T
            sums[g % NUM_SUMS] += products * (scales[:, g] * step[:, g, None])
        out.append(((sums[0] + sums[1]) + sums[2]) + sums[3])
    return torch.cat(out, dim=-1).view(*x.shape[:-1], -1)


def int4_embedding(tokens: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dequantize_tensor(qweight[tokens], scale[tokens], torch.float32)


def mlp(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    gate, gate_scale, up, up_scale, *down = weights
    return int4_linear(silu_multiply(int4_linear(x, gate, gate_scale), int4_linear(x, up, up_scale)), *down)


def attention_inputs(
    x: torch.Tensor, qkv: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (
        int4_linear(x, qweight, scale).unflatten(-1, (-1, 2 * cos.shape[-1]))
        for qweight, scale in zip(qkv[::2], qkv[1::2], strict=True)
    )
    return rotate_and_normalize(query, cos, sin, eps), rotate_and_normalize(key, cos, sin, eps), value


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, kv_cache: str = "fp32"
) -> torch.Tensor:
    """
    `query` of shape `(B, T, heads, D)` over `(B, S, KV heads, D)`, S at least `start + T`, which are rounded to what a
    cache of this kind holds.

    Keys are taken in segments of 256. In each, softmax goes over blocks of 64 keys; with the largest score so far,
    earlier sums are corrected. Segments are merged in order in the same way. With values in INT8, a block's
    probabilities times the values' steps are rounded to INT8 too.
    """
    length, head_dim = query.shape[1], query.shape[-1]
    group = query.shape[2] // keys.shape[2]
    keys, values = (states[:, : start + length].repeat_interleave(group, dim=2) for states in (keys, values))
    query, keys, values = (states.transpose(1, 2) for states in (query, keys, values))  # (B, N, T or S, D)
    scale = 1 / torch.tensor(math.sqrt(head_dim), dtype=torch.float32)
    if kv_cache == "bf16":
        keys, values = keys.bfloat16().float(), values.bfloat16().float()
    if kv_cache == "int8":
        (query, query_step), (keys, key_step), (values, value_step) = map(round_to_int8, (query, keys, values))
        # At most 127 * 127 * D: exact in FP64, as in INT32.
        products = (query.double() @ keys.double().mT).float()
        scores = products * (key_step[:, :, None] * (query_step * scale)[..., None])
    else:
        scores = torch.zeros(*query.shape[:3], keys.shape[2])
        for d in range(head_dim):
            scores = scores + keys[:, :, None, :, d] * query[..., d, None]
        scores = scores * scale
    positions = torch.arange(start, start + length)[:, None]
    seen = torch.arange(keys.shape[2]) <= positions  # (T, S)
    scores = scores.masked_fill(~seen, -torch.inf)

    def empty() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = torch.zeros(query.shape[:3])
        return torch.full_like(total, -torch.inf), total, torch.zeros_like(query)

    whole = empty()
    for segment in range(0, start + length, SEGMENT):
        largest, total, sums = empty()
        for first in range(segment, min(segment + SEGMENT, start + length), KEYS):
            block = slice(first, min(first + KEYS, start + length))
            before, largest = largest, torch.maximum(largest, scores[..., block].amax(dim=-1))
            probabilities = exponential(scores[..., block] - largest[..., None]).masked_fill(~seen[:, block], 0)
            correction = exponential(before - largest)
            total = total * correction + sum_lanes(probabilities)
            sums = sums * correction[..., None]
            if kv_cache == "int8":
                weights, weight_step = round_to_int8(probabilities * value_step[:, :, None, block])
                # At most 64 * 127 * 127: exact in FP32.
                sums = sums + weights @ values[:, :, block] * weight_step[..., None]
                continue
            for j, value in enumerate(values[:, :, block].unbind(2)):
                sums = sums + value[:, :, None] * probabilities[..., j, None]
        best = torch.maximum(whole[0], largest)
        before, now = exponential(whole[0] - best), exponential(largest - best)
        merged = (best, whole[1] * before + total * now, whole[2] * before[..., None] + sums * now[..., None])
        sees = (segment <= positions[:, 0])[:, None]
        whole = tuple(
            torch.where(sees if states.dim() == 4 else sees[:, 0], states, old)
            for states, old in zip(merged, whole, strict=True)
        )
    _, total, sums = whole
    return (sums / total[..., None]).transpose(1, 2).contiguous()


def route(
    x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, top_k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `(T, E)`, then weights and experts `(T, top_k)`, as the model's router returns them."""
    logits = sum_lanes(x[:, None] * router)
    scores = sigmoid(logits)
    index = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, index)
    total = torch.zeros(len(x))
    for slot in range(top_k):
        total = total + chosen[:, slot]
    return logits, chosen / (total[:, None] + 1e-20) * route_scale, index


def expert_linear(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One matrix of one expert, `[K, N / 2]`, whose scales `[K, N / 32]` change along the sum."""
    # Whole blocks: zeros change neither a step nor a sum.
    padding = -x.shape[1] % BLOCK
    weight = nn.functional.pad(unpack_int4(qweight), (0, 0, 0, padding)).float()
    # (K / 128, N / 32, 128, 32)
    weight = weight.view(-1, BLOCK, scale.shape[1], Int4Format.group_size).transpose(1, 2)
    scaled = nn.functional.pad(x[None] * scale.float().T[:, None], (0, padding))  # (N / 32, T, K)
    integers, step = round_to_int8(scaled.unflatten(-1, (-1, BLOCK)).permute(2, 0, 1, 3))  # (K / 128, N / 32, T, 128)
    out = torch.zeros(scale.shape[1], len(x), Int4Format.group_size)
    # At most 128 * 127 * 8, exact as above.
    for block in integers @ weight * step[..., None]:
        out = out + block
    return out.transpose(0, 1).flatten(1)


def moe_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_qweight: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_qweight: torch.Tensor,
    down_scale: torch.Tensor,
) -> torch.Tensor:
    outputs = torch.zeros(*top_k_index.shape, x.shape[1])  # (T, top_k, D)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        gate, up = expert_linear(x[token], gate_up_qweight[expert], gate_up_scale[expert]).chunk(2, dim=-1)
        outputs[token, slot] = expert_linear(silu_multiply(gate, up), down_qweight[expert], down_scale[expert])
    total = torch.zeros_like(x)
    for slot in range(top_k_index.shape[1]):
        total = total + outputs[:, slot] * top_k_weights[:, slot, None]
    return total


def moe_ffn(
    x: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor,
    gate_up_qweight: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_qweight: torch.Tensor,
    down_scale: torch.Tensor,
    top_k: int,
    route_scale: float,
) -> torch.Tensor:
    _, weights, index = route(x, router, bias, top_k, route_scale)
    return moe_experts(x, index, weights, gate_up_qweight, gate_up_scale, down_qweight, down_scale)
