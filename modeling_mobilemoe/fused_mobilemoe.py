"""What a packed model is made of: the number grid of `mobilemoe-int4-g32`, and the modules that hold and use it.

Every quantised tensor is stored as two: signed 4-bit integers, two to a byte, and FP16 scales. Nibble pairs run along
the *last* dimension of the tensor as stored. So do groups of 32: for linears `[out, in]` and the embedding
`[vocab, hidden]` that is the input axis; for experts `[E, in, out]` it is the output axis, as released. Experts may
instead be grouped along their input, the middle dimension, which is what stock ExecuTorch kernels read: their scales
are then `[E, in / 32, out]`, the integers are stored as before, and the `quantization` block of config.json says so.

The dtype rule: a weight is `integer * scale`, multiplied in FP32 (exact: 4 + 11 significant bits) and rounded once to
the model's dtype. In FP32 a packed model therefore equals its dequantised twin bit for bit. Weights are expanded one
matrix at a time, when they are used, and never kept.

A BF16 model on the CPU skips the expansion where the package's C++ kernels are available: they multiply the packed
integers by activations rounded to INT8, in finer blocks than QAT rounds them. FP32 and training mode always take the
exact path, with or without gradients: trainers compare log-probabilities of both. From the first call of the kernels
on, a module holds its integers and scales in tiles, the order in which they are read, in place of the checkpoint's
tensors. Those come back when they are asked for, and are what is saved. In decoding, calling a module from Python
takes as long as many of them compute, so [`Int4FeedForward`] and [`Int4AttentionInputs`] run one operator for several
modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .tiles_mobilemoe import (
    expert_tiles,
    expert_weights,
    gate_up_tiles,
    gate_up_weights,
    linear_tiles,
    linear_weights,
)


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


# The package sets this to `kernels.available`. A copy of this file on the Hub comes without the kernels.
has_cpu_kernels: Callable[[], bool] = bool


# Looked up when a graph is traced, and not traced itself: the first call builds the kernels.
@torch.compiler.assume_constant_result
def _has_cpu_kernels() -> bool:
    return has_cpu_kernels()


def use_kernels(training: bool, hidden_states: torch.Tensor, *others: torch.Tensor) -> bool:
    """
    Whether the `mobilemoe::*` operators may run. They have no backward pass to the activations or other tensors.

    Args:
        training (`bool`): the mode of the calling module.
        hidden_states, others (`torch.Tensor`): what a backward pass would reach.
    """
    return (
        hidden_states.dtype == torch.bfloat16
        and hidden_states.device.type == "cpu"
        and not training
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *others)))
        and _has_cpu_kernels()
    )


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


class FixedDtypeModule(nn.Module):
    """
    A module whose own tensors keep their dtype: `model.to(...)` moves them between devices but never rounds them.

    The modules inside it follow the dtype.
    """

    # `nn.Module` has no public way to exempt a tensor from `to(dtype)`.
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            # An empty tensor does take the new dtype: `Int4Embedding` has one to follow the model's dtype.
            return moved if moved.dtype == tensor.dtype or not tensor.numel() else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(move, recurse=False)


class Int4Module(FixedDtypeModule):
    """
    Base of the packed modules, which hold a checkpoint's tensors or the same numbers in tiles.

    `group_dim` is the dimension of the weights along which groups run.
    """

    group_dim = -1
    # Names of tiles: those of the integers and scales that they hold.
    layouts: ClassVar[dict[str, tuple[str, str]]] = {"tiles": ("qweight", "weight_scale")}

    def _add_packed(self, weight_name: str, scale_name: str, *shape: int) -> None:
        *leading, n = shape
        scale_shape = list(shape)
        scale_shape[self.group_dim] //= Int4Format.group_size
        # Buffers, not parameters: they cannot be trained, and `model.dtype` must not be that of a scale.
        self.register_buffer(weight_name, torch.zeros(*leading, n // 2, dtype=torch.uint8))
        self.register_buffer(scale_name, torch.ones(scale_shape, dtype=Int4Format.scale_dtype))

    def _to_tiles(self, name: str, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return linear_tiles(qweight, scale)

    def _from_tiles(self, name: str, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    @property
    def is_tiled(self) -> bool:
        return any(name in self._buffers for name in self.layouts)

    # Not traced, but called when a graph is: what it changes would break the graph.
    @torch.compiler.assume_constant_result
    def _keep_tiles(self) -> bool:
        """Replaces the checkpoint's tensors by tiles, unless accelerate brings those for every call."""
        if "forward" in self.__dict__:
            return False
        for name, stored in self.layouts.items():
            if name not in self._buffers:
                tiles = self._to_tiles(name, *map(self.get_buffer, stored))
                for part in stored:
                    del self._buffers[part]
                self.register_buffer(name, tiles, persistent=False)
        return True

    def tiles_of(self, name: str = "tiles") -> torch.Tensor:
        """Weights as the kernels take them."""
        if self._keep_tiles():
            return self.get_buffer(name)
        return self._to_tiles(name, *(getattr(self, part) for part in self.layouts[name]))

    @torch.compiler.assume_constant_result
    def _restore(self) -> bool:
        """Replaces tiles by the checkpoint's tensors."""
        for name, stored in self.layouts.items():
            if name in self._buffers:
                tensors = self._from_tiles(name, self.get_buffer(name))
                del self._buffers[name]
                for part, tensor in zip(stored, tensors, strict=True):
                    self.register_buffer(part, tensor)
        return True

    def __getattr__(self, name: str) -> Any:
        for tiles, stored in self.layouts.items():
            if name in stored and tiles in self._buffers:
                return self._from_tiles(tiles, self.get_buffer(tiles))[stored.index(name)]
        return super().__getattr__(name)

    # State dicts have a checkpoint's tensors.
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stored in self.layouts.items():
            if name in self._buffers:
                tensors = self._from_tiles(name, self.get_buffer(name))
                destination.update(zip((prefix + part for part in stored), tensors, strict=True))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)


