"""Blocks of a packed model that run one operator for several modules.

In decoding, calling a module from Python takes as long as many of them compute.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_mobilemoe import BlockLayer
from .packed_mobilemoe import FixedDtypeModule, Int4Experts, Int4Linear, use_kernels


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
        plain (`nn.Module`): the block.
    """

    # Their classes are in `modeling_mobilemoe.py`, which imports this file, or those of adapters.
    router: Any
    experts: Any
    shared_expert: Any
    expert_bias: torch.Tensor

    def __init__(self, plain: nn.Module):
        super().__init__()
        # Finds here what it finds in the block.
        self._plain_forward: Callable[..., torch.Tensor] = type(plain).forward
        for name, module in plain.named_children():
            self.add_module(name, module)
        self.register_buffer("expert_bias", plain.get_buffer("expert_bias"))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._may_fuse(hidden_states):
            return self._fused(hidden_states)
        return self._plain_forward(self, hidden_states)

    def _shared_linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.shared_expert.gate_proj, self.shared_expert.up_proj, self.shared_expert.down_proj

    def is_packed(self) -> bool:
        # The operator reads experts that are grouped along their output only.
        if type(self.experts) is not Int4Experts or self.experts.group_dim != -1:
            return False
        return all(type(linear) is Int4Linear for linear in self._shared_linears())

    def _may_fuse(self, hidden_states: torch.Tensor) -> bool:
        return (
            self.is_packed()
            and use_kernels(self.training, hidden_states, self.router.weight)
            and is_untouched(self.router, self.experts, self.shared_expert, *self._shared_linears())
        )

    def routed_weights(self) -> list[torch.Tensor]:
        experts = self.experts
        tiles = (experts.tiles_of("gate_up_tiles"), experts.tiles_of("down_tiles"))
        return [self.router.weight, self.expert_bias, *tiles]

    def shared_weights(self) -> list[torch.Tensor]:
        return [cast(Int4Linear, linear).tiles_of() for linear in self._shared_linears()]

    def _fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemoe.feed_forward(
            hidden_states.contiguous(),
            *self.routed_weights(),
            self.router.top_k,
            self.router.routed_scaling_factor,
            self.shared_weights(),
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


class Int4DecoderLayer(GradientCheckpointingLayer):
    """
    Takes over the modules of a `MobileMoEDecoderLayer` whose attention and feed-forward block are packed.

    One operator computes the whole layer of one sequence that attends to all tokens before each one, over a
    `DynamicCache`, in which it keeps keys and values in its own order ([`BlockLayer`]). Inside it, everything is in
    FP32. In all other cases, and under the conditions of [`Int4FeedForward`], the modules run one by one.

    Args:
        plain (`nn.Module`): the decoder layer.
    """

    # Their classes are in `modeling_mobilemoe.py`, which imports this file.
    self_attn: Any
    feed_forward: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, plain: nn.Module):
        super().__init__()
        self._plan: LayerPlan | None = None
        # Finds here what it finds in the layer.
        self._plain_forward: Callable[..., torch.Tensor] = type(plain).forward
        # In this order: a packed model's dtype is that of its first floating-point parameter, a norm.
        for name, module in plain.named_children():
            self.add_module(name, module)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = None if cache is None else self._plan_for(hidden_states, attention_mask, cache)
        if plan is not None:
            return self._fused(plan, hidden_states, position_embeddings, cache)
        return self._plain_forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)

    def _plan_for(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
    ) -> "LayerPlan | None":
        """What the operator takes, or `None` where it may not run in place of the modules."""
        # A compiled graph has all modules in it.
        if hidden_states.shape[0] != 1 or torch.compiler.is_compiling():
            return None
        if not use_kernels(self.training, hidden_states):
            return None
        if self._plan is None or not self._plan.holds():
            self._plan = self._make_plan()
        plan = self._plan
        if plan is None or plan.config._attn_implementation != "sdpa":
            return None
        # The operator has no backward pass to them.
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in plan.parameters):
            return None
        # Other caches, and layers of other kinds, have rules of their own.
        if type(cache) is not DynamicCache or cache.offloading or plan.layer_idx >= len(cache.layers):
            return None
        layer = cache.layers[plan.layer_idx]
        if type(layer) is not BlockLayer and not (type(layer) is DynamicLayer and may_be_blocks(layer)):
            return None
        if attention_mask is None or is_causal(attention_mask, hidden_states.shape[1], layer.get_seq_length()):
            return plan
        return None

    def _make_plan(self) -> "LayerPlan | None":
        attention, feed_forward = self.self_attn, self.feed_forward
        if type(feed_forward) is not Int4FeedForward or not feed_forward.is_packed():
            return None
        # The operator's scores are divided by the root of the head's size. YaRN and LongRoPE scale them further.
        if attention.scaling != attention.head_dim**-0.5:
            return None
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if not all(type(linear) is Int4Linear for linear in linears):
            return None
        attention_weights = [self.input_layernorm.weight, *(linear.tiles_of() for linear in linears)]
        feed_forward_weights = [self.post_attention_layernorm.weight, *feed_forward.shared_weights()]
        plan = LayerPlan(self, attention_weights, feed_forward_weights, feed_forward.routed_weights())
        return plan if plan.holds() else None

    @staticmethod
    def _fused(
        plan: "LayerPlan",
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
    ) -> torch.Tensor:
        layer = cache.layers[plan.layer_idx]
        if type(layer) is not BlockLayer:
            layer = cache.layers[plan.layer_idx] = BlockLayer(layer, plan.num_kv_heads, plan.head_dim)
        blocks, start = layer.extend(hidden_states.shape[1])
        return torch.ops.mobilemoe.decoder_layer(
            hidden_states.contiguous(), *position_embeddings, blocks, start, *plan.arguments
        )


