"""
The roundings of an INT4 program during training, straight through in the backward pass.

Weights take the values of the packed checkpoint. Inputs of packed weights take one of two INT8 grids:

- "mobilemoe", that of the package's operators: symmetric, per 32 inputs in linears. In experts the inputs are
  multiplied by their weights' scales first, and rounded per 32 outputs x 128 inputs (`kernels/reference.py`).
- "per_token", that of XNNPACK and of `llama::quantized_moe_ffn` (`--moe-op llama`): asymmetric.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchao.quantization.qat import FakeQuantizerBase, IntxFakeQuantizeConfig, IntxFakeQuantizer

from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels.reference import BLOCK, round_to_int8
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEExperts, MobileMoERMSNorm, rms_normalize
from modeling_mobilemoe.packed_mobilemoe import ExpandedExperts


# Weights rounded at a time: as many as fit the cache of a core, or keep a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24


class _StraightThrough(torch.autograd.Function):
    """
    Rounds in the forward pass and returns the gradient unchanged, also for values that the grid clips.

    With a scale of max|w| / 7.5 only the largest weight of a group is clipped, from 7.5 to 7. Masking its gradient
    would freeze it.
    """

    @staticmethod
    def forward(ctx, value: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.dtype = value.dtype
        return rounding(value)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output.to(ctx.dtype), None


@torch.no_grad()
def int4_values(weight: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    The values of a packed weight: equal to `dequantize_tensor` of `quantize_tensor`, bit for bit.

    Every training step rounds every weight, so this works on chunks that stay in the cache, which is four times
    faster.

    Args:
        weight (`torch.Tensor`): of shape `(..., in, out)` or `(..., n)`.
        dim (`int`, defaults to -1): the dimension that is split into groups, -1 or -2.
        dtype (`torch.dtype`, *optional*): of the result; that of the weight when absent.
    """
    group_size = Int4Format.group_size
    # (groups, 32), or (groups, 32, out)
    groups = weight.contiguous().view(-1, group_size, *weight.shape[weight.ndim + dim + 1 :])
    values = torch.empty_like(groups, dtype=dtype or weight.dtype)
    rows = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // groups[:1].numel())
    scratch = torch.empty_like(groups[:rows], dtype=torch.float32)
    for source, target in zip(groups.split(rows), values.split(rows), strict=True):
        buffer, source = scratch[: len(source)], source.float()
        scale = Int4Format.scale(torch.abs(source, out=buffer).amax(dim=1, keepdim=True)).float()
        integers = Int4Format.round_(torch.div(source, scale, out=buffer))
        torch.mul(integers, scale, out=target)
    return values.view(weight.shape)