class PackedWeight(torch.Tensor):
    """The integers of an [`Int4Linear`] for readers of `weight`, which must not be written."""

    # Weight initialisation of transformers leaves it alone.
    _is_hf_initialized = True

    @property
    def data(self) -> torch.Tensor:  # ty: ignore[incompatible-property-override]
        # PEFT merges adapters by it.
        raise ValueError(
            "An adapter cannot be merged into a packed INT4 weight: the sum is not on its grid. Save the adapter, "
            "load it onto dequantize(model), merge there, and quantize the result."
        )


class Int4Linear(Int4Module, nn.Linear):
    """
    A packed linear without bias, `[out, in]`, grouped along the input.

    A subclass of `nn.Linear` because PEFT adapts those and no others. Adapters train on it; merging one is an error.
    """

    qweight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int):
        # That of `nn.Linear` would make the weight.
        nn.Module.__init__(self)
        self.register_parameter("bias", None)
        self.in_features = in_features
        self.out_features = out_features
        self._add_packed("qweight", "weight_scale", out_features, in_features)

    def forward(  # ty: ignore[lost-keyword-for-regular-parameter]
        self, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        if use_kernels(self.training, hidden_states):
            return torch.ops.mobilemoe.int4_linear(hidden_states.contiguous(), self.tiles_of(), self.out_features)
        self._restore()
        weight = dequantize_tensor(self.qweight, self.weight_scale, hidden_states.dtype)
        return nn.functional.linear(hidden_states, weight)

    def _from_tiles(self, name: str, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_weights(tiles, self.out_features)

    @property
    def weight(self) -> torch.Tensor:  # ty: ignore[incompatible-property-override]
        """Where and how the weight is stored, which is what PEFT asks of it; not its values."""
        return self.qweight.as_subclass(PackedWeight)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, int4, group_size={Int4Format.group_size}"


class Int4Embedding(Int4Module):
    """A packed embedding, `[vocab, hidden]`, grouped along its rows. Only those that are read are expanded."""

    # Rows of the output head that are expanded at a time, to bound the memory of one call.
    chunk_size = 8192

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    output_dtype: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._add_packed("qweight", "weight_scale", num_embeddings, embedding_dim)
        # Empty: it only follows `model.to(dtype)`, so that embeddings are returned in the model's dtype.
        self.output_dtype = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)

    def forward(
        self, input_ids: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The embeddings of `input_ids`, or the logits of `hidden_states`, whose head is this table."""
        if hidden_states is not None:
            return self._project(hidden_states)
        if use_kernels(self.training, self.output_dtype):
            tokens = cast(torch.Tensor, input_ids).contiguous()
            rows = torch.ops.mobilemoe.int4_embedding(tokens, self.tiles_of(), self.num_embeddings)
            return rows.to(self.output_dtype.dtype)
        self._restore()
        return dequantize_tensor(self.qweight[input_ids], self.weight_scale[input_ids], self.output_dtype.dtype)

    def _from_tiles(self, name: str, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_weights(tiles, self.num_embeddings)

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if use_kernels(self.training, hidden_states):
            return torch.ops.mobilemoe.int4_linear(hidden_states.contiguous(), self.tiles_of(), self.num_embeddings)
        self._restore()
        logits = hidden_states.new_empty(*hidden_states.shape[:-1], self.num_embeddings)
        for start in range(0, self.num_embeddings, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            weight = dequantize_tensor(self.qweight[rows], self.weight_scale[rows], hidden_states.dtype)
            logits[..., rows] = nn.functional.linear(hidden_states, weight)
        return logits

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int4, group_size={Int4Format.group_size}"


class Int4Head(nn.Module):
    """The output head, tied to the packed embedding. It has no tensors of its own."""

    bias = None

    def __init__(self, embedding: Int4Embedding):
        super().__init__()
        # In a tuple, because a submodule would be saved as a second embedding.
        self._embedding = (embedding,)

    @property
    def weight(self) -> torch.Tensor:
        """The whole head, expanded: TRL's loss reads it when adapters are trained on a packed model."""
        (embedding,) = self._embedding
        return dequantize_tensor(embedding.qweight, embedding.weight_scale, embedding.output_dtype.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (embedding,) = self._embedding
        # Called as a module: under accelerate's offloading, its tensors are there during its call only.
        return embedding(hidden_states=hidden_states)


class ExpandedExperts:
    """An experts module with other weights, for the experts functions of transformers."""

    def __init__(self, experts: nn.Module, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.experts = experts
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def __getattr__(self, name: str):
        return getattr(self.experts, name)


class Int4Experts(Int4Module):
    """Routed experts `[E, in, out]`, grouped along `group_dim`. Only the experts that a batch uses are expanded."""

    # What the experts functions of transformers read, as its decorator sets it on the experts of a model:
    # https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/integrations/moe.py#L620
    has_gate = is_concatenated = is_transposed = True
    has_bias = has_post_expert_norm = _is_expert_parallel = False

    layouts = {
        "gate_up_tiles": ("gate_up_qweight", "gate_up_scale"),
        "down_tiles": ("down_qweight", "down_scale"),
    }
    gate_up_qweight: torch.Tensor
    gate_up_scale: torch.Tensor
    down_qweight: torch.Tensor
    down_scale: torch.Tensor

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
        # The operator reads experts that are grouped along their output only.
        if self.group_dim == -1 and use_kernels(self.training, hidden_states, top_k_weights):
            return torch.ops.mobilemoe.moe_experts(
                hidden_states.contiguous(),
                top_k_index.contiguous(),
                top_k_weights.contiguous(),
                self.tiles_of("gate_up_tiles"),
                self.tiles_of("down_tiles"),
            )
        self._restore()
        if torch.compiler.is_compiling():
            return self._compilable(hidden_states, top_k_index, top_k_weights)
        dtype = hidden_states.dtype
        final_hidden_states = torch.zeros_like(hidden_states)  # (tokens, hidden)
        for expert_idx in top_k_index.unique().tolist():
            token_idx, top_k_pos = torch.where(top_k_index == expert_idx)
            gate_up = self._expand(self.gate_up_qweight, self.gate_up_scale, expert_idx, dtype)
            down = self._expand(self.down_qweight, self.down_scale, expert_idx, dtype)
            expert_output = self._apply_gate(hidden_states[token_idx] @ gate_up) @ down  # (routed, hidden)
            expert_output = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, expert_output.to(dtype))
        return final_hidden_states

    def _to_tiles(self, name: str, qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (gate_up_tiles if name == "gate_up_tiles" else expert_tiles)(qweight, scale)

    def _from_tiles(self, name: str, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (gate_up_weights if name == "gate_up_tiles" else expert_weights)(tiles)

    def _compilable(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The same without shapes that depend on the routing, on which `torch.compile` would break the graph."""
        dtype, top_k = hidden_states.dtype, top_k_index.shape[1]
        if top_k_index.numel() >= self.num_experts:
            gate_up = self._expand(self.gate_up_qweight, self.gate_up_scale, slice(None), dtype)
            down = self._expand(self.down_qweight, self.down_scale, slice(None), dtype)
            # It has what transformers reads of the module.
            experts = cast(nn.Module, ExpandedExperts(self, gate_up, down))
            return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
        # Few tokens: every one expands its own experts, fewer than there are.
        expert_ids = top_k_index.flatten()  # (tokens * top_k)
        gate_up = self._expand(self.gate_up_qweight, self.gate_up_scale, expert_ids, dtype)
        down = self._expand(self.down_qweight, self.down_scale, expert_ids, dtype)
        inputs = hidden_states.repeat_interleave(top_k, dim=0).unsqueeze(1)  # (tokens * top_k, 1, hidden)
        expert_output = (self._apply_gate(inputs @ gate_up) @ down).view(-1, top_k, self.hidden_dim)
        return (expert_output * top_k_weights.unsqueeze(-1)).sum(dim=1).to(dtype)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # (routed, intermediate)
        return self.act_fn(gate) * up

    def _expand(
        self, qweight: torch.Tensor, scale: torch.Tensor, experts: int | slice | torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return dequantize_tensor(qweight[experts], scale[experts], dtype, self.group_dim)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}"
        return f"{sizes}, int4, group_size={Int4Format.group_size}, group_dim={self.group_dim}"


def is_untouched(*modules: nn.Module) -> bool:
    """Whether these modules have no hooks, so that one operator may run in place of all of them."""
    # `nn.Module` has no public way to list its hooks. accelerate replaces `forward` to load offloaded tensors.
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules
    )


class Int4FeedForward(FixedDtypeModule):
    """
    Takes over the modules of a `MobileMoEFeedForward` whose experts are packed, under their names.

    One operator computes the whole block for BF16 models on the CPU. The modules run one by one for other models, in
    training, and as soon as a hook is registered on one of them or an adapter replaces one. Both paths choose the same
    experts; the operator keeps the routing weights in FP32.

    Args:
        router, experts, shared_expert (`nn.Module`): of the block.
        expert_bias (`torch.Tensor`): of shape `(E,)`, FP32.
    """

    # Their classes are in `modeling_mobilemoe.py`, which imports this file, or those of adapters.
    router: Any
    experts: Any
    shared_expert: Any
    expert_bias: torch.Tensor

    def __init__(self, router: nn.Module, experts: nn.Module, shared_expert: nn.Module, expert_bias: torch.Tensor):
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.register_buffer("expert_bias", expert_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._may_fuse(hidden_states):
            return self._fused(hidden_states)
        # As `MobileMoEFeedForward`.
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, hidden)
        _, top_k_weights, top_k_index = self.router(flat_hidden_states, self.expert_bias)
        top_k_weights = top_k_weights.to(hidden_states.dtype)
        routed = self.experts(flat_hidden_states, top_k_index, top_k_weights).view_as(hidden_states)
        return routed + self.shared_expert(hidden_states)

    def _shared_linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.shared_expert.gate_proj, self.shared_expert.up_proj, self.shared_expert.down_proj

    def _may_fuse(self, hidden_states: torch.Tensor) -> bool:
        # The operator reads experts that are grouped along their output only.
        if type(self.experts) is not Int4Experts or self.experts.group_dim != -1:
            return False
        if not use_kernels(self.training, hidden_states, self.router.weight):
            return False
        linears = self._shared_linears()
        return all(type(linear) is Int4Linear for linear in linears) and is_untouched(
            self.router, self.experts, self.shared_expert, *linears
        )

    def _fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.feed_forward(
            hidden_states.contiguous(),
            self.router.weight,
            self.expert_bias,
            self.experts.tiles_of("gate_up_tiles"),
            self.experts.tiles_of("down_tiles"),
            self.router.top_k,
            self.router.routed_scaling_factor,
            [cast(Int4Linear, linear).tiles_of() for linear in self._shared_linears()],
        )


class Int4AttentionInputs(nn.Module):
    """
    Computes queries, keys and values in one operator, under the same conditions as [`Int4FeedForward`].

    Args:
        plain (`nn.Module`): the `MobileMoEAttentionInputs` that it replaces and calls where the operator cannot run.
    """

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain

    def forward(
        self,
        hidden_states: torch.Tensor,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        linears = (q_proj, k_proj, v_proj)
        if (
            not all(type(linear) is Int4Linear for linear in linears)
            or not use_kernels(self.training, hidden_states)
            or not is_untouched(*linears)
        ):
            return self.plain(hidden_states, q_proj, k_proj, v_proj, cos, sin)
        packed = [cast(Int4Linear, linear) for linear in linears]
        num_heads, num_kv_heads = (linear.out_features // (2 * cos.shape[-1]) for linear in packed[:2])
        states = torch.ops.mobilemoe.attention_inputs(
            hidden_states.contiguous(),
            [linear.tiles_of() for linear in packed],
            num_heads,
            num_kv_heads,
            cos,
            sin,
            self.plain.eps,
        )
        return tuple(heads.transpose(1, 2) for heads in states)  # (B, heads, T, D)