class LayerPlan:
    """
    What the operator takes of a layer, and how to see in microseconds that it is still so: there are no hooks, and no
    module and no tensor has been replaced. Asking the modules every time would take longer than many of them compute.

    Args:
        layer (`Int4DecoderLayer`): whose modules are packed.
        attention, feed_forward, experts (`list[torch.Tensor]`): what the operator takes.
    """

    def __init__(
        self,
        layer: Int4DecoderLayer,
        attention: list[torch.Tensor],
        feed_forward: list[torch.Tensor],
        experts: list[torch.Tensor],
    ):
        self.config = layer.self_attn.config
        self.layer_idx = layer.self_attn.layer_idx
        self.head_dim = layer.self_attn.head_dim
        self.num_kv_heads = layer.self_attn.k_proj.out_features // self.head_dim
        self.parameters = list(layer.parameters())
        router, eps = layer.feed_forward.router, layer.input_layernorm.variance_epsilon
        self.arguments = (attention, feed_forward, experts, router.top_k, router.routed_scaling_factor, eps)
        self._inner = [module for module in layer.modules() if module is not layer]
        # Dictionaries of modules and tensors, and what they have under a name.
        self._parts = [
            (parts, name, part)
            for module in layer.modules()
            for parts in (module._modules, module._parameters, module._buffers)
            for name, part in parts.items()
        ]

    def __reduce__(self) -> tuple:
        # A copy of the model has other dictionaries, and makes its own.
        return type(None), ()

    def holds(self) -> bool:
        return is_untouched(*self._inner) and all(parts.get(name) is part for parts, name, part in self._parts)


def may_be_blocks(layer: DynamicLayer) -> bool:
    """Whether a layer is empty or has the keys, `(B, heads, T, D)`, of one sequence of a BF16 model on the CPU."""
    keys = layer.keys
    if keys is None or not keys.numel():
        return True
    is_one = keys.shape[0] == 1 and not keys.requires_grad
    return is_one and keys.dtype == torch.bfloat16 and keys.device.type == "cpu"


def is_causal(attention_mask: torch.Tensor, num_tokens: int, start: int) -> bool:
    """Whether a mask `(1, 1, T, S)` lets each token attend to itself and all tokens before it, and to no others."""
    if attention_mask.dtype != torch.bool or attention_mask.shape != (1, 1, num_tokens, start + num_tokens):
        return False
    expected = torch.ones(num_tokens, start + num_tokens, dtype=torch.bool).tril_(start)
    return torch.equal(attention_mask[0, 0], expected)
