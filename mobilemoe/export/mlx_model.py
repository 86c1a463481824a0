"""MobileMoE for mlx-lm, which loads this file from the checkpoint's directory (`model_file` in config.json).

Experts of a released INT4 checkpoint are grouped along their output. MLX has kernels for that, but mlx-lm's own layer
for experts takes the other axis only: `OutputGroupedExperts` is why this file exists.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRASwitchLinear


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    # `rope_scaling` of MobileMoE under a name of its own, as transformers reads this file for the tokenizer's sake and
    # fails over that key in a model that it does not know.
    rope_llama3: dict[str, Any]
    num_local_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    # "output": stored (E, in, out), with groups along the last dimension. Else (E, out, in), as mlx-lm stores them.
    expert_axis: str = "input"


def rope_periods(args: ModelArgs) -> mx.array:
    """Tokens per radian of every pair: the llama3 rule, in which both edges of the smooth band may be one."""
    scaling = args.rope_llama3
    context, low, high = (
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    periods = []
    for i in range(0, args.head_dim, 2):
        inv_freq = args.rope_theta ** (-i / args.head_dim)
        turns = context * inv_freq / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0) if high > low else float(turns >= low)
        periods.append(1 / (keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]))
    return mx.array(periods, dtype=mx.float32)


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # Cast: a weight of another type would make half-precision activations FP32.
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self._periods = rope_periods(args)
        query, key = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, args.hidden_size, bias=False)

    def __call__(self, x: mx.array, mask: Any, cache: Any | None) -> mx.array:
        offset = cache.offset if cache is not None else 0
        queries, keys = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        values = self._heads(self.v_proj(x))
        queries, keys = self._rotate(queries, offset), self._rotate(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        scale = self.args.head_dim**-0.5
        output = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (-1, self.args.head_dim)).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: Any) -> mx.array:
        x = mx.fast.rms_norm(x, None, self.args.rms_norm_eps)
        # By halves: the rows of both projections were permuted for it.
        return mx.fast.rope(
            x, self.args.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size_mlp, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size_mlp, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size_mlp, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class OutputGroupedExperts(nn.Module):
    """One projection of all experts, `(E, in, out)`; mlx-lm's `SwitchLinear` has `(E, out, in)`."""

    def __init__(self, input_dims: int, output_dims: int, num_experts: int):
        super().__init__()
        scale = math.sqrt(1 / input_dims)
        self.weight = mx.random.uniform(-scale, scale, (num_experts, input_dims, output_dims))

    # The names by which mlx-lm's LoRA asks.
    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def input_dims(self) -> int:
        return self.weight.shape[1]

    @property
    def output_dims(self) -> int:
        return self.weight.shape[2]

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return mx.gather_mm(x, self.weight, rhs_indices=indices, sorted_indices=sorted_indices)

    def dequantize(self) -> mx.array:
        return self.weight

    def to_quantized(self, group_size: int = 32, bits: int = 4, mode: str = "affine") -> "PackedExperts":
        return PackedExperts(self.weight, group_size, bits)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> "LoRAExperts":
        return LoRAExperts(self, r, dropout, scale)


class PackedExperts(OutputGroupedExperts):
    """The same in 4 bits."""

    def __init__(self, weight: mx.array, group_size: int, bits: int):
        nn.Module.__init__(self)
        self.group_size, self.bits = group_size, bits
        self.weight, self.scales, self.biases = mx.quantize(weight, group_size, bits)
        self.freeze()

    @property
    def output_dims(self) -> int:
        return self.scales.shape[2] * self.group_size

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=indices,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_indices,
        )

    def dequantize(self) -> mx.array:
        return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)


class LoRAExperts(LoRASwitchLinear):
    def __init__(self, base: OutputGroupedExperts, r: int, dropout: float, scale: float):
        super().__init__(base.input_dims, base.output_dims, base.num_experts, r, dropout, scale)
        self.linear = base

    def fuse(self, dequantize: bool = False) -> OutputGroupedExperts:
        base = self.linear
        fused = OutputGroupedExperts(base.input_dims, base.output_dims, base.num_experts)
        delta = (self.scale * self.lora_b) @ self.lora_a  # (E, out, in)
        weight = base.dequantize()
        fused.weight = weight + delta.swapaxes(-1, -2).astype(weight.dtype)
        is_packed = isinstance(base, PackedExperts)
        return fused.to_quantized(base.group_size, base.bits) if is_packed and not dequantize else fused


class Router(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = mx.zeros((args.num_local_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.num_local_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        # FP32 whatever the activations are: near-ties decide which experts run.
        scores = mx.sigmoid(x.astype(mx.float32) @ self.weight.astype(mx.float32).T)
        # The bias selects, the score weighs.
        top_k = self.args.num_experts_per_tok
        biased = scores + self.e_score_correction_bias
        indices = mx.argpartition(-biased, kth=top_k - 1, axis=-1)[..., :top_k]
        indices = mx.stop_gradient(indices)
        weights = mx.take_along_axis(scores, indices, axis=-1)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20) * self.args.routed_scaling_factor
        return indices, weights


class MoE(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        sizes = (args.hidden_size, args.intermediate_size, args.num_local_experts)
        self.gate = Router(args)
        self.experts = SwitchGLU(*sizes)
        if args.expert_axis == "output":
            hidden, width, num_experts = sizes
            self.experts.gate_proj = OutputGroupedExperts(hidden, width, num_experts)
            self.experts.up_proj = OutputGroupedExperts(hidden, width, num_experts)
            self.experts.down_proj = OutputGroupedExperts(width, hidden, num_experts)
        self.shared_experts = MLP(args)

    def __call__(self, x: mx.array) -> mx.array:
        indices, weights = self.gate(x)
        routed = self.experts(x, indices)  # (..., top_k, hidden)
        return (routed * weights[..., None].astype(routed.dtype)).sum(axis=-2) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mlp = MoE(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MobileMoEModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: list | None, input_embeddings: mx.array | None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, mask, layer_cache)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = MobileMoEModel(args)

    def __call__(
        self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, cache, input_embeddings))

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    @property
    def cast_predicate(self):
        # What mlx-lm leaves in FP32 when it converts the rest.
        return lambda name: "mlp.gate." not in name
