# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""PyTorch MobileMoE model."""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from ... import initialization as init
from ...activations import ACT2FN
from ...cache_utils import Cache
from ...configuration_utils import PreTrainedConfig
from ...integrations import use_experts_implementation
from ...modeling_rope_utils import RopeParameters, dynamic_rope_update
from ...modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from ...processing_utils import Unpack
from ...utils import TransformersKwargs, auto_docstring
from ...utils.deprecation import deprecate_kwarg
from ...utils.generic import maybe_autocast, no_inherit_decorator
from ...utils.output_capturing import OutputRecorder
from ..aria.modeling_aria import AriaExperts
from ..cohere.modeling_cohere import apply_rotary_pos_emb
from ..deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM
from ..llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from ..llama4.modeling_llama4 import Llama4TextL2Norm
from ..olmoe.modeling_olmoe import OlmoeModel
from ..qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP


@auto_docstring(checkpoint="facebook/MobileMoE-S-Base")
@strict
class MobileMoEConfig(PreTrainedConfig):
    r"""
    intermediate_size_mlp (`int`, *optional*, defaults to 1536):
        Width of the shared expert. `intermediate_size` is that of one routed expert.
    routed_scaling_factor (`float`, *optional*, defaults to 2.5):
        What the routing weights of a token sum to.

    ```python
    >>> from transformers import MobileMoEConfig, MobileMoEModel

    >>> # Initializing a MobileMoE-S style configuration
    >>> configuration = MobileMoEConfig()

    >>> # Initializing a model from the configuration
    >>> model = MobileMoEModel(configuration)

    >>> # Accessing the model configuration
    >>> configuration = model.config
    ```
    """

    model_type = "mobilemoe"
    attribute_map = {"num_experts": "num_local_experts"}
    default_theta = 500000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.feed_forward.shared_expert.gate_proj": "colwise",
        "layers.*.feed_forward.shared_expert.up_proj": "colwise",
        "layers.*.feed_forward.shared_expert.down_proj": "rowwise",
        # Experts are `[E, in, out]`: the styles are named for `[out, in]`.
        "layers.*.feed_forward.experts.gate_up_proj": "packed_rowwise",
        "layers.*.feed_forward.experts.down_proj": "colwise",
        "layers.*.feed_forward.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.feed_forward.experts.gate_up_proj": "grouped_gemm",
        "layers.*.feed_forward.experts.down_proj": "grouped_gemm",
        "layers.*.feed_forward.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 768
    intermediate_size: int = 384
    intermediate_size_mlp: int = 1536
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    num_local_experts: int = 60
    num_experts_per_tok: int = 4
    routed_scaling_factor: float | int = 2.5
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        # Keys of the released files with one value in all of them. Another value would be another architecture.
        for name, value in {
            "interleave_moe_layer_step": 1,
            "use_qk_norm": True,
            "attn_temperature_tuning": False,
            "norm_topk_prob": True,
            "no_rope_layers": [1] * self.num_hidden_layers,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
        }.items():
            found = kwargs.pop(name, None)
            if found is not None and found != value:
                raise ValueError(f"{name}={found!r} is not implemented for MobileMoE. Set it to {value!r}.")
        if kwargs.pop("quantization", None) is not None:
            raise ValueError(
                "`quantization` is set: packed INT4 is not implemented. Load a full-precision checkpoint."
            )
        if self.rope_parameters is None and kwargs.get("rope_scaling") is None:
            self.rope_parameters = {
                "rope_type": "llama3",
                "rope_theta": kwargs.pop("rope_theta", self.default_theta),
                "factor": 16.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
            }
        if self.eos_token_id is None and self.vocab_size == 128256:
            # <|end_of_text|> and <|eot|>
            self.eos_token_id = [128001, 128008]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_key_value_heads="
                f"{self.num_key_value_heads}. Set a multiple."
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}. "
                "Lower num_experts_per_tok."
            )


class MobileMoERMSNorm(LlamaRMSNorm):
    pass


class MobileMoEL2Norm(Llama4TextL2Norm):
    pass


class MobileMoERotaryEmbedding(LlamaRotaryEmbedding):
    @dynamic_rope_update
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        # Adjacent channels are a pair, as in Cohere. In FP32: at position 8191 BF16 is wrong by whole turns.
        emb = torch.repeat_interleave(freqs, 2, dim=-1)
        return emb.cos(), emb.sin()


@no_inherit_decorator
class MobileMoEAttention(LlamaAttention):
    def __init__(self, config: MobileMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # YaRN and LongRoPE scale queries and keys. A norm follows here that would undo it, so the scores are scaled.
        self.scaling = self.head_dim**-0.5 * MobileMoERotaryEmbedding(config).attention_scaling ** 2
        self.qk_norm = MobileMoEL2Norm(config.rms_norm_eps)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        # After the rotation, without a weight, as in Llama 4
        query_states = self.qk_norm(query_states)
        key_states = self.qk_norm(key_states)

        if cache is not None:
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
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )

        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class MobileMoEMLP(Qwen2MoeMLP):
    pass


@use_experts_implementation(is_transposed=True)
class MobileMoEExperts(AriaExperts):
    """The routed experts, stored `[E, in, out]`. The first half of the columns of `gate_up_proj` is the gate."""

    def __init__(self, config: MobileMoEConfig):
        nn.Module.__init__(self)
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, 2 * self.intermediate_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))
        self.act_fn = ACT2FN[config.hidden_act]


class MobileMoERouter(nn.Module):
    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Always in FP32: near-ties decide which experts run
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        scores = router_logits.sigmoid()
        # The bias selects, the score weighs. A stable sort resolves ties to the lower index.
        ranking = torch.sort(scores + expert_bias.float(), dim=-1, descending=True, stable=True).indices
        top_k_index = ranking[:, : self.top_k]
        top_k_weights = scores.gather(1, top_k_index)
        top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
        return router_logits, top_k_weights, top_k_index


class MobileMoEFeedForward(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: MobileMoEConfig):
        super().__init__()
        self.router = MobileMoERouter(config)
        self.experts = MobileMoEExperts(config)
        self.shared_expert = MobileMoEMLP(config, intermediate_size=config.intermediate_size_mlp)
        # Updated by load balancing, never by the optimizer
        self.expert_bias = nn.Buffer(torch.zeros(config.num_local_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.router(flat_hidden_states, self.expert_bias)
        top_k_weights = top_k_weights.to(hidden_states.dtype)
        routed = self.experts(flat_hidden_states, top_k_index, top_k_weights).view_as(hidden_states)
        return routed + self.shared_expert(hidden_states)


class MobileMoEDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MobileMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.feed_forward = MobileMoEFeedForward(config)
        del self.mlp

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.feed_forward(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class MobileMoEPreTrainedModel(LlamaPreTrainedModel):
    _keep_in_fp32_modules_strict = ["router", "expert_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MobileMoERouter, index=0),
        "hidden_states": MobileMoEDecoderLayer,
        "attentions": MobileMoEAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        PreTrainedModel._init_weights(self, module)
        std = self.config.initializer_range
        if isinstance(module, MobileMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MobileMoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MobileMoEFeedForward):
            init.zeros_(module.expert_bias)


class MobileMoEModel(OlmoeModel):
    pass


class MobileMoEForCausalLM(DeepseekV2ForCausalLM):
    pass


__all__ = ["MobileMoEConfig", "MobileMoEForCausalLM", "MobileMoEModel", "MobileMoEPreTrainedModel"]
