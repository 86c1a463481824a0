"""
INT4 quantization-aware training in two steps around any trainer, as in torchao:

    prepare(model)                      # fake-quantises weights to INT4 and inputs to INT8
    trainer.train()                     # its checkpoints are ordinary full-precision ones
    convert(model).save_pretrained(directory)

Inputs are rounded per token, asymmetric, as XNNPACK and `llama::quantized_moe_ffn` (`--moe-op llama`) round them. The
package's own operators use finer blocks: symmetric per 32 inputs in linears, per 32 outputs x 128 inputs in experts.
Training uses the coarser rounding of the two.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchao.quantization.qat import (
    FakeQuantizedLinear,
    FakeQuantizerBase,
    IntxFakeQuantizeConfig,
    IntxFakeQuantizer,
)
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoEExperts,
    MobileMoEPreTrainedModel,
    MobileMoERMSNorm,
    MobileMoERouter,
    rms_normalize,
)
from modeling_mobilemoe.quantization_mobilemoe import modules_to_pack, quantize


logger = logging.get_logger(__name__)

# Weights rounded at a time: as many as fit the cache of a core, or keep a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24
MERGE_FIRST = "Merge LoRA adapters first (`model = model.merge_and_unload()`) and undo other changes to the model."


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


class Int8FakeQuantizer(IntxFakeQuantizer):
    """torchao's dynamic INT8 per token, as in XNNPACK and `--moe-op llama`, computed in FP32 for any dtype."""

    def __init__(self):
        super().__init__(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return hidden_states
        # Straight-through around the whole rounding: otherwise autograd saves four tensors per rounded one.
        return _StraightThrough.apply(hidden_states, self.values)

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.float()).to(hidden_states.dtype)


class Bf16FakeQuantizer(FakeQuantizerBase):
    """Rounds norm weights to BF16, in which the format stores them."""

    config = torch.bfloat16

    def __init__(self):
        super().__init__()
        self.enabled = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight, bf16_values) if self.enabled else weight


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


class RoundedExperts:
    """An experts module for one forward pass: rounded weights, and a rounded input of the down projection."""

    def __init__(self, experts: "FakeQuantizedExperts", dtype: torch.dtype | None):
        self.experts = experts
        # Rounded once: the eager implementation reads the tensors once per expert.
        self.gate_up_proj = experts.weight_fake_quantizer(experts.gate_up_proj, dtype)
        self.down_proj = experts.weight_fake_quantizer(experts.down_proj, dtype)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.experts.activation_fake_quantizer(self.experts._apply_gate(gate_up))

    def __getattr__(self, name: str):
        return getattr(self.experts, name)


