"""
INT4 quantization-aware training in two steps around any trainer, after torchao's idiom:

    prepare(model)                      # weights read as they will be packed, inputs as INT8
    trainer.train()                     # its checkpoints are ordinary full-precision ones
    convert(model).save_pretrained(directory)

Inputs are rounded per token, asymmetric, as XNNPACK and `llama::quantized_moe_ffn` (`--moe-op llama`) round them. The
package's own operators round in finer blocks: linears symmetric per 32 inputs, experts per 32 outputs x 128 inputs. So
training sees the coarser of the two.
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

from modeling_mobilemoe.fused_mobilemoe import Int4Format
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoEExperts,
    MobileMoEPreTrainedModel,
    MobileMoERMSNorm,
    MobileMoERouter,
)
from modeling_mobilemoe.quantization_mobilemoe import modules_to_pack, quantize


# Weights rounded at a time: what a core's cache holds, or enough to fill a GPU.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24
MERGE_FIRST = "Merge LoRA adapters first (`model = model.merge_and_unload()`), and undo other changes to the model."


class _StraightThrough(torch.autograd.Function):
    """
    Rounds forward and hands the gradient on as it is, without a mask where the grid clips.

    A scale of max|w| / 7.5 leaves no outliers: all that is clipped is the largest weight of a group, from 7.5 to 7,
    and a mask would freeze it.
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
    The values that a weight has once it is packed: `dequantize_tensor` of `quantize_tensor`, bit for bit.

    A training step rounds every weight, so this goes over memory once, part by part: four times faster.

    Args:
        weight (`torch.Tensor`): of shape `(..., in, out)` or `(..., n)`.
        dim (`int`, defaults to -1): along which the groups run, -1 or -2.
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
    A weight as the checkpoint will hold it, in the slot that torchao has for weight fake quantizers.

    torchao's own INT4 quantizer is another grid: with FP32 scales nearly every value differs from the packed one, and
    with FP16 scales it multiplies by a reciprocal that is rounded to FP16, which moves one integer in 200.
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
    """torchao's dynamic per-token INT8, the rounding of XNNPACK and `--moe-op llama`, in FP32 for any dtype."""

    def __init__(self):
        super().__init__(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return hidden_states
        # Straight-through as a whole, or autograd would keep four tensors for every one that is rounded.
        return _StraightThrough.apply(hidden_states, self.values)

    def values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.float()).to(hidden_states.dtype)


class Bf16FakeQuantizer(FakeQuantizerBase):
    """Norm weights are stored in BF16."""

    config = torch.bfloat16

    def __init__(self):
        super().__init__()
        self.enabled = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight, bf16_values) if self.enabled else weight


# The modules below take the place of their parents by `module.__class__ = ...`: parameters, ties, hooks and names in
# checkpoints stay as they are.
class RoundedWeight:
    """`weight` reads as its rounding; `_parameters`, which optimizers and checkpoints read, holds what trains."""

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_fake_quantizer(self._parameters["weight"])


class FakeQuantizedHead(RoundedWeight, nn.Linear):
    """TRL's loss multiplies by `lm_head.weight` itself. Inputs are rounded where both get them, at the last norm."""


