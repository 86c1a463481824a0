"""Packs expert weights for `llama::quantized_moe_ffn`: groups along the input, panels of eight rows."""

import torch
from torch import nn

from modeling_mobilemoe.int4_mobilemoe import Int4Format, dequantize_tensor, unpack_int4
from modeling_mobilemoe.packed_mobilemoe import Int4Experts


# torchao's "universal" packed layout, which llama::quantized_moe_ffn reads: panels of 8 rows, chunks of 16 columns
# (ExecuTorch third-party/ao, packed_weights_header.h and packed_weights_format.h).
UNIVERSAL_FORMAT, UNIVERSAL_NR, UNIVERSAL_KR, UNIVERSAL_SR = 6712, 8, 16, 2


def pack_universal(quantized: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """
    Packs expert weights for `llama::quantized_moe_ffn`.

    Args:
        quantized (`torch.Tensor`): int8 of shape `(E, N, K)`, output rows by input columns.
        scale (`torch.Tensor`): float32 of shape `(E, N, K / group)`, groups along the input.
        num_bits (`int`): 4 or 8.

    Returns:
        uint8 of shape `(E, bytes)`: a header of 16 int32, then for every panel of 8 rows and every group the integers,
        8 FP32 scales and 8 int32 row sums of the integers.
    """
    num_experts, rows, columns = quantized.shape
    groups = scale.shape[-1]
    padding = -rows % UNIVERSAL_NR
    quantized = nn.functional.pad(quantized, (0, 0, 0, padding))
    scale = nn.functional.pad(scale, (0, 0, 0, padding))
    # (E, panel, row, group, chunk, sr, 8) -> (E, panel, group, chunk, sr, row, 8)
    panels = quantized.unflatten(1, (-1, UNIVERSAL_NR)).unflatten(3, (groups, -1, UNIVERSAL_SR, 8))
    sums = panels.sum(dim=(4, 5, 6), dtype=torch.int32).transpose(2, 3)  # (E, panel, group, row)
    values = panels.permute(0, 1, 3, 4, 5, 2, 6).flatten(3)  # (E, panel, group, group_size * 8)
    if num_bits == 4:
        nibbles = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16))
        values = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(3)
    scales = scale.unflatten(1, (-1, UNIVERSAL_NR)).transpose(2, 3).contiguous()
    body = torch.cat([values.view(torch.uint8), scales.view(torch.uint8), sums.contiguous().view(torch.uint8)], dim=-1)
    header = [UNIVERSAL_FORMAT, 1, num_bits, 0, 0, UNIVERSAL_NR, UNIVERSAL_KR, UNIVERSAL_SR] + [0] * 8
    header = torch.tensor(header, dtype=torch.int32).view(torch.uint8).expand(num_experts, -1)
    return torch.cat([header, body.flatten(1)], dim=1)


def operator_rows(
    qweight: torch.Tensor, scale: torch.Tensor, group_dim: int, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Requantises one expert of a checkpoint for the operator, which needs groups along the input.

    An expert with groups along the input is kept bit-exact at both widths. An expert with groups along the output is
    dequantised and rounded a second time. The error of this rounding is negligible with 8 bits and noticeable with 4.

    Args:
        qweight (`torch.Tensor`): packed integers of shape `(in, out / 2)`.
        scale (`torch.Tensor`): scales of shape `(in, out / 32)`, or `(in / 32, out)` with groups along the input.
        group_dim (`int`): -1 or -2, see [`Int4Experts`].
        num_bits (`int`): 4 or 8.

    Returns:
        int8 of shape `(out, in)`, and FP32 scales of shape `(out, in / 32)`.
    """
    if group_dim == -2:
        return unpack_int4(qweight).T, scale.float().T
    limit, low, high = (127, -128, 127)
    if num_bits == 4:
        limit, low, high = (Int4Format.qmax - Int4Format.qmin) / 2, Int4Format.qmin, Int4Format.qmax
    weight = dequantize_tensor(qweight, scale, torch.float32).T  # (out, in)
    groups = weight.unflatten(-1, (-1, Int4Format.group_size))
    scale = (groups.abs().amax(dim=-1) / limit).clamp(min=2.0**-24)
    quantized = (groups / scale.unsqueeze(-1)).round().clamp(low, high).to(torch.int8).flatten(-2)
    return quantized, scale


def expand_rows(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The FP32 weights `(out, in)` that the quantised rows represent."""
    return (quantized.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def pack_experts(experts: Int4Experts, num_bits: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """
    Packs the experts of one layer for `llama::quantized_moe_ffn`.

    Returns:
        The packed gate and up rows and the packed down rows, each `(E, bytes)`; the sum of squares of the weights, and
        the sum of squared errors of the second rounding. Both sums are 0 with groups along the input.
    """
    packed, signal, noise = [], 0.0, 0.0
    for qweight, weight_scale in (
        (experts.gate_up_qweight, experts.gate_up_scale),
        (experts.down_qweight, experts.down_scale),
    ):
        blobs: torch.Tensor | None = None
        # One expert at a time: all of them in FP32 would take eight times the packed size.
        for index, (expert_qweight, expert_scale) in enumerate(zip(qweight, weight_scale, strict=True)):
            quantized, scale = operator_rows(expert_qweight, expert_scale, experts.group_dim, num_bits)
            if experts.group_dim != -2:
                weight = dequantize_tensor(expert_qweight, expert_scale, torch.float32).T
                signal += weight.square().sum().item()
                noise += (weight - expand_rows(quantized, scale)).square().sum().item()
            blob = pack_universal(quantized.unsqueeze(0), scale.unsqueeze(0), num_bits)
            if blobs is None:
                blobs = blob.new_empty(experts.num_experts, blob.shape[1])
            blobs[index] = blob
        packed.append(blobs)
    return packed[0], packed[1], signal, noise