class FakeQuantizedExperts(MobileMoEExperts):
    """Routed experts under any experts implementation of transformers, or ours with a capacity factor."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        device_type = hidden_states.device.type
        # Autocast does not cast the operands of `grouped_mm`.
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        rounded = RoundedExperts(self, dtype)
        hidden_states = self.activation_fake_quantizer(hidden_states)
        return MobileMoEExperts.forward(rounded, hidden_states, top_k_index, top_k_weights)


def _as_class(module: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    """
    A module of another class that shares its parameters, submodules and hooks with `module`.

    A constructor would allocate weights, and torch has no function that transfers hooks. This is what `copy.copy` does
    (https://docs.python.org/3/library/pickle.html#object.__setstate__), for another class.
    """
    shared = new_class.__new__(new_class)
    shared.__setstate__(module.__getstate__())
    return shared


def prepare(
    model: PreTrainedModel, int4_format: Int4Format | None = None, activations: bool = True
) -> PreTrainedModel:
    """
    Fake-quantises a model in place: weights to the packed checkpoint's values, their inputs to INT8 per token.

    Linears become torchao's `FakeQuantizedLinear`. Parameters keep their names and full precision, so checkpoints
    saved before [`convert`] are ordinary ones. Norms are rounded to BF16 in the forward pass, expert biases only here.
    The router stays as it is. [`preparation_table`] shows how each parameter is quantised.

    Args:
        model (`PreTrainedModel`): full precision, LoRA adapters merged.
        int4_format (`Int4Format`, *optional*): the released one when absent.
        activations (`bool`, defaults to `True`): round inputs to INT8 as well.

    Raises:
        ValueError: when the packed checkpoint would lack a tensor of the model.
    """
    int4_format = int4_format or Int4Format()
    check_complete(model, int4_format)
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            tensor.copy_(bf16_values(tensor))
    head = model.get_output_embeddings()
    last_norm = model.base_model.norm if head is not None else None
    for name, module in list(model.named_modules()):
        # Class, weight fake quantizer, whether inputs of packed weights (the norm: its outputs) are rounded here.
        if isinstance(module, MobileMoEExperts):
            row = FakeQuantizedExperts, Int4FakeQuantizer(int4_format, int4_format.expert_dim), True
        elif isinstance(module, MobileMoERMSNorm):
            row = FakeQuantizedRMSNorm, Bf16FakeQuantizer(), module is last_norm
        elif isinstance(module, nn.Embedding):
            row = FakeQuantizedEmbedding, Int4FakeQuantizer(int4_format), False
        elif module is head:
            row = FakeQuantizedHead, Int4FakeQuantizer(int4_format), False
        elif isinstance(module, nn.Linear):
            row = FakeQuantizedLinear, Int4FakeQuantizer(int4_format), True
        else:
            continue
        new_class, weight_fake_quantizer, rounds_inputs = row
        module = _as_class(module, new_class)
        module.weight_fake_quantizer = weight_fake_quantizer
        module.activation_fake_quantizer = Int8FakeQuantizer() if activations and rounds_inputs else nn.Identity()
        model.set_submodule(name, module)
    logger.info(f"Prepared for quantization-aware training:\n{preparation_table(model)}")
    return model


def _check_same(kind: str, found: dict[str, object], expected: dict[str, object]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        there, wanted = (type(side[name]).__name__ if name in side else "missing" for side in (found, expected))
        if there != wanted:
            raise ValueError(
                f"The {kind} {name} is {there}, in a plain model it is {wanted}: it would be left out of the INT4 "
                f"checkpoint. {MERGE_FIRST}"
            )


def check_complete(model: PreTrainedModel, int4_format: Int4Format) -> None:
    """
    Refuses a model that the packed checkpoint cannot hold completely.

    Raises:
        ValueError: for adapters, replaced modules, an untied head, or a size that the group size does not divide.
    """
    if not isinstance(model, MobileMoEPreTrainedModel):
        raise ValueError(f"prepare needs a MobileMoE model but got a {type(model).__name__}. {MERGE_FIRST}")
    if model.config.quantization is not None:
        raise ValueError("This model is packed INT4 and cannot be trained. Start from the full-precision checkpoint.")
    if is_prepared(model):
        raise ValueError("This model is prepared already. Train it, then call `convert`.")
    # A meta-device model supplies the original modules and parameters.
    with torch.device("meta"):
        plain = type(model)(model.config)
    _check_same("module", dict(model.named_modules()), dict(plain.named_modules()))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        raise ValueError(
            "lm_head.weight is not the tensor of the embedding, but the INT4 format stores one tensor for both. "
            "Tie them with `model.tie_weights()`."
        )
    _check_same("parameter", dict(model.named_parameters()), dict(plain.named_parameters()))
    for name, module in modules_to_pack(model).items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            dim = int4_format.expert_dim if parameter.ndim == 3 else -1
            if parameter.shape[dim] % int4_format.group_size:
                raise ValueError(
                    f"{name}.{parameter_name} has {parameter.shape[dim]} values along the axis of its groups, which "
                    f"the group size {int4_format.group_size} does not divide. Choose model widths that are multiples."
                )


def preparation_table(model: PreTrainedModel) -> str:
    """How each parameter of a prepared model is quantised: one line per kind of parameter, all layers together."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    tensors = dict(model.named_parameters()) | {
        name: tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias")
    }
    for name, tensor in tensors.items():
        module = model.get_submodule(name.rpartition(".")[0])
        inputs = "as they are"
        if isinstance(module, MobileMoERouter):
            weight = "FP32: near-ties decide which experts run"
        elif isinstance(module, FakeQuantizedRMSNorm):
            weight = "BF16, as it is stored"
        elif name.endswith("expert_bias"):
            weight = "BF16 at the start; balancing moves it"
        else:
            experts = isinstance(module, FakeQuantizedExperts)
            axis = module.weight_fake_quantizer.config.expert_axis if experts else "input"
            weight = f"INT4, groups of {Int4Format.group_size} along the {axis}"
            # The embedding is also the head, whose inputs the last norm rounds.
            source = model.base_model.norm if isinstance(module, FakeQuantizedEmbedding) else module
            if isinstance(source.activation_fake_quantizer, Int8FakeQuantizer):
                inputs = "INT8 per token, as the head" if source is not module else "INT8 per token"
        row = rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), weight, inputs), [0, 0])
        row[:] = row[0] + 1, row[1] + tensor.numel()
    width = max(len(kind) for kind, _, _ in rows)
    lines = [f"{'parameter':{width}s}  {'tensors':>7s}  {'values':>13s}  {'weight':40s}  inputs"]
    for (kind, weight, inputs), (count, numel) in rows.items():
        lines.append(f"{kind:{width}s}  {count:7d}  {numel:13,d}  {weight:40s}  {inputs}")
    return "\n".join(lines)


def is_prepared(model: nn.Module) -> bool:
    return any(isinstance(module, FakeQuantizedExperts) for module in model.modules())


def enable_fake_quantization(model: nn.Module, enabled: bool = True) -> None:
    """Switches the fake quantizers of a prepared model on, or off for full precision."""
    for module in model.modules():
        if isinstance(module, FakeQuantizerBase):
            module.enabled = enabled


class FakeQuantizationStart(TrainerCallback):
    """
    Trains the first steps of a prepared model in full precision.

    Args:
        start_step (`int`): optimizer steps before fake quantization begins.
    """

    def __init__(self, start_step: int):
        self.start_step = start_step

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        enable_fake_quantization(model, state.global_step >= self.start_step)


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """
    Ends quantization-aware training: packs the weights with [`quantize`] in the format of [`prepare`], in place.

    Raises:
        ValueError: when the model is not prepared, or training diverged.
    """
    if not is_prepared(model):
        raise ValueError("This model is not prepared. Call `prepare` before training, or `quantize` to only round it.")
    int4_format = None
    # `quantize` replaces all other modules.
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedExperts):
            int4_format = module.weight_fake_quantizer.config
        elif isinstance(module, FakeQuantizedRMSNorm):
            del module.weight_fake_quantizer, module.activation_fake_quantizer
            model.set_submodule(name, _as_class(module, MobileMoERMSNorm))
    return quantize(model, int4_format)
