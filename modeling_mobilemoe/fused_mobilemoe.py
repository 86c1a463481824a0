"""One operator in place of several modules of a packed layer, for BF16 models on the CPU outside of training.

In decoding, calling a module from Python takes as long as many of them compute. Where one of the modules is watched,
adapted or trained, or an operator cannot take it, the functions here return `None` and the modules run one by one.
"""

import torch
from torch import nn

from .quantization_mobilemoe import Int4Experts, Int4Linear, use_kernels


def is_untouched(*modules: nn.Module) -> bool:
    """Whether nobody watches or adapts these packed modules, so that one operator may stand for all of them."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def fused_feed_forward(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """
    The whole of a `MobileMoEFeedForward` as one operator, or `None` where its modules have to run one by one.

    That is everywhere but in BF16 models on the CPU, and as soon as a hook on the router or an adapter on the shared
    expert wants to see its module called. Both ways choose the same experts; here their weights stay FP32.

    Args:
        block (`nn.Module`): with `router`, `expert_bias`, `experts` and `shared_expert`.
        hidden_states (`torch.Tensor`): of shape `(B, T, hidden)`, as the result.
    """
    router, experts, shared = block.router, block.experts, block.shared_expert
    # Type first: with full-precision weights nothing else needs to be known.
    if type(experts) is not Int4Experts or experts.group_dim != -1 or not use_kernels(hidden_states, router.weight):
        return None
    linears = (shared.gate_proj, shared.up_proj, shared.down_proj)
    if not all(type(linear) is Int4Linear for linear in linears) or not is_untouched(
        router, experts, shared, *linears
    ):
        return None
    if router.weight.dtype != torch.float32 or block.expert_bias.dtype != torch.float32:
        return None
    return torch.ops.mobilemoe.feed_forward(
        hidden_states.contiguous(),
        router.weight,
        block.expert_bias,
        experts.gate_up_qweight,
        experts.gate_up_scale,
        experts.down_qweight,
        experts.down_scale,
        router.top_k,
        router.routed_scaling_factor,
        [tensor for linear in linears for tensor in (linear.qweight, linear.weight_scale)],
    )


def fused_attention_inputs(
    attention: nn.Module, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """
    Projected, rotated and normalised queries, keys and values as one operator, or `None` as in [`fused_feed_forward`].

    Args:
        attention (`nn.Module`): with `q_proj`, `k_proj` and `v_proj`.
        hidden_states (`torch.Tensor`): of shape `(B, T, hidden)`.
        cos, sin (`torch.Tensor`): FP32, of shape `(B or 1, T, head_dim / 2)`.
        eps (`float`): of the norm.

    Returns:
        Three tensors of shape `(B, heads, T, head_dim)`.
    """
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    if not all(type(linear) is Int4Linear for linear in linears) or not use_kernels(hidden_states):
        return None
    if not is_untouched(*linears):
        return None
    weights = [tensor for linear in linears for tensor in (linear.qweight, linear.weight_scale)]
    states = torch.ops.mobilemoe.attention_inputs(hidden_states.contiguous(), weights, cos, sin, eps)
    return tuple(heads.transpose(1, 2) for heads in states)
