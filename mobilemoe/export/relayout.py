"""The same function for runtimes that do not know MobileMoE: its weights renamed, permuted and transposed.

A rotation keeps the length of a head, so a norm without a weight gives the same before and after RoPE. RoPE on
adjacent pairs equals RoPE on halves when the rows of the query and key projections are permuted. The result is the
architecture that llama.cpp calls `exaone-moe`, and transformers, vLLM and SGLang `glm4_moe`. Nothing is rounded, and
[`restore`] is the inverse.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format


# Within a layer, ours and theirs; attention, the norms, the embedding keep their names.
RENAMED = {
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.expert_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.shared_expert.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "feed_forward.shared_expert.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "feed_forward.shared_expert.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}
GATE_UP, DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
EXPERTS = "mlp.experts.{}_proj.weight"
LAYER = re.compile(r"(model\.layers\.\d+\.)?(.*)")


@dataclass(frozen=True)
class Weight:
    """
    A weight as values, or on the INT4 grid as integers and scales.

    Args:
        values (`torch.Tensor`): floating-point, or int8 integers of the same shape.
        scale (`torch.Tensor`, *optional*): FP16, one for 32 neighbours along `group_dim`; values stand for themselves
            when absent.
        group_dim (`int`, defaults to -1): -1 or -2.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    group_dim: int = -1

    @property
    def is_int4(self) -> bool:
        return self.scale is not None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Weight":
        """The weight with its values, and its scales, moved by a function that leaves `group_dim` in place."""
        return replace(
            self, values=function(self.values), scale=function(self.scale) if self.scale is not None else None
        )

    def transpose(self) -> "Weight":
        """Exchanges the last two dimensions."""
        swapped = self.map(lambda tensor: tensor.transpose(-1, -2))
        return replace(swapped, group_dim=-3 - self.group_dim) if self.is_int4 else swapped

    def chunk(self) -> tuple["Weight", "Weight"]:
        """The two halves of the last dimension."""
        return self.map(lambda tensor: tensor.chunk(2, -1)[0]), self.map(lambda tensor: tensor.chunk(2, -1)[1])

    def float(self) -> torch.Tensor:
        """The FP32 weight; exact, as integers have 4 bits and scales 11."""
        if self.scale is None:
            return self.values.float()
        groups = self.values.float().unflatten(self.group_dim, (-1, Int4Format.group_size))
        return (groups * self.scale.float().unsqueeze(self.group_dim)).flatten(self.group_dim - 1, self.group_dim)


def relayout(weights: dict[str, Weight], config: MobileMoEConfig) -> dict[str, Weight]:
    """
    Weights by their names in a MobileMoE checkpoint, to weights by their names in `glm4_moe`.

    Any part of a checkpoint will do, so it can be done one weight at a time. Every matrix becomes `(out, in)`, every
    group of experts `(E, out, in)`.

    Raises:
        ValueError: when gate and up share a group of scales.
    """
    result = {}
    for full_name, weight in weights.items():
        layer, name = LAYER.fullmatch(full_name).groups(default="")
        if name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
            # (heads, pair, 2) to (heads, 2, pair): the evens of each head, then its odds.
            result[full_name] = weight.map(
                lambda rows: rows.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            )
            ones = torch.ones(config.head_dim, device=weight.values.device)
            result[f"{layer}{name.replace('proj', 'norm')}"] = Weight(ones)
        elif name == GATE_UP:
            if weight.is_int4 and config.intermediate_size % Int4Format.group_size:
                raise ValueError(
                    f"intermediate_size={config.intermediate_size} is not divisible by {Int4Format.group_size}, so a "
                    "group of the gate reaches into the up projection. Use the full-precision checkpoint."
                )
            gate, up = weight.chunk()
            result |= {f"{layer}{EXPERTS.format('gate')}": gate.transpose()}
            result |= {f"{layer}{EXPERTS.format('up')}": up.transpose()}
        elif name == DOWN:
            result[f"{layer}{EXPERTS.format('down')}"] = weight.transpose()
        else:
            result[f"{layer}{RENAMED.get(name, name)}"] = weight
    return result


def restore(weights: dict[str, Weight], config: MobileMoEConfig) -> dict[str, Weight]:
    """The inverse of [`relayout`]; gate and up of a layer must be there together."""
    result = {}
    original_names = {theirs: ours for ours, theirs in RENAMED.items()}
    for full_name, weight in weights.items():
        layer, name = LAYER.fullmatch(full_name).groups(default="")
        if name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
            result[full_name] = weight.map(
                lambda rows: rows.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            )
        elif name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            continue
        elif name == EXPERTS.format("gate"):
            gate, up = weight.transpose(), weights[f"{layer}{EXPERTS.format('up')}"].transpose()
            scale = torch.cat((gate.scale, up.scale), -1) if gate.is_int4 else None
            result[f"{layer}{GATE_UP}"] = Weight(torch.cat((gate.values, up.values), -1), scale, gate.group_dim)
        elif name == EXPERTS.format("up"):
            continue
        elif name == EXPERTS.format("down"):
            result[f"{layer}{DOWN}"] = weight.transpose()
        else:
            result[f"{layer}{original_names.get(name, name)}"] = weight
    return result
