"""MobileMoE: a decoder whose every layer routes each token to 4 of 60 small experts and one shared expert.

The architecture of "MobileMoE: Scaling On-Device Mixture of Experts" (arXiv 2605.27358) under its released names:

- pre-norm RMSNorm, grouped-query attention, tied embedding, no biases anywhere;
- RoPE on adjacent channel pairs, then a weightless per-head RMS norm of queries and keys;
- a sigmoid router in FP32 whose bias takes part in the selection only;
- experts stored `[E, in, out]`, gate and up side by side, weights applied to the expert output.

Shapes in the comments below: B batch, T sequence, H hidden_size, N query heads, K key-value heads, D head_dim,
E num_local_experts, I intermediate_size, V vocab_size; "tokens" is B * T.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checkpoint_mobilemoe import CheckpointMixin
from .configuration_mobilemoe import MobileMoEConfig
from .fused_mobilemoe import Int4DecoderLayer
from .packed_mobilemoe import ExpandedExperts, FixedDtypeModule
from .quantization_mobilemoe import prepare_packed, resize_packed_embedding


class MobileMoERMSNorm(nn.Module):
    """RMS norm over the last dimension, with a weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * rms_normalize(hidden_states, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def rms_normalize(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides the last dimension by its root mean square. Used without a weight on queries and keys."""
    # `F.rms_norm` computes the statistics in FP32 for half-precision inputs, and is one kernel instead of five.
    return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=eps)


def default_inv_freq(config: MobileMoEConfig) -> torch.Tensor:
    """RoPE without scaling: `(head_dim / 2,)`, in radians per token."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_theta**exponent


def llama3_inv_freq(config: MobileMoEConfig) -> torch.Tensor:
    """The llama3 rule: short wavelengths are kept, long ones stretched by `factor`, those between interpolated."""
    scaling = config.rope_scaling
    # The configuration fills it in.
    assert scaling is not None
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    inv_freq = default_inv_freq(config)
    # Turns within the original context. Above `high` a frequency is kept, below `low` it is divided by `factor`.
    turns = context * inv_freq / (2 * math.pi)
    if high > low:
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # The released configs have low == high: no band to interpolate, and its formula would divide by zero.
        keep = (turns >= low).float()
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def rope_config(config: MobileMoEConfig) -> PreTrainedConfig:
    """What the RoPE functions of transformers read, under their names: the released configs have others."""
    stock = PreTrainedConfig()
    stock.rope_parameters = {**(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    stock.head_dim, stock.max_position_embeddings = config.head_dim, config.max_position_embeddings
    stock.hidden_size, stock.num_attention_heads = config.hidden_size, config.num_attention_heads
    return stock


def compute_rope(config: MobileMoEConfig) -> tuple[torch.Tensor, float]:
    """
    The frequencies that the rule of `rope_scaling` gives within `max_position_embeddings`.

    Returns:
        `torch.Tensor` of shape `(head_dim / 2,)` in radians per token, and the attention factor of YaRN and LongRoPE.

    Raises:
        ValueError: for a `rope_scaling` that [`MobileMoEConfig`] refuses.
    """
    # Again: `from_pretrained` may have set it after the configuration was made.
    config.check_rope_scaling()
    assert config.rope_scaling is not None
    rope_type = config.rope_scaling["rope_type"]
    if rope_type == "llama3":
        return llama3_inv_freq(config), 1.0
    if rope_type == "default":
        return default_inv_freq(config), 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](rope_config(config))


class MobileMoERotaryEmbedding(FixedDtypeModule):
    """Cosines and sines of RoPE by position, in FP32 whatever the model's dtype."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        # Under the names that `dynamic_rope_update` reads.
        self.config = rope_config(config)
        self.rope_type = self.config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = compute_rope(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # In FP32: at position 8191 a half-precision product is wrong by whole turns.
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device)  # (B, T, D/2)
        return angles.cos(), angles.sin()


def apply_rotary_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates adjacent channel pairs (2i, 2i+1), as the released models were trained, not channels of the two halves.

    Args:
        states (`torch.Tensor`): queries or keys of shape `(B, T, heads, D)`.
        cos, sin (`torch.Tensor`): FP32, of shape `(B, T, D/2)`.
    """
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, D/2)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)  # (B, T, heads, D/2, 2)
    return rotated.flatten(-2).type_as(states)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    return hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: "MobileMoEAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    key = repeat_kv(key, module.num_key_value_groups)  # (B, N, T, D)
    value = repeat_kv(value, module.num_key_value_groups)
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, N, T, T)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (B, T, N, D)
    return attn_output, attn_weights


