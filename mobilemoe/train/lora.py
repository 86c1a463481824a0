"""
LoRA: adapts the weights of one scope at a given rank, and checks that exactly these train.

    model = add_lora(model, scope="dense", rank=16)
    # train, then either model.save_pretrained(adapter_directory), or
    model.merge_and_unload().save_pretrained(directory)

Router, norms and embedding are frozen in every scope: updates of the router would undo the load balance of
pre-training. The expert bias must not change either. It is a buffer of the base that no adapter holds, so give
`ExpertBiasCallback` an `update_rate` of 0; otherwise the saved adapter does not fit its base.

Adapters on routed experts are costly: every forward pass adds the update to all E experts of a layer and keeps the sum
for the backward pass. Use activation checkpointing with them, and merge before inference.

A packed INT4 base supports the scopes without routed experts; it stays packed and frozen under its adapters.
"""

import bisect
import math
import re

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEExperts
from modeling_mobilemoe.packed_mobilemoe import Int4Experts


logger = logging.get_logger(__name__)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# With the parent's name: PEFT matches suffixes, and `down_proj` is also a parameter of the routed experts.
SHARED_EXPERT = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")
ROUTED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Linears and fused expert parameters of each scope.
SCOPES = {
    "attention": (ATTENTION, ()),
    "dense": (ATTENTION + SHARED_EXPERT, ()),
    "experts": (SHARED_EXPERT, ROUTED_EXPERTS),
    "all": (ATTENTION + SHARED_EXPERT, ROUTED_EXPERTS),
}


def _base_name(name: str) -> str:
    """The name of a module or weight before PEFT wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def target_shapes(model: PreTrainedModel | PeftModel, scope: str) -> dict[str, tuple[int, ...]]:
    """
    The weights of a scope by name, with or without adapters.

    Returns:
        Shapes as stored: `(out, in)` for a linear, `(E, in, out)` for routed experts.

    Raises:
        ValueError: for an unknown scope, or a model that lacks one of its weights.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown. Set one of {', '.join(SCOPES)}.")
    linears, parameters = SCOPES[scope]
    shapes: dict[str, tuple[int, ...]] = {}
    for wrapped_name, module in model.named_modules():
        name = _base_name(wrapped_name)
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{suffix}" for suffix in linears)):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, (MobileMoEExperts, Int4Experts)) and parameters:
            num_experts, hidden, intermediate = module.num_experts, module.hidden_dim, module.intermediate_dim
            shapes[f"{name}.gate_up_proj"] = (num_experts, hidden, 2 * intermediate)
            shapes[f"{name}.down_proj"] = (num_experts, intermediate, hidden)
    config, per_layer = model.config, len(linears) + len(parameters)
    if config.model_type != MobileMoEConfig.model_type or len(shapes) != per_layer * config.num_hidden_layers:
        raise ValueError(
            f"scope={scope!r} means {per_layer} weights in each of the {config.num_hidden_layers} layers, but this "
            f"{config.model_type} model has {len(shapes)} of them. Load a MobileMoE checkpoint unmodified."
        )
    return shapes


def num_adapter_parameters(shapes: dict[str, tuple[int, ...]], rank: int, expert_rank: int) -> int:
    """Parameters of the adapters on weights of these shapes: A `(rank, in)` and B `(out, rank)`, once per expert."""
    return sum(
        math.prod(experts) * (expert_rank if experts else rank) * (rows + columns)
        for *experts, rows, columns in shapes.values()
    )


