"""Blocks of a packed model that run one operator for several modules.

In decoding, calling a module from Python takes as long as many of them compute.
"""

from typing import Any, cast

import torch
from torch import nn

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