class MobileMoEAttentionInputs(nn.Module):
    """
    Projects hidden states to queries, keys and values, and rotates and normalises queries and keys.

    It gets the projections as arguments: they belong to the attention, under the released names.
    """

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = q_proj(hidden_states).view(hidden_shape)  # (B, T, N, D)
        key_states = k_proj(hidden_states).view(hidden_shape)  # (B, T, K, D)
        value_states = v_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # (B, K, T, D)
        # The norm follows the rotation, as in Llama 4: the cache holds rotated, normalised keys.
        query_states = rms_normalize(apply_rotary_emb(query_states, cos, sin), self.eps).transpose(1, 2)
        key_states = rms_normalize(apply_rotary_emb(key_states, cos, sin), self.eps).transpose(1, 2)
        return query_states, key_states, value_states


class MobileMoEAttention(nn.Module):
    """Grouped-query attention with RoPE, then a weightless norm of queries and keys."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # YaRN and LongRoPE scale queries and keys through the cosines and sines. Here a norm follows, which would undo
        # that, so the scores are scaled by the square.
        self.scaling = self.head_dim**-0.5 * compute_rope(config)[1] ** 2
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.inputs = MobileMoEAttentionInputs(config)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query_states, key_states, value_states = self.inputs(
            hidden_states, self.q_proj, self.k_proj, self.v_proj, *position_embeddings
        )
        if cache is not None:
            # The paged cache of continuous batching edits the arguments of its attention.
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


class MobileMoEMLP(nn.Module):
    """The shared expert: a SwiGLU block applied to every token."""

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size_mlp, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def grouped_mm_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The grouped matmul of transformers, in BF16 under autocast.

    Autocast does not cover `grouped_mm` (https://github.com/pytorch/pytorch/issues/174763): it computes in the dtype
    of the weights, so FP32 master weights would silently give an FP32 product.
    """
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        gate_up = cast(torch.Tensor, experts.gate_up_proj).to(dtype)
        down = cast(torch.Tensor, experts.down_proj).to(dtype)
        # It has what transformers reads of the module.
        experts = ExpandedExperts(experts, gate_up, down)  # ty: ignore[invalid-assignment]
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


EXPERTS_FUNCTIONS = ExpertsInterface()
EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm_experts


# transformers searches the source for this decorator, in this spelling, before it enables its fast implementations.
@use_experts_implementation(is_transposed=True, experts_interface=EXPERTS_FUNCTIONS)
class MobileMoEExperts(nn.Module):
    """The routed experts, stored `[E, in, out]` as released. The first I columns of `gate_up_proj` are the gate."""

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, 2 * self.intermediate_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        # The experts implementations of transformers call it by this name.
        gate, up = gate_up.chunk(2, dim=-1)  # (routed, I)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        final_hidden_states = torch.zeros_like(hidden_states)  # (tokens, H)
        for expert_idx in top_k_index.unique().tolist():
            token_idx, top_k_pos = torch.where(top_k_index == expert_idx)
            gated = self._apply_gate(hidden_states[token_idx] @ self.gate_up_proj[expert_idx])  # (routed, I)
            expert_output = gated @ self.down_proj[expert_idx]  # (routed, H)
            expert_output = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, expert_output.to(final_hidden_states.dtype))
        return final_hidden_states