def lora_config(
    model: PreTrainedModel,
    scope: str,
    rank: int | None = None,
    budget: int | None = None,
    alpha: float | None = None,
) -> LoraConfig:
    """
    The PEFT configuration that adapts one scope of a model.

    Linears get the full rank; it is split over the top_k routed experts of a token, `max(1, rank // top_k)` each (LoRA
    Without Regret, https://thinkingmachines.ai/blog/lora/). PEFT recommends `rank // E`, which would be 1 with 60
    experts for every rank below 120.

    Args:
        model (`PreTrainedModel`): the model to adapt; packed INT4 only for the scopes without routed experts.
        scope (`str`): `"attention"` (q, k, v, o), `"dense"` (attention and shared expert: used by every token),
            `"experts"` (routed and shared) or `"all"`.
        rank (`int`, *optional*): set either this or `budget`.
        budget (`int`, *optional*): upper limit of trainable parameters; the largest rank within it is used.
        alpha (`float`, *optional*, defaults to twice the rank): every update is scaled by `alpha / rank`, also for
            routed experts, whose adapters have a smaller rank.

    Raises:
        ValueError: for an unknown scope, an invalid rank or budget, or a model that does not support the adapters.
    """
    if (rank is None) == (budget is None):
        raise ValueError(f"rank={rank} and budget={budget} do not give one size. Set exactly one of the two.")
    shapes = target_shapes(model, scope)
    linears, parameters = SCOPES[scope]
    if parameters and any(isinstance(module, Int4Experts) for module in model.modules()):
        raise ValueError(
            f"scope={scope!r} adapts routed experts, but a packed INT4 model stores them as integers, to which PEFT "
            "cannot add an update. Set scope='dense', or dequantize(model) first, and after training merge and "
            "quantize."
        )
    if any(name.endswith("weight_fake_quantizer") for name, _ in model.named_modules()):
        raise ValueError(
            "This model is prepared for quantization-aware training: adapters could not be merged into its weights. "
            "Train and merge the adapters first, then prepare the merged model."
        )
    top_k = model.config.num_experts_per_tok
    # A higher rank than the shorter side of a weight adds nothing.
    limit = min(min(shape) for shape in shapes.values() if len(shape) == 2)
    if budget is not None:
        counts = [num_adapter_parameters(shapes, rank, max(1, rank // top_k)) for rank in range(1, limit + 1)]
        rank = bisect.bisect_right(counts, budget)
        if rank == 0:
            raise ValueError(
                f"budget={budget} is too small for scope={scope!r}, which trains {counts[0]} parameters at rank 1. "
                "Set a budget of at least that, or a smaller scope."
            )
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank} is not between 1 and {limit}, the shortest side of an adapted weight. Set a rank within it."
        )
    alpha = 2 * rank if alpha is None else alpha
    expert_rank = max(1, rank // top_k) if parameters else rank
    # PEFT divides alpha by the rank of the single adapter. The patterns name the linears because PEFT 0.21 warns
    # incorrectly that it ignores patterns for parameters.
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=expert_rank,
        lora_alpha=alpha * expert_rank / rank,
        target_modules=list(linears),
        target_parameters=list(parameters) or None,
        rank_pattern=dict.fromkeys(linears, rank),
        alpha_pattern=dict.fromkeys(linears, alpha),
    )


def _trainable(model: nn.Module) -> dict[str, tuple[LoraLayer | None, list[nn.Parameter]]]:
    """Trainable parameters by the weight that they adapt; those outside adapters are listed under their own name."""
    trainable: dict[str, tuple[LoraLayer | None, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            target, is_adapter, _ = name.partition(".lora_")
            layer = model.get_submodule(target) if is_adapter else None
            if isinstance(layer, ParamWrapper):
                target = f"{target}.{layer.parameter_name}"
            trainable.setdefault(_base_name(target), (layer, []))[1].append(parameter)
    return trainable


def check_adapters(model: PeftModel, scope: str) -> None:
    """
    Checks that all weights of a scope train, and no others.

    Raises:
        ValueError: when a weight of the scope has no adapter, or anything else is trainable.
    """
    expected, trainable = target_shapes(model, scope), _trainable(model)
    wrong = [f"{name} has no adapter" for name in expected if name not in trainable]
    wrong += [f"{name} is trainable" for name in trainable if name not in expected]
    if wrong:
        raise ValueError(
            f"This model does not train scope={scope!r}: {wrong[0]}, and {len(wrong) - 1} more. Start from the base "
            "model without adapters and call add_lora."
        )


def trainable_table(model: PeftModel) -> str:
    """The trainable weights: one line per kind of weight, all layers together, and their share of the base model."""
    rows: dict[str, list] = {}
    for name, (layer, parameters) in _trainable(model).items():
        shape, rank = tuple(parameters[0].shape), "-"
        if layer is not None:
            stored = isinstance(layer, ParamWrapper)
            shape = tuple(layer.get_param().shape) if stored else (layer.out_features, layer.in_features)
            rank = layer.r[model.active_adapter]
        row = rows.setdefault(re.sub(r"\.\d+\.", ".*.", name), [shape, rank, 0, 0])
        row[2] += len(parameters)
        row[3] += sum(parameter.numel() for parameter in parameters)
    total, base = sum(row[3] for row in rows.values()), model.config.num_total_parameters
    width = max(map(len, rows), default=5)
    lines = [f"{'weight':{width}s}  {'shape':>17s}  {'rank':>4s}  {'tensors':>7s}  {'trainable':>13s}"]
    for kind, (shape, rank, tensors, count) in rows.items():
        lines.append(f"{kind:{width}s}  {str(shape):>17s}  {rank:>4}  {tensors:7d}  {count:13,d}")
    lines.append(f"trainable: {total:,} parameters, {total / base:.2%} of the model's {base:,}")
    return "\n".join(lines)


def add_lora(
    model: PreTrainedModel,
    scope: str,
    rank: int | None = None,
    budget: int | None = None,
    alpha: float | None = None,
) -> PeftModel:
    """Adapts a scope of a model with [`lora_config`] and checks that only it trains; see [`trainable_table`]."""
    peft_model = get_peft_model(model, lora_config(model, scope, rank, budget, alpha))
    check_adapters(peft_model, scope)
    logger.info(f"Trainable weights:\n{trainable_table(peft_model)}")
    return peft_model
