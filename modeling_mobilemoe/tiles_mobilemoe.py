"""
INT4 weights in the order in which the kernels read them: the checkpoint's integers and scales, moved.

A tile holds 32 outputs of some inputs, 18 bytes for each input. For every 4 inputs there are 64 bytes, 16 cells of 4:
the low nibbles of cell n are the integers of output n, the high ones those of output n + 16, all plus 8. A linear's
tile has 32 inputs, and a scale for each output in FP16, after the integers. An expert's has 128 inputs, the last one
perhaps fewer, and a scale for each of them, before the integers: they are read first, and reading backwards is slow.
Tiles of the same outputs lie side by side (kernels/src/isa.h).
"""

import torch
from torch import nn

from .int4_mobilemoe import Int4Format, pack_int4, unpack_int4


GROUP = Int4Format.group_size
HALF = GROUP // 2
CELL = 4
BLOCK = 128  # inputs of an expert's tile
INPUT_BYTES = 18


def _stored(qweight: torch.Tensor) -> torch.Tensor:
    """Packed integers `(..., n / 2)` to values of 0 to 15 `(..., n)`."""
    return (unpack_int4(qweight) - Int4Format.qmin).view(torch.uint8)


def _packed(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of [`_stored`]."""
    return pack_int4(stored.view(torch.int8) + Int4Format.qmin)


def _columns(nibbles: torch.Tensor) -> torch.Tensor:
    """Values of 0 to 15 `(..., inputs, 32)` to bytes `(..., inputs * 16)`."""
    packed = nibbles[..., :HALF] | nibbles[..., HALF:] << 4
    return packed.unflatten(-2, (-1, CELL)).transpose(-1, -2).flatten(-3)


def _nibbles(columns: torch.Tensor) -> torch.Tensor:
    """Inverse of [`_columns`]."""
    packed = columns.unflatten(-1, (-1, HALF, CELL)).transpose(-1, -2).flatten(-3, -2)
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.contiguous().view(torch.uint8)


def linear_tiles(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Args:
        qweight (`torch.Tensor`): packed integers of shape `(N, K / 2)`.
        scale (`torch.Tensor`): of shape `(N, K / 32)`.

    Returns:
        uint8 of shape `(ceil(N / 32), K / 32, 576)`; outputs beyond N are zero.
    """
    padding = (0, 0, 0, -len(qweight) % GROUP)
    nibbles = _stored(nn.functional.pad(qweight, padding))
    nibbles = (
        nibbles.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP)).permute(0, 2, 3, 1)
    )  # (N / 32, K / 32, 32, 32)
    scales = nn.functional.pad(scale, padding).unflatten(0, (-1, GROUP)).transpose(1, 2)  # (N / 32, K / 32, 32)
    return torch.cat([_columns(nibbles), _bytes(scales)], dim=-1)


def linear_weights(tiles: torch.Tensor, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of [`linear_tiles`]: integers `(N, K / 2)` and scales `(N, K / 32)` of the checkpoint."""
    columns, scales = tiles.split([GROUP * HALF, GROUP * 2], dim=-1)
    nibbles = _nibbles(columns).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:out_features]  # (N, K)
    scale = scales.contiguous().view(torch.float16).transpose(1, 2).flatten(0, 1)[:out_features]
    return _packed(nibbles), scale.contiguous()


def expert_tiles(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Args:
        qweight (`torch.Tensor`): packed integers of shape `(E, K, N / 2)`, K inputs and N outputs.
        scale (`torch.Tensor`): of shape `(E, K, N / 32)`.

    Returns:
        uint8 of shape `(E, N / 32, K * 18)`.
    """
    tiles = []
    for integers, scales in zip(qweight.split(BLOCK, dim=1), scale.split(BLOCK, dim=1), strict=True):
        nibbles = _stored(integers).unflatten(-1, (-1, GROUP)).transpose(1, 2)  # (E, N / 32, up to 128, 32)
        tiles += [_bytes(scales.transpose(1, 2)), _columns(nibbles)]
    return torch.cat(tiles, dim=-1)


def expert_weights(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of [`expert_tiles`]: integers `(E, K, N / 2)` and scales `(E, K, N / 32)` of the checkpoint."""
    qweight, scale = [], []
    for tile in tiles.split(BLOCK * INPUT_BYTES, dim=-1):
        num_inputs = tile.shape[-1] // INPUT_BYTES
        scales, columns = tile.split([num_inputs * 2, num_inputs * HALF], dim=-1)
        nibbles = _nibbles(columns).transpose(1, 2).flatten(2)  # (E, up to 128, N)
        qweight.append(_packed(nibbles))
        scale.append(scales.contiguous().view(torch.float16).transpose(1, 2))
    return torch.cat(qweight, dim=1), torch.cat(scale, dim=1)


def gate_up_tiles(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As [`expert_tiles`], with the tiles of 32 gates beside those of their ups: `(E, F / 32, 2 * K * 18)`."""
    return expert_tiles(qweight, scale).unflatten(1, (2, -1)).transpose(1, 2).flatten(2)


def gate_up_weights(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of [`gate_up_tiles`]."""
    return expert_weights(tiles.unflatten(2, (2, -1)).transpose(1, 2).flatten(1, 2))