def bf16_values(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16().to(weight.dtype)


class _FakeQuantizer(FakeQuantizerBase):
    """A rounding, `values`, straight-through; or nothing, where it is not enabled."""

    enabled = True

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        # Around the whole rounding: otherwise autograd saves four tensors per rounded one.
        return _StraightThrough.apply(value, self.values) if self.enabled else value

    def values(self, value: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Int4FakeQuantizer(FakeQuantizerBase):
    """
    Rounds a weight to the values of the packed checkpoint; a weight fake quantizer for torchao's modules.

    torchao's own INT4 quantizer has a different grid: with FP32 scales nearly every value differs from the packed
    one, and with FP16 scales it multiplies by a reciprocal rounded to FP16, which changes one integer in 200.
    """

    def __init__(self, config: Int4Format, dim: int = -1):
        super().__init__()
        self.config = config
        self.dim = dim
        self.enabled = True

    def forward(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not self.enabled:
            return weight
        return _StraightThrough.apply(weight, partial(int4_values, dim=self.dim, dtype=dtype))


class Int8FakeQuantizer(_FakeQuantizer, IntxFakeQuantizer):
    """torchao's dynamic INT8 per token, as in XNNPACK and `--moe-op llama`, computed in FP32 for any dtype."""

    def __init__(self):
        super().__init__(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))

    def values(self, value: torch.Tensor) -> torch.Tensor:
        return IntxFakeQuantizer.forward(self, value.float()).to(value.dtype)


class Int8BlockFakeQuantizer(_FakeQuantizer):
    """INT8 per 32 inputs, symmetric, as the package's linears round."""

    config = torch.int8

    def values(self, value: torch.Tensor) -> torch.Tensor:
        integers, step = round_to_int8(value.float().unflatten(-1, (-1, Int4Format.group_size)))
        return (integers * step[..., None]).flatten(-2).to(value.dtype)


class Bf16FakeQuantizer(_FakeQuantizer):
    """Rounds norm weights to BF16, in which the format stores them."""

    config = torch.bfloat16

    def values(self, value: torch.Tensor) -> torch.Tensor:
        return bf16_values(value)


class _ExpertLinear(torch.autograd.Function):
    """
    Products of routed tokens with the INT4 values of their experts, inputs rounded as the package's operator does.

    The gradient is that of the product of the inputs as they are with the INT4 values.

    Args:
        inputs (`torch.Tensor`): `(R, K)`, in order of the experts.
        weight (`torch.Tensor`): `(E, K, N)`, not rounded; groups along N.
        counts (`list[int]`): rows of each expert.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.counts = counts
        outputs = inputs.new_empty(len(inputs), weight.shape[-1])
        for source, target, matrix in zip(inputs.split(counts), outputs.split(counts), weight, strict=True):
            if len(source):
                target.copy_(expert_linear(source, matrix))
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        inputs, weight = ctx.saved_tensors
        values = int4_values(weight, dtype=inputs.dtype)
        grad_inputs, grad_weight = torch.empty_like(inputs), torch.zeros_like(weight)
        parts = (tensor.split(ctx.counts) for tensor in (inputs, grad_outputs, grad_inputs))
        for expert, (source, grad, target) in enumerate(zip(*parts, strict=True)):
            if len(source):
                torch.mm(grad, values[expert].T, out=target)
                grad_weight[expert] = source.T @ grad
        return grad_inputs, grad_weight, None


def expert_linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `expert_linear` of `kernels/reference.py`, which has another order of sums: `(T, K)` and `(K, N)`."""
    padding = -len(weight) % BLOCK
    groups = weight.float().unflatten(-1, (-1, Int4Format.group_size)).transpose(0, 1)  # (N / 32, K, 32)
    scale = Int4Format.scale(groups.abs().amax(dim=-1)).float()  # (N / 32, K)
    weights = Int4Format.round_(groups / scale[..., None])
    # (N / 32, K / 128, T, 128) and (N / 32, K / 128, 128, 32); a block that is padded has the step of its values.
    scaled = nn.functional.pad(inputs.float() * scale[:, None], (0, padding))
    integers, step = round_to_int8(scaled.unflatten(-1, (-1, BLOCK)).transpose(1, 2))
    weights = nn.functional.pad(weights, (0, 0, 0, padding)).unflatten(1, (-1, BLOCK))
    # Integers up to 127 are exact in BF16 too.
    products = integers.to(inputs.dtype) @ weights.to(inputs.dtype)
    return (products * step[..., None]).sum(dim=1).transpose(0, 1).flatten(1)


class Int8ExpertFakeQuantizer(FakeQuantizerBase):
    """
    INT8 of inputs times scales, per 32 outputs x 128 inputs, as the package's experts round. Inputs cannot be rounded
    before their product, so they pass; `linear` is the product.
    """

    config = torch.int8
    enabled = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return _ExpertLinear.apply(inputs, weight, counts)


class FakeQuantizedHead(nn.Linear):
    """
    The output head, whose `weight` is the rounded tensor because TRL's loss reads `lm_head.weight` directly.

    For the same reason its inputs are rounded by the last norm.
    """

    @property
    def weight(self) -> torch.Tensor:
        # Only this attribute is rounded: optimizers and checkpoints have the parameter.
        (parameter,) = self.parameters(recurse=False)
        return self.weight_fake_quantizer(parameter)


class FakeQuantizedRMSNorm(MobileMoERMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight_fake_quantizer(self.weight)
        return self.activation_fake_quantizer(weight * rms_normalize(hidden_states, self.variance_epsilon))


class FakeQuantizedEmbedding(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # Groups lie within a row, so it is enough to round the rows that are read.
        return self.weight_fake_quantizer(super().forward(input_ids))


class RoundedExperts(ExpandedExperts):
    """An experts module for one forward pass: rounded weights, and a rounded input of the down projection."""

    def __init__(self, experts: "FakeQuantizedExperts", dtype: torch.dtype | None):
        # Rounded once: the eager implementation reads the tensors once per expert.
        weights = (experts.weight_fake_quantizer(each, dtype) for each in (experts.gate_up_proj, experts.down_proj))
        super().__init__(experts, *weights)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.experts.activation_fake_quantizer(self.experts._apply_gate(gate_up))


class FakeQuantizedExperts(MobileMoEExperts):
    """
    Routed experts: with plain inputs or INT8 per token under any experts implementation of transformers, or ours
    with a capacity factor; on the grid of the package's operators, one expert after the other.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        device_type = hidden_states.device.type
        # Autocast does not cast the operands of `grouped_mm`.
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        quantizer = self.activation_fake_quantizer
        if isinstance(quantizer, Int8ExpertFakeQuantizer) and quantizer.enabled:
            order = top_k_index.flatten().argsort(stable=True)
            token = order // top_k_index.shape[1]
            counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
            gate_up = quantizer.linear(
                hidden_states[token].to(dtype or hidden_states.dtype), self.gate_up_proj, counts
            )
            outputs = quantizer.linear(self._apply_gate(gate_up), self.down_proj, counts)  # (tokens * top_k, H)
            weighted = outputs * top_k_weights.flatten()[order, None]
            return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))
        rounded = RoundedExperts(self, dtype)
        return MobileMoEExperts.forward(rounded, quantizer(hidden_states), top_k_index, top_k_weights)


# By the name of the grid of activations: the fake quantizer of linears and of experts.
GRIDS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mobilemoe": (Int8BlockFakeQuantizer, Int8ExpertFakeQuantizer),
    "per_token": (Int8FakeQuantizer, Int8FakeQuantizer),
    "none": (nn.Identity, nn.Identity),
}
# How the table of a prepared model names them.
GRID_NAMES = {
    Int8BlockFakeQuantizer: "INT8 per 32 inputs",
    Int8ExpertFakeQuantizer: "INT8 per 32 outputs x 128 inputs",
    Int8FakeQuantizer: "INT8 per token",
    nn.Identity: "as they are",
}


def activation_grid(name: str | None, int4_format: Int4Format) -> str:
    """
    The grid of activations that belongs to a format of weights, or the one that was asked for.

    Raises:
        ValueError: for an unknown name, and for one that no program with these weights has.
    """
    released = int4_format.expert_axis == "output"
    if name is None:
        return "mobilemoe" if released else "per_token"
    if name not in GRIDS:
        raise ValueError(f"activation_grid={name} is no grid of activations. Set one of {', '.join(GRIDS)}.")
    if name == "mobilemoe" and not released:
        raise ValueError(
            "activation_grid=mobilemoe with expert_axis=input: the package's operators read experts that are grouped "
            "along their outputs. Set per_token, which ExecuTorch's kernels round, or expert_axis=output."
        )
    return name
