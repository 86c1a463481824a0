"""The released INT4 format `mobilemoe-int4-g32`: the number grid, plain modules that hold it, and its quantizer.

Every quantised tensor is stored as two: signed 4-bit integers, two to a byte, and FP16 scales. Nibble pairs run along
the *last* dimension of the tensor as stored. So do groups of 32: for linears `[out, in]` and the embedding
`[vocab, hidden]` that is the input axis; for experts `[E, in, out]` it is the output axis, as released. Experts may
instead be grouped along their input, the middle dimension, which is what stock ExecuTorch kernels take: their scales
are then `[E, in / 32, out]`, the integers lie as before, and the block of config.json says so.

The dtype rule: a weight is `integer * scale`, multiplied in FP32 (exact: 4 + 11 significant bits) and rounded once to
the model's dtype. In FP32 a packed model therefore equals its dequantised twin bit for bit. Weights are expanded one
matrix at a time, when they are used, and never kept.

A BF16 model on the CPU is not expanded where the package's C++ kernels are at hand: they multiply the integers as they
are with activations rounded to INT8, in finer blocks than QAT rounds them. FP32 and training always take the exact
path.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


@dataclass(frozen=True)
class Int4Format:
    """
    The number grid and the axes it lies along; everything else reads them here.

    Equation 6 of the paper: `scale = 2 max|w| / (2^4 - 1)` per group, `q = clamp(round(w / scale), -8, 7)`, half to
    even. The scale is rounded to the FP16 value that is stored before it divides, so that the integers fit the scale
    they will be read with.

    Args:
        expert_axis (`str`, defaults to `"output"`): axis of `[E, in, out]` along which experts are grouped: `"output"`
            as released, `"input"` for kernels that apply one scale to 32 neighbours of the sum.

    Raises:
        ValueError: for another axis.
    """

    expert_axis: str = "output"

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 32
    qmin: ClassVar[int] = -8
    qmax: ClassVar[int] = 7
    scale_dtype: ClassVar[torch.dtype] = torch.float16
    # Name in this package: the dimension of `[E, in, out]`, and the words of config.json.
    expert_axes: ClassVar[dict[str, tuple[int, str]]] = {
        "output": (-1, "out (last dim of [E, in, out])"),
        "input": (-2, "in (middle dim of [E, in, out])"),
    }

    def __post_init__(self) -> None:
        if self.expert_axis not in self.expert_axes:
            raise ValueError(
                f"expert_axis={self.expert_axis!r} is no axis of the experts. Set 'output', the released format, or "
                "'input', which ExecuTorch's kernels read without rounding again."
            )

    @property
    def expert_dim(self) -> int:
        return self.expert_axes[self.expert_axis][0]

    @property
    def block(self) -> dict[str, Any]:
        """The `quantization` block of config.json; with experts along the output that of the releases, verbatim."""
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
        """FP16 scales of groups with these largest magnitudes, FP32."""
        scale = (absmax / ((cls.qmax - cls.qmin) / 2)).to(cls.scale_dtype)
        # A group of zeros still needs a scale that divides: the smallest FP16 number.
        return scale.clamp(min=2.0**-24)

    @classmethod
    def round_(cls, scaled: torch.Tensor) -> torch.Tensor:
        """Rounds weights that were divided by their scale to the grid's integers, in place."""
        return scaled.round_().clamp_(cls.qmin, cls.qmax)


# The block of the released config.json files.
INT4_BLOCK = Int4Format().block
# What the format stores in BF16; the router is FP32 and everything else is packed.
BF16_SUFFIXES = ("norm.weight", "expert_bias")
# A full-precision parameter and the two tensors that hold it packed.
PACKED_NAMES = {
    "weight": ("qweight", "weight_scale"),
    "gate_up_proj": ("gate_up_qweight", "gate_up_scale"),
    "down_proj": ("down_qweight", "down_scale"),
}


# The package sets it to `kernels.available`; a copy of this file on the Hub has no kernels beside it.
has_cpu_kernels: Callable[[], bool] = bool


