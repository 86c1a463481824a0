"""The number grid of `mobilemoe-int4-g32`: how weights are rounded, packed and expanded.

Every quantised tensor is stored as two: signed 4-bit integers, two to a byte, and FP16 scales. Nibble pairs run along
the *last* dimension of the tensor as stored. So do groups of 32: for linears `[out, in]` and the embedding
`[vocab, hidden]` that is the input axis; for experts `[E, in, out]` it is the output axis, as released. Experts may
instead be grouped along their input, the middle dimension, which is what stock ExecuTorch kernels read: their scales
are then `[E, in / 32, out]`, the integers are stored as before, and the `quantization` block of config.json says so.

The dtype rule: a weight is `integer * scale`, multiplied in FP32 (exact: 4 + 11 significant bits) and rounded once to
the model's dtype. In FP32 a packed model therefore equals its dequantised twin bit for bit.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Int4Format:
    """
    The number grid and the axes along which groups run. All other code reads both here.

    Equation 6 of the paper: `scale = 2 max|w| / (2^4 - 1)` per group, `q = clamp(round(w / scale), -8, 7)`, half to
    even. The scale is rounded to its stored FP16 value before it divides, so that the integers belong to the scale
    that a reader multiplies them by.

    Args:
        expert_axis (`str`, defaults to `"output"`): axis of `[E, in, out]` along which experts are grouped: `"output"`
            as released, `"input"` for kernels that apply one scale to 32 neighbouring inputs.

    Raises:
        ValueError: for any other axis.
    """

    expert_axis: str = "output"

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 32
    qmin: ClassVar[int] = -8
    qmax: ClassVar[int] = 7
    scale_dtype: ClassVar[torch.dtype] = torch.float16
    # By the name in this package: the dimension of `[E, in, out]`, and the text in config.json.
    expert_axes: ClassVar[dict[str, tuple[int, str]]] = {
        "output": (-1, "out (last dim of [E, in, out])"),
        "input": (-2, "in (middle dim of [E, in, out])"),
    }

    def __post_init__(self) -> None:
        if self.expert_axis not in self.expert_axes:
            raise ValueError(
                f"expert_axis={self.expert_axis!r} is no axis of the experts. Set 'output', the released format, or "
                "'input', which ExecuTorch's kernels read without a second rounding."
            )

    @property
    def expert_dim(self) -> int:
        return self.expert_axes[self.expert_axis][0]

    @property
    def block(self) -> dict[str, Any]:
        """The `quantization` block of config.json. With experts grouped along the output, as released, verbatim."""
        return {
            "format": "mobilemoe-int4-g32",
            "group_size": self.group_size,
            "embedding_group_size": self.group_size,
            "qmin": self.qmin,
            "qmax": self.qmax,
            "symmetric": True,
            "packed": True,
            "scale_dtype": "float16",
            "linear_group_axis": "in (last dim of [out, in])",
            "expert_group_axis": self.expert_axes[self.expert_axis][1],
        }

    @classmethod
    def scale(cls, absmax: torch.Tensor) -> torch.Tensor:
        """The FP16 scales of groups, given their largest magnitudes in FP32."""
        scale = (absmax / ((cls.qmax - cls.qmin) / 2)).to(cls.scale_dtype)
        # The smallest FP16 number, because a group of zeros must not be divided by zero.
        return scale.clamp(min=2.0**-24)

    @classmethod
    def round_(cls, scaled: torch.Tensor) -> torch.Tensor:
        """Rounds weights, already divided by their scale, to the integers of the grid, in place."""
        return scaled.round_().clamp_(cls.qmin, cls.qmax)


def quantize_tensor(weight: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rounds a weight to the INT4 grid, see [`Int4Format`].

    Args:
        weight (`torch.Tensor`): of shape `(..., n)`, n divisible by 32.
        dim (`int`, defaults to -1): the dimension along which groups run, -1 or -2. Shapes here are those for -1.

    Returns:
        The integers, int8 of shape `(..., n)`, and the scales, float16 of shape `(..., n / 32)`.

    Raises:
        ValueError: when the dimension is not divisible by 32, or a value is not finite or too large.
    """
    group_size = Int4Format.group_size
    if weight.shape[dim] % group_size:
        which = "last" if dim == -1 else "input"
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} cannot be quantised: its {which} dimension is not divisible by "
            f"the group size {group_size}. Choose model widths that are multiples of {group_size}."
        )
    # (..., n / 32, 32), or (..., n / 32, 32, out): the 32 values of a group are at `dim` in both cases.
    groups = weight.detach().float().unflatten(dim, (-1, group_size))
    scale = Int4Format.scale(groups.abs().amax(dim=dim))
    if not scale.isfinite().all():
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} holds values that are not finite or whose scale exceeds FP16. "
            "The checkpoint is damaged or training diverged: quantise an earlier one."
        )
    quantized = Int4Format.round_(groups / scale.float().unsqueeze(dim))
    return quantized.to(torch.int8).flatten(dim - 1, dim), scale


def pack_int4(quantized: torch.Tensor) -> torch.Tensor:
    """Packs int8 values in -8..7 along the last dimension: even index in the low nibble, odd in the high one."""
    return (quantized[..., 0::2] & 0x0F | quantized[..., 1::2] << 4).view(torch.uint8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of [`pack_int4`]: uint8 of shape `(..., n / 2)` to int8 of shape `(..., n)`."""
    signed = packed.view(torch.int8)
    # The left shift moves the low nibble to the top, and the arithmetic right shift extends its sign.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def dequantize_tensor(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, dim: int = -1) -> torch.Tensor:
    """Expands packed integers `(..., n / 2)` and scales, grouped along `dim`, to `(..., n)` by the dtype rule."""
    # Cast first: multiplying int8 by FP32 is not vectorised and takes three times as long.
    groups = unpack_int4(packed).float().unflatten(dim, (-1, Int4Format.group_size))
    return groups.mul_(scale.float().unsqueeze(dim)).flatten(dim - 1, dim).to(dtype)
