"""
What a `.pte` has of the kernels, as modules that `torch.export` traces without compiled kernels.

Activations are FP32. Tensors of the model are shared, not copied. A runtime needs the operators: [`load_executorch`]
registers them in this process, `EXECUTORCH_JNI_CUSTOM_LIBRARY` in an app (README.md).
"""

import torch
from torch import nn


# Positions of a block of the cache.
CACHE_BLOCK = 64
CACHE_BITS = {"fp32": 32, "bf16": 16, "int8": 8}
DEFAULT_CACHE = "int8"


def empty_cache(num_heads: int, head_dim: int, length: int, kind: str) -> torch.Tensor:
    """
    Memory for keys and values of a layer, as `mobilemoe::update_cache` and `mobilemoe::attention` take it.

    Args:
        num_heads (`int`): of keys.
        head_dim (`int`): a multiple of 16.
        length (`int`): positions, rounded up to whole blocks.
        kind (`str`): `"fp32"`, `"bf16"`, or `"int8"` with a step for every head and position, of keys and of values.

    Returns:
        Bytes of shape `(num_heads, blocks, bytes of a block)`. The operators tell the kind by the last.
    """
    block_bytes = 2 * CACHE_BLOCK * (head_dim * CACHE_BITS[kind] // 8 + (4 if kind == "int8" else 0))
    return torch.zeros(num_heads, -(-length // CACHE_BLOCK), block_bytes, dtype=torch.uint8)


class MoEFFN(nn.Module):
    """
    Router and routed experts of one layer as one `mobilemoe::moe_ffn`: the checkpoint's integers and scales as they
    are, `(tokens, hidden)` in and out.

    Args:
        layer (`nn.Module`): a decoder layer of a packed model.
        options (`object`, *optional*): of the exporter, for modules whose weights have a choice.

    Raises:
        ValueError: when the experts are not packed, or grouped along their input.
    """

    operator = "mobilemoe::moe_ffn"
    # As the releases group them, see `Int4Format`.
    expert_axis = "output"

    def __init__(self, layer: nn.Module, options: object = None):
        super().__init__()
        router, experts = layer.feed_forward.router, layer.feed_forward.experts
        packed = ("gate_up_qweight", "gate_up_scale", "down_qweight", "down_scale")
        if any(name not in experts._buffers for name in packed):
            raise ValueError(f"{self.operator} multiplies packed INT4 experts, and these are not: quantize the model.")
        if experts.group_dim != -1:
            raise ValueError(
                f"{self.operator} reads experts grouped along their output, as released, and these are grouped along "
                "their input. Export them with llama::quantized_moe_ffn, which takes that axis."
            )
        self.top_k = router.top_k
        self.route_scale = float(router.routed_scaling_factor)
        self.register_buffer("router", router.weight.detach().float())
        self.register_buffer("expert_bias", layer.feed_forward.expert_bias.float())
        for name in packed:
            self.register_buffer(f"packed_{name}", experts._buffers[name])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.moe_ffn(
            hidden_states,
            self.router,
            self.expert_bias,
            self.packed_gate_up_qweight,
            self.packed_gate_up_scale,
            self.packed_down_qweight,
            self.packed_down_scale,
            self.top_k,
            self.route_scale,
        )


class PackedMatrices(nn.Module):
    """
    Packed linears, or the embedding as one.

    Args:
        linears (`nn.Module`): `Int4Linear` or `Int4Embedding`.
    """

    def __init__(self, *linears: nn.Module):
        super().__init__()
        for i, linear in enumerate(linears):
            self.register_buffer(f"qweight_{i}", linear.qweight)
            self.register_buffer(f"scale_{i}", linear.weight_scale)

    def weights(self) -> list[torch.Tensor]:
        """Every matrix, followed by its scales."""
        return list(self._buffers.values())


class PackedLinear(PackedMatrices):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.int4_linear(x, *self.weights())


class PackedEmbedding(PackedMatrices):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.int4_embedding(tokens, *self.weights())


class PackedMLP(PackedMatrices):
    """A SwiGLU feed-forward of `gate_proj`, `up_proj` and `down_proj`."""

    def __init__(self, mlp: nn.Module):
        super().__init__(mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.mlp(x, self.weights())


class AttentionInputs(PackedMatrices):
    """Queries, keys and values `(B, T, heads, D)`, the first two rotated and normalised."""

    def __init__(self, attention: nn.Module):
        super().__init__(attention.q_proj, attention.k_proj, attention.v_proj)
        self.eps = attention.config.rms_norm_eps

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.mobilemoe.attention_inputs(x, self.weights(), cos, sin, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float())
        self.eps = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.rms_norm(x, self.weight, self.eps)
