"""The modules of a packed model: linears, embedding, head and experts that hold INT4 weights and use them.

Weights are expanded one matrix at a time, when they are used, and never kept.

A BF16 model on the CPU skips the expansion where the package's C++ kernels are available: they multiply the packed
integers by activations rounded to INT8, in finer blocks than QAT rounds them. FP32 and training mode always take the
exact path, with or without gradients: trainers compare log-probabilities of both. From the first call of the kernels
on, a module holds its integers and scales in tiles, the order in which they are read, in place of the checkpoint's
tensors. Those come back when they are asked for, and are what is saved.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .int4_mobilemoe import Int4Format, dequantize_tensor
from .tiles_mobilemoe import (
    expert_tiles,
    expert_weights,
    gate_up_tiles,
    gate_up_weights,
    linear_tiles,
    linear_weights,
)


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
        tiles = self._buffers.get(name)
        if tiles is not None:
            return tiles
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
