"""
What a `.pte` has of the kernels, as modules that `torch.export` traces without compiled kernels.

Activations are FP32. INT4 weights are tiles (tiles_mobilemoe.py). A runtime needs the operators: [`load_executorch`]
registers them in this process, `EXECUTORCH_JNI_CUSTOM_LIBRARY` in an app (README.md).
"""

import torch
from torch import nn

from ..cache_mobilemoe import empty_cache
from ..packed_mobilemoe import Int4Experts
from ..tiles_mobilemoe import expert_tiles, gate_up_tiles, linear_tiles


# Tokens of which a layer is one parallel region; a program returns the logits of all of them.
FEW_TOKENS = 8
DEFAULT_CACHE = "int8"


class MoEFFN(nn.Module):
    """
    Router and routed experts of one layer: the checkpoint's integers and scales, in tiles.

    Args:
        layer (`nn.Module`): a decoder layer of a packed model.
        options (`object`, *optional*): of the exporter, for modules whose weights have a choice.

    Raises:
        ValueError: when the experts are not packed, or grouped along their input.
    """

    # What computes them in a program, see [`DecoderLayer`].
    operator = "mobilemoe::decoder_layer"
    # As the releases group them, see `Int4Format`.
    expert_axis = "output"

    def __init__(self, layer: nn.Module, options: object = None):
        super().__init__()
        router, experts = layer.feed_forward.router, layer.feed_forward.experts
        if not isinstance(experts, Int4Experts):
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
        self.register_buffer("packed_gate_up", gate_up_tiles(experts.gate_up_qweight, experts.gate_up_scale))
        self.register_buffer("packed_down", expert_tiles(experts.down_qweight, experts.down_scale))


class PackedMatrices(nn.Module):
    """
    Packed linears, or the embedding as one.

    Args:
        linears (`nn.Module`): `Int4Linear` or `Int4Embedding`.
    """

    def __init__(self, *linears: nn.Module):
        super().__init__()
        for i, linear in enumerate(linears):
            self.register_buffer(f"tiles_{i}", linear_tiles(linear.qweight, linear.weight_scale))

    def weights(self) -> list[torch.Tensor]:
        return list(self._buffers.values())


class PackedLinear(nn.Module):
    """The output head. Its tiles are those of the embedding."""

    def __init__(self, embedding: "PackedEmbedding"):
        super().__init__()
        self.out_features = embedding.num_embeddings
        self.register_buffer("tiles", embedding.tiles_0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.int4_linear(x, self.tiles, self.out_features)


class PackedEmbedding(PackedMatrices):
    def __init__(self, embedding: nn.Module):
        super().__init__(embedding)
        self.num_embeddings = embedding.num_embeddings

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.int4_embedding(tokens, self.tiles_0, self.num_embeddings)


class RMSNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float())
        self.eps = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.rms_norm(x, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """
    A whole layer as one `mobilemoe::decoder_layer`, `(1, T, hidden)` in and out.

    Args:
        layer (`nn.Module`): of a packed model.
        length (`int`): positions of the cache.
        kv_cache (`str`): the kind of [`empty_cache`].
        experts (`nn.Module`, *optional*): its [`MoEFFN`]; without, the layer has no routed experts.
    """

    def __init__(self, layer: nn.Module, length: int, kv_cache: str, experts: MoEFFN | None):
        super().__init__()
        attention, shared = layer.self_attn, layer.feed_forward.shared_expert
        self.eps = attention.config.rms_norm_eps
        num_heads = attention.config.num_key_value_heads
        self.register_buffer("kv_cache", empty_cache(num_heads, attention.head_dim, length, kv_cache))
        self.attention_norm = RMSNorm(layer.input_layernorm)
        self.attention = PackedMatrices(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.feed_forward_norm = RMSNorm(layer.post_attention_layernorm)
        self.feed_forward = PackedMatrices(shared.gate_proj, shared.up_proj, shared.down_proj)
        self.moe = experts

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        return torch.ops.mobilemoe.decoder_layer(
            hidden_states,
            cos,
            sin,
            self.kv_cache,
            start,
            [self.attention_norm.weight, *self.attention.weights()],
            [self.feed_forward_norm.weight, *self.feed_forward.weights()],
            [] if self.moe is None else list(self.moe._buffers.values()),
            0 if self.moe is None else self.moe.top_k,
            0.0 if self.moe is None else self.moe.route_scale,
            self.eps,
        )