class FakeQuantizedRMSNorm(RoundedWeight, MobileMoERMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation_fake_quantizer(super().forward(hidden_states))


class FakeQuantizedEmbedding(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # Groups run within a row, so the rows that are used can be rounded alone.
        return self.weight_fake_quantizer(super().forward(input_ids))


class FakeQuantizedExperts(MobileMoEExperts):
    """Routed experts under any experts implementation of transformers, or ours with a capacity factor."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        device_type = hidden_states.device.type
        # `grouped_mm` is not among the operations that autocast casts.
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        # Once per call: eager reads the tensors once per expert.
        self.seen = {
            name: self.weight_fake_quantizer(parameter, dtype) for name, parameter in self._parameters.items()
        }
        try:
            return super().forward(self.activation_fake_quantizer(hidden_states), top_k_index, top_k_weights)
        finally:
            self.seen = self._parameters

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        # What enters the down projection.
        return self.activation_fake_quantizer(super()._apply_gate(gate_up))

    @property
    def gate_up_proj(self) -> torch.Tensor:
        return self.seen["gate_up_proj"]

    @property
    def down_proj(self) -> torch.Tensor:
        return self.seen["down_proj"]


def prepare(
    model: PreTrainedModel, int4_format: Int4Format | None = None, activations: bool = True
) -> PreTrainedModel:
    """
    Makes every weight read as the packed checkpoint will hold it, and every input of a packed weight as INT8 per
    token, the coarsest that kernels round (see the top). The first process prints what became of every parameter.
    In place; end with [`convert`].

    Linears become torchao's `FakeQuantizedLinear`. Parameters keep their names and full precision, so a checkpoint
    saved before [`convert`] is an ordinary one. Norms read as BF16, expert biases are rounded to it once, here. The
    router stays as it is.

    Args:
        model (`PreTrainedModel`): full precision, LoRA adapters merged.
        int4_format (`Int4Format`, *optional*): the released one when absent.
        activations (`bool`, defaults to `True`): round inputs to INT8 as well.

    Raises:
        ValueError: when a tensor that the format packs would be left out.
    """
    int4_format = int4_format or Int4Format()
    check_complete(model, int4_format)
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            tensor.copy_(bf16_values(tensor))

    def inputs() -> nn.Module:
        return Int8FakeQuantizer() if activations else nn.Identity()

    head = model.get_output_embeddings()
    last_norm = model.base_model.norm if head is not None else None
    for name, module in list(model.named_modules()):
        if isinstance(module, MobileMoEExperts):
            module.__class__ = FakeQuantizedExperts
            module.seen = module._parameters
            module.weight_fake_quantizer = Int4FakeQuantizer(int4_format, int4_format.expert_dim)
            module.activation_fake_quantizer = inputs()
        elif isinstance(module, MobileMoERMSNorm):
            module.__class__ = FakeQuantizedRMSNorm
            module.weight_fake_quantizer = Bf16FakeQuantizer()
            module.activation_fake_quantizer = inputs() if module is last_norm else nn.Identity()
        elif isinstance(module, nn.Embedding):
            module.__class__ = FakeQuantizedEmbedding
            module.weight_fake_quantizer = Int4FakeQuantizer(int4_format)
        elif module is head:
            module.__class__ = FakeQuantizedHead
            module.weight_fake_quantizer = Int4FakeQuantizer(int4_format)
        elif isinstance(module, nn.Linear):
            linear = FakeQuantizedLinear.from_linear(module)
            linear.weight_fake_quantizer = Int4FakeQuantizer(int4_format)
            linear.activation_fake_quantizer = inputs()
            model.set_submodule(name, linear)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(preparation_table(model))
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
    Refuses a model of which the packed checkpoint would lack something.

    Raises:
        ValueError: for adapters, replaced modules, an untied head, or a size that does not divide into groups.
    """
    if not isinstance(model, MobileMoEPreTrainedModel):
        raise ValueError(f"prepare needs a MobileMoE model and got a {type(model).__name__}. {MERGE_FIRST}")
    if model.config.quantization is not None:
        raise ValueError("This model is packed INT4 and cannot be trained. Start from the full-precision checkpoint.")
    if is_prepared(model):
        raise ValueError("This model is prepared already. Train it, then call `convert`.")
    # The skeleton knows which module and which parameter belongs where.
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    _check_same("module", dict(model.named_modules()), dict(skeleton.named_modules()))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        raise ValueError(
            "lm_head.weight is not the tensor of the embedding, but the INT4 format has one for both. "
            "Tie them with `model.tie_weights()`."
        )
    _check_same("parameter", dict(model.named_parameters()), dict(skeleton.named_parameters()))
    for name, module in modules_to_pack(model).items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            dim = int4_format.expert_dim if parameter.ndim == 3 else -1
            if parameter.shape[dim] % int4_format.group_size:
                raise ValueError(
                    f"{name}.{parameter_name} has {parameter.shape[dim]} values along the axis of its groups, which "
                    f"the group size {int4_format.group_size} does not divide. Choose model widths that are multiples."
                )


def preparation_table(model: PreTrainedModel) -> str:
    """What a prepared model trains how: one line per kind of parameter, layers taken together."""
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
            # The embedding is the head, whose inputs come from the last norm.
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
    """Switches a prepared model between what INT4 computes and full precision."""
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
    Ends quantization-aware training: packs the weights in the format of [`prepare`], in place.

    Raises:
        ValueError: when the model is not prepared, or training diverged.
    """
    if not is_prepared(model):
        raise ValueError("This model is not prepared. Call `prepare` before training, or `quantize` to only round it.")
    int4_format = None
    for module in model.modules():
        if isinstance(module, FakeQuantizedExperts):
            int4_format = module.weight_fake_quantizer.config
        elif isinstance(module, FakeQuantizedRMSNorm):
            del module.weight_fake_quantizer, module.activation_fake_quantizer
            module.__class__ = MobileMoERMSNorm
    # The other modules are replaced by packed ones, which read the stored parameters.
    return quantize(model, int4_format)