def use_kernels(hidden_states: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the `mobilemoe::*` operators take these activations; they have no backward to them or the others."""
    return (
        hidden_states.dtype == torch.bfloat16
        and hidden_states.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *others)))
        and has_cpu_kernels()
    )


def quantize_tensor(weight: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rounds a weight to the INT4 grid, see [`Int4Format`].

    Args:
        weight (`torch.Tensor`): of shape `(..., n)`, n divisible by 32.
        dim (`int`, defaults to -1): along which the groups run, -1 or -2; below as for -1.

    Returns:
        The integers, int8 of shape `(..., n)`, and the scales, float16 of shape `(..., n / 32)`.

    Raises:
        ValueError: when the dimension does not divide into groups, or a value is not finite or too large.
    """
    group_size = Int4Format.group_size
    if weight.shape[dim] % group_size:
        which = "last" if dim == -1 else "input"
        raise ValueError(
            f"A weight of shape {tuple(weight.shape)} cannot be quantised: its {which} dimension is not divisible by "
            f"the group size {group_size}. Choose model widths that are multiples of {group_size}."
        )
    # (..., n / 32, 32), or (..., n / 32, 32, out): the group lies at `dim` either way.
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
    # The arithmetic right shift extends the sign of the nibble that the left shift moved to the top.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def dequantize_tensor(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, dim: int = -1) -> torch.Tensor:
    """Expands packed integers `(..., n / 2)` and scales, grouped along `dim`, to `(..., n)` by the dtype rule."""
    # Cast first: a product of int8 and FP32 leaves the vectorised path and takes three times as long.
    groups = unpack_int4(packed).float().unflatten(dim, (-1, Int4Format.group_size))
    return groups.mul_(scale.float().unsqueeze(dim)).flatten(dim - 1, dim).to(dtype)


class FixedDtypeModule(nn.Module):
    """Its tensors keep their dtype: `model.to(torch.bfloat16)` moves them between devices but never rounds them."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # An empty tensor holds nothing to round; `Int4Embedding` uses one to follow the model's dtype.
            return moved if moved.dtype == tensor.dtype or not tensor.numel() else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Int4Module(FixedDtypeModule):
    """Base of the packed modules; `group_dim` is the dimension of their weights along which groups run."""

    group_dim = -1

    def _add_packed(self, weight_name: str, scale_name: str, *shape: int) -> None:
        *leading, n = shape
        scale_shape = list(shape)
        scale_shape[self.group_dim] //= Int4Format.group_size
        # Buffers, not parameters: nothing here can be trained, and `model.dtype` must not be read off a scale.
        self.register_buffer(weight_name, torch.zeros(*leading, n // 2, dtype=torch.uint8))
        self.register_buffer(scale_name, torch.ones(scale_shape, dtype=Int4Format.scale_dtype))


class Int4Linear(Int4Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._add_packed("qweight", "weight_scale", out_features, in_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if use_kernels(hidden_states):
            return torch.ops.mobilemoe.int4_linear(hidden_states.contiguous(), self.qweight, self.weight_scale)
        weight = dequantize_tensor(self.qweight, self.weight_scale, hidden_states.dtype)
        return nn.functional.linear(hidden_states, weight)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, int4, group_size={Int4Format.group_size}"


class Int4Embedding(Int4Module):
    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._add_packed("qweight", "weight_scale", num_embeddings, embedding_dim)
        # Empty: it only follows `model.to(dtype)`, so that rows come out in the model's dtype.
        self.output_dtype = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return dequantize_tensor(self.qweight[input_ids], self.weight_scale[input_ids], self.output_dtype.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int4, group_size={Int4Format.group_size}"


class Int4Head(nn.Module):
    """The output head: the rows of the packed embedding as output channels. It has no tensors of its own."""

    # Rows expanded at a time, which bounds the memory that one call takes.
    chunk_size = 8192
    bias = None

    def __init__(self, embedding: Int4Embedding):
        super().__init__()
        # In a tuple, or it would be registered, and saved, as a second embedding.
        self._embedding = (embedding,)

    @property
    def weight(self) -> torch.Tensor:
        """The whole head, expanded: TRL's loss multiplies by it when adapters train over a packed model."""
        (embedding,) = self._embedding
        return dequantize_tensor(embedding.qweight, embedding.weight_scale, embedding.output_dtype.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (embedding,) = self._embedding
        if use_kernels(hidden_states):
            return torch.ops.mobilemoe.int4_linear(
                hidden_states.contiguous(), embedding.qweight, embedding.weight_scale
            )
        logits = hidden_states.new_empty(*hidden_states.shape[:-1], embedding.num_embeddings)
        for start in range(0, embedding.num_embeddings, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            weight = dequantize_tensor(embedding.qweight[rows], embedding.weight_scale[rows], hidden_states.dtype)
            logits[..., rows] = nn.functional.linear(hidden_states, weight)
        return logits


class Int4Experts(Int4Module):
    """Routed experts `[E, in, out]`, grouped along `group_dim`; only experts that a batch uses are expanded."""

    def __init__(
        self, num_experts: int, hidden_dim: int, intermediate_dim: int, act_fn: nn.Module, group_dim: int = -1
    ):
        super().__init__()
        self.group_dim = group_dim
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.act_fn = act_fn
        self._add_packed("gate_up_qweight", "gate_up_scale", num_experts, hidden_dim, 2 * intermediate_dim)
        self._add_packed("down_qweight", "down_scale", num_experts, intermediate_dim, hidden_dim)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # The operators know the released axis only.
        if self.group_dim == -1 and use_kernels(hidden_states, top_k_weights):
            return torch.ops.mobilemoe.moe_experts(
                hidden_states.contiguous(),
                top_k_index.contiguous(),
                top_k_weights.contiguous(),
                self.gate_up_qweight,
                self.gate_up_scale,
                self.down_qweight,
                self.down_scale,
            )
        dtype = hidden_states.dtype
        final_hidden_states = torch.zeros_like(hidden_states)  # (tokens, hidden)
        for expert_idx in top_k_index.unique().tolist():
            token_idx, top_k_pos = torch.where(top_k_index == expert_idx)
            gate_up = self._expand(self.gate_up_qweight, self.gate_up_scale, expert_idx, dtype)
            down = self._expand(self.down_qweight, self.down_scale, expert_idx, dtype)
            gate, up = (hidden_states[token_idx] @ gate_up).chunk(2, dim=-1)  # (routed, intermediate)
            expert_output = (self.act_fn(gate) * up) @ down  # (routed, hidden)
            expert_output = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, expert_output.to(dtype))
        return final_hidden_states

    def _expand(self, qweight: torch.Tensor, scale: torch.Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_tensor(qweight[expert], scale[expert], dtype, self.group_dim)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}"
        return f"{sizes}, int4, group_size={Int4Format.group_size}, group_dim={self.group_dim}"


def modules_to_pack(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linears, the embedding and the experts by name. The head shares the embedding; the rest stays as it is."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, nn.Embedding)) and module is not model.get_output_embeddings())
        or "gate_up_proj" in module._parameters
    }


def _packed_twin(module: nn.Module, dtype: torch.dtype, int4_format: Int4Format) -> Int4Module:
    """The packed module, still empty, that takes the place of `module`."""
    if isinstance(module, nn.Linear):
        return Int4Linear(module.in_features, module.out_features)
    if isinstance(module, nn.Embedding):
        return Int4Embedding(module.num_embeddings, module.embedding_dim, dtype)
    sizes = (module.num_experts, module.hidden_dim, module.intermediate_dim)
    return Int4Experts(*sizes, module.act_fn, int4_format.expert_dim)


def check_values(model: PreTrainedModel) -> None:
    """Refuses a packed model with values that no training writes: scales must be positive, all else finite."""
    for name, tensor in model.state_dict().items():
        is_scale = name.endswith("scale")
        if tensor.is_floating_point() and not bool((tensor.isfinite() & ((tensor > 0) | (not is_scale))).all()):
            kind = "scales that are zero, negative or not finite" if is_scale else "values that are not finite"
            raise ValueError(f"{name} holds {kind}. The file is damaged: fetch it again.")


def _pack_head(model: PreTrainedModel) -> None:
    """Points the output head at the packed embedding; the base model has no head and needs nothing."""
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(Int4Head(model.get_input_embeddings()))
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}


class MobileMoEInt4Config(QuantizationConfigMixin):
    """The `quantization` block. There is one grid, so every key but the experts' axis has one legal value."""

    def __init__(self, quant_method: str = "mobilemoe", **block: Any):
        unknown = sorted(set(block) - set(INT4_BLOCK))
        if unknown:
            raise ValueError(
                f"The quantization block of config.json has the key {unknown[0]!r}, which this format does not know. "
                "Reading past it could change every weight: remove it if it has no meaning."
            )
        for key, released in INT4_BLOCK.items():
            if key not in block:
                raise ValueError(
                    f"The quantization block of config.json lacks {key!r}, so its tensors cannot be read. "
                    f"Add {key!r}: {released!r} if the checkpoint is in the {INT4_BLOCK['format']} format."
                )
            legal = [Int4Format(axis).block[key] for axis in Int4Format.expert_axes]
            if not any(block[key] == value and type(block[key]) is type(value) for value in legal):
                raise ValueError(
                    f"The quantization block of config.json has {key}={block[key]!r}, which this format does not "
                    f"implement. Only {' or '.join(f'{key}={value!r}' for value in dict.fromkeys(legal))} can be read."
                )
        self.quant_method = quant_method
        for key, value in block.items():
            setattr(self, key, value)

    @property
    def int4_format(self) -> Int4Format:
        axes = {words: axis for axis, (_, words) in Int4Format.expert_axes.items()}
        return Int4Format(axes[self.expert_group_axis])


class MobileMoEInt4Quantizer(HfQuantizer):
    """Loads and saves packed checkpoints; `from_pretrained` finds it through the `quantization` block."""

    # A full-precision checkpoint is quantised by `quantize`, not while it loads.
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        dtype = model.dtype
        for name, module in modules_to_pack(model).items():
            model.set_submodule(name, _packed_twin(module, dtype, self.quantization_config.int4_format))
        _pack_head(model)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        # The plans name the full-precision tensors. They would leave the packed ones whole and sum their results over
        # ranks nevertheless; without a plan transformers refuses tp_size and ep_size.
        plan.clear()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_values(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict = model.state_dict()
        for name, tensor in state_dict.items():
            # As released: norms and expert biases BF16, the router FP32, packed tensors as they are.
            if name.endswith("router.weight"):
                state_dict[name] = tensor.float()
            elif name.endswith(BF16_SUFFIXES):
                state_dict[name] = tensor.bfloat16()
        return state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # Through adapters (lora.py); without them the trainer refuses a packed model.
        return True


def quantization_table(model: PreTrainedModel) -> str:
    """What of a model is stored how: one line per kind of tensor, layers taken together."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head."):
            continue
        if name.endswith("qweight"):
            axis = model.hf_quantizer.quantization_config.int4_format.expert_axis if "experts." in name else "input"
            stored, itemsize, parameters = f"INT4, groups of 32 along the {axis}", 1, 2 * tensor.numel()
        elif name.endswith("scale"):
            stored, itemsize, parameters = "float16, scales of the above", 2, 0
        elif name.endswith("router.weight"):
            stored, itemsize, parameters = "float32, not quantised", 4, tensor.numel()
        else:
            stored, itemsize, parameters = "bfloat16, not quantised", 2, tensor.numel()
        row = rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), stored), [0, 0, 0])
        row[:] = row[0] + 1, row[1] + parameters, row[2] + itemsize * tensor.numel()
    width = max(len(kind) for kind, _ in rows)
    lines = [f"{'tensor':{width}s}  {'tensors':>7s}  {'parameters':>13s}  {'bytes':>13s}  stored as"]
    for (kind, stored), (count, parameters, num_bytes) in rows.items():
        lines.append(f"{kind:{width}s}  {count:7d}  {parameters:13,d}  {num_bytes:13,d}  {stored}")
    totals = [sum(row[column] for row in rows.values()) for column in range(3)]
    lines.append(f"{'total':{width}s}  {totals[0]:7d}  {totals[1]:13,d}  {totals[2]:13,d}")
    return "\n".join(lines)


def quantize(model: PreTrainedModel, int4_format: Int4Format | None = None) -> PreTrainedModel:
    """
    Quantises a full-precision MobileMoE model to packed INT4, in place and module by module, and prints what became
    of every tensor.

    Linears, experts and the tied embedding are packed. The router stays FP32; norms and expert biases are rounded to
    the BF16 in which the format stores them, so that what is in memory equals what `save_pretrained` writes.

    Args:
        model (`PreTrainedModel`): full precision.
        int4_format (`Int4Format`, *optional*): the released one when absent.

    Raises:
        ValueError: when the model is packed already, has LoRA adapters, or a weight does not fit the grid. Only in the
            last case the model is then partly packed: load it again.
    """
    if model.config.quantization is not None:
        raise ValueError("This model is INT4 already; quantising it twice would lose accuracy. Use it as it is.")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "This model has LoRA adapters, for which INT4 has no place: `model.merge_and_unload()` first."
        )
    int4_format = int4_format or Int4Format()
    dtype = model.dtype
    modules = modules_to_pack(model)
    for name in tqdm(list(modules), desc="quantise to INT4", unit="module"):
        # Popped, so that its weights are freed before the next module is packed.
        module = modules.pop(name)
        tensors = {}
        twin = _packed_twin(module, dtype, int4_format)
        for parameter_name, (weight_name, scale_name) in PACKED_NAMES.items():
            if parameter_name in module._parameters:
                quantized, tensors[scale_name] = quantize_tensor(module._parameters[parameter_name], twin.group_dim)
                tensors[weight_name] = pack_int4(quantized)
        twin.load_state_dict(tensors, assign=True)
        model.set_submodule(name, twin)
    _pack_head(model)
    for name, tensor in model.state_dict().items():
        if name.endswith(BF16_SUFFIXES):
            tensor.copy_(tensor.bfloat16())
    model.config.quantization = int4_format.block
    model.config.quantization_config = MobileMoEInt4Config(**int4_format.block)
    model.hf_quantizer = MobileMoEInt4Quantizer(model.config.quantization_config)
    model.is_quantized = True
    print(quantization_table(model))
    return model


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """
    Expands a packed model to plain parameters in the model's dtype, in place and module by module.

    Raises:
        ValueError: when the model is not packed.
    """
    if model.config.quantization is None:
        raise ValueError("This model is not packed, there is nothing to dequantise. Use it as it is.")
    dtype = model.dtype
    model.config.quantization = None
    model.hf_quantizer.remove_quantization_config(model)
    # The skeleton knows which full-precision module belongs where.
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Int4Module)}
    for name in tqdm(list(packed), desc="dequantise", unit="module"):
        module = packed.pop(name)
        tensors = {
            parameter_name: dequantize_tensor(
                module._buffers[weight_name], module._buffers[scale_name], dtype, module.group_dim
            )
            for parameter_name, (weight_name, scale_name) in PACKED_NAMES.items()
            if weight_name in module._buffers
        }
        plain = skeleton.get_submodule(name)
        plain.load_state_dict(tensors, assign=True)
        model.set_submodule(name, plain)
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(skeleton.get_output_embeddings())
        del model._tied_weights_keys
        model.tie_weights()
        model.all_tied_weights_keys = skeleton.all_tied_weights_keys
    return model


def register_int4_quantizer() -> None:
    """Makes `from_pretrained` know the format. Assigned, not `register_quantizer`: remote code may import us twice."""
    AUTO_QUANTIZATION_CONFIG_MAPPING["mobilemoe"] = MobileMoEInt4Config
    AUTO_QUANTIZER_MAPPING["mobilemoe"] = MobileMoEInt4Quantizer