class MobileMoERouter(FixedDtypeModule):
    """Chooses the experts of every token and their weights; also returns the logits. Its weight stays in FP32."""

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size, dtype=torch.float32))

    def forward(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Always in FP32, also under autocast: near-ties decide which experts run.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = nn.functional.linear(hidden_states.float(), self.weight.float())  # (tokens, E)
        scores = router_logits.sigmoid()
        # The bias selects, the score weighs. A stable sort resolves ties to the lower index, as every runtime must.
        ranking = torch.sort(scores + expert_bias.float(), dim=-1, descending=True, stable=True).indices
        top_k_index = ranking[:, : self.top_k]  # (tokens, top_k)
        top_k_weights = scores.gather(1, top_k_index)  # (tokens, top_k)
        top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return router_logits, top_k_weights, top_k_index


class MobileMoEFeedForward(FixedDtypeModule):
    """The mixture of experts of a layer: router, routed experts and the shared expert. The bias stays in FP32."""

    expert_bias: torch.Tensor

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.router = MobileMoERouter(config)
        self.experts = MobileMoEExperts(config)
        self.shared_expert = MobileMoEMLP(config)
        # Updated by load balancing (routing.py), never by the optimizer. In FP32, so that steps of 1e-3 are not lost.
        self.expert_bias = nn.Buffer(torch.zeros(config.num_local_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, H)
        _, top_k_weights, top_k_index = self.router(flat_hidden_states, self.expert_bias)
        # Back to the model's dtype: FP32 would double the bytes of the expert outputs that are weighted and summed.
        top_k_weights = top_k_weights.to(hidden_states.dtype)
        routed = self.experts(flat_hidden_states, top_k_index, top_k_weights).view_as(hidden_states)
        return routed + self.shared_expert(hidden_states)


class MobileMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and the mixture of experts, each after a norm and added to the residual stream."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int):
        super().__init__()
        # First: a packed model's dtype is that of its first floating-point parameter, which has to be a norm.
        self.input_layernorm = MobileMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MobileMoEAttention(config, layer_idx)
        self.feed_forward = MobileMoEFeedForward(config)
        self.post_attention_layernorm = MobileMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.feed_forward(hidden_states)


class MobileMoEPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """What both models have in common: initialisation, loading and saving, and what transformers may do with them."""

    config: MobileMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MobileMoEDecoderLayer", "Int4DecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _keep_in_fp32_modules_strict = ["router", "expert_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(MobileMoERouter, index=0),
        "hidden_states": [MobileMoEDecoderLayer, Int4DecoderLayer],
        "attentions": MobileMoEAttention,
    }

    @classmethod
    def _from_config(cls, config: MobileMoEConfig, **kwargs) -> "MobileMoEPreTrainedModel":
        # `from_config` makes the modules that the checkpoint of a packed config is loaded into, as accelerate does.
        model = super()._from_config(config, **kwargs)
        if config.quantization is not None:
            prepare_packed(model)
        return model

    # Annotated in transformers to return a class that the packed embedding is not.
    def resize_token_embeddings(  # ty: ignore[incompatible-method-override]
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers. In a packed model, rows that stay keep their bytes and new rows are rounded to INT4."""
        if self.config.quantization is None:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        return resize_packed_embedding(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, MobileMoERotaryEmbedding):
            super()._init_weights(module)
        std = self.config.initializer_range
        # Its decorator is annotated to return a module, not a class.
        if isinstance(module, MobileMoEExperts):  # ty: ignore[invalid-argument-type]
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, MobileMoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MobileMoEFeedForward):
            init.zeros_(module.expert_bias)
        elif isinstance(module, MobileMoERotaryEmbedding):
            inv_freq, _ = compute_rope(self.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


def check_ids(input_ids: torch.Tensor | None, vocab_size: int) -> None:
    """
    Raises:
        ValueError: for a token id outside the vocabulary. On other devices than the CPU this would wait for them.
    """
    if input_ids is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids hold {int(low if low < 0 else high)}, and the vocabulary has the ids 0 to {vocab_size - 1}. "
            "Encode the text with this model's tokenizer."
        )


class MobileMoEModel(MobileMoEPreTrainedModel):
    """The decoder without output head: token ids or embeddings in, last hidden states out."""

    def __init__(self, config: MobileMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MobileMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MobileMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MobileMoERotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        # As everywhere in transformers, whose class names some of the above too.
        **kwargs: Unpack[TransformersKwargs],  # ty: ignore[invalid-type-form]
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds is needed. Pass one of them.")
        if inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, H)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)  # (1, T)

        if isinstance(attention_mask, dict):
            # `generate` prepares masks by layer type for caches of a fixed size.
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                cache=cache,
                position_ids=position_ids,
            )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Early exit lowers the number of layers; a slice would build a new ModuleList in every pass.
        for decoder_layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings,
                attention_mask=causal_mask,
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class MobileMoEForCausalLM(MobileMoEPreTrainedModel, GenerationMixin):
    """The decoder with its output head, tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Annotated in transformers without the lists that it takes.
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # ty: ignore[invalid-assignment]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MobileMoEConfig):
        super().__init__(config)
        self.model = MobileMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _check_adapters(self) -> None:
        # PEFT has no public sign of its layers that does not need PEFT.
        if "lora_A" in self.lm_head._modules or "lora_A" in self.model.embed_tokens._modules:
            raise ValueError(
                "LoRA is set on embed_tokens or lm_head. MobileMoE ties the two, so merging would change both and "
                "give another model. To train new tokens, set trainable_token_indices in LoraConfig; to train the "
                "whole embedding, set modules_to_save=['embed_tokens'] and ensure_weight_tying=True."
            )

    def train(self, mode: bool = True) -> "MobileMoEForCausalLM":
        """
        As in torch. Trainers call it before training, and PEFT when it has loaded an adapter.

        Raises:
            ValueError: for a LoRA adapter on the embedding or the head.
        """
        self._check_adapters()
        return super().train(mode)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        # As everywhere in transformers, whose class names some of the above too.
        **kwargs: Unpack[TransformersKwargs],  # ty: ignore[invalid-type-form]
    ) -> MoeCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Next-token targets; -100 is ignored.
            output_router_logits (`bool`, *optional*):
                Also return the router logits: one FP32 tensor of shape `(batch_size * sequence_length, num_experts)`
                per layer. The loss stays the language-modeling loss: balancing works through the expert bias.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits for this many last positions, or for these positions; 0 for all.
        """
        self._check_adapters()
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        # Optional in the class of outputs, always there.
        assert hidden_states is not None
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


# In a `try`, because remote code that imports a package anywhere else demands that it is installed.
try:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
except ImportError:
    pass
else:
    # What `LoraConfig` adapts when it names no modules, as in `trl sft --use_peft`.
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["mobilemoe"] = ["q_proj", "k_proj", "v_proj", "o_proj"]

__all__ = ["MobileMoEForCausalLM", "MobileMoEModel", "MobileMoEPreTrainedModel"]
