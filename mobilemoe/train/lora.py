"""
LoRA: what each scope adapts, at which rank, and the proof that exactly this trains.

    model = add_lora(model, scope="dense", rank=16)
    # train, then either model.save_pretrained(adapter_directory), or
    model.merge_and_unload().save_pretrained(directory)

Router, norms and embedding are frozen in every scope: a router that moves loses the balance it was trained to. The
expert bias must not move either. It is a buffer of the base and no adapter holds it, so give `ExpertBiasCallback` an
`update_rate` of 0, or the saved adapter will not fit its base.

Adapters on routed experts are costly: every forward pass adds the update to all E experts of a layer and keeps the sum
for the backward pass. Use activation checkpointing with them, and merge before inference.

A packed INT4 base carries the scopes without routed experts, and stays packed and frozen under its adapters.
"""

import bisect
import math
import re

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.fused_mobilemoe import Int4Experts, Int4Linear
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEExperts


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# In full: PEFT reads names as suffixes, and `down_proj` alone is one of the routed experts' too.
SHARED_EXPERT = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj")
ROUTED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# The linears and the fused expert parameters of a scope.
SCOPES = {
    "attention": (ATTENTION, ()),
    "dense": (ATTENTION + SHARED_EXPERT, ()),
    "experts": (SHARED_EXPERT, ROUTED_EXPERTS),
    "all": (ATTENTION + SHARED_EXPERT, ROUTED_EXPERTS),
}


class Int4LoraLinear(Linear):
    """Adapter on a packed linear, which stays packed and frozen: gradients pass through its expanded weight."""

    def _get_in_out_features(self, module: Int4Linear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "An adapter cannot be merged into a packed INT4 weight: the sum is not on its grid. Save the adapter, "
            "load_lora it onto dequantize(model), merge there, and quantize the result."
        )


def _base_name(name: str) -> str:
    """The name that a module or weight had before PEFT wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def target_shapes(model: PreTrainedModel | PeftModel, scope: str) -> dict[str, tuple[int, ...]]:
    """
    The weights of a scope by name, whether they have adapters or not.

    Returns:
        Shapes as stored: `(out, in)` of a linear, `(E, in, out)` of routed experts.

    Raises:
        ValueError: for an unknown scope, or a model that lacks one of its weights.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown. Set one of {', '.join(SCOPES)}.")
    linears, parameters = SCOPES[scope]
    shapes: dict[str, tuple[int, ...]] = {}
    for wrapped_name, module in model.named_modules():
        name = _base_name(wrapped_name)
        if isinstance(module, (nn.Linear, Int4Linear)) and name.endswith(tuple(f".{suffix}" for suffix in linears)):
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
    """Size of the adapters of weights of these shapes: A is `(rank, in)`, B is `(out, rank)`, once per expert."""
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

    Rank is what one token meets: an adapter on a linear has it, and the adapters of the top_k routed experts that a
    token visits share it, `max(1, rank // top_k)` each (LoRA Without Regret, https://thinkingmachines.ai/blog/lora/).
    PEFT's own advice, `rank // E`, would leave 60 experts at 1 for every rank below 120.

    Args:
        model (`PreTrainedModel`): the model to adapt; packed INT4 for the scopes without routed experts.
        scope (`str`): `"attention"` (q, k, v, o), `"dense"` (attention and shared expert: what every token passes),
            `"experts"` (routed and shared) or `"all"`.
        rank (`int`, *optional*): this or `budget` is needed.
        budget (`int`, *optional*): most parameters to train; the largest rank that fits is taken.
        alpha (`float`, *optional*, defaults to twice the rank): every update is scaled by `alpha / rank`, that of a
            routed expert too, although its adapter has a smaller rank.

    Raises:
        ValueError: for an unknown scope, a rank or budget that cannot work, or a model that cannot carry the adapters.
    """
    if (rank is None) == (budget is None):
        raise ValueError(f"rank={rank} and budget={budget} do not say one size. Set exactly one of the two.")
    shapes = target_shapes(model, scope)
    linears, parameters = SCOPES[scope]
    if parameters and any(isinstance(module, Int4Experts) for module in model.modules()):
        raise ValueError(
            f"scope={scope!r} adapts routed experts, and those of a packed INT4 model are integers, which PEFT cannot "
            "add an update to. Set scope='dense', or dequantize(model) first, and after training merge and quantize."
        )
    if any(name.endswith("weight_fake_quantizer") for name, _ in model.named_modules()):
        raise ValueError(
            "This model is prepared for quantization-aware training: adapters could not be merged into its weights. "
            "Train and merge the adapters first, then prepare the merged model."
        )
    top_k = model.config.num_experts_per_tok
    # A product of two factors has no higher rank than the narrowest side of the weight.
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
        raise ValueError(f"rank={rank} is not between 1 and {limit}, the narrowest side of a weight. Set it within.")
    alpha = 2 * rank if alpha is None else alpha
    expert_rank = max(1, rank // top_k) if parameters else rank
    # PEFT scales by alpha over the rank of the single adapter. The patterns name the linears, since PEFT 0.21 warns,
    # wrongly, that it ignores patterns which name parameters.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=expert_rank,
        lora_alpha=alpha * expert_rank / rank,
        target_modules=list(linears),
        target_parameters=list(parameters) or None,
        rank_pattern=dict.fromkeys(linears, rank),
        alpha_pattern=dict.fromkeys(linears, alpha),
    )
    config._register_custom_module({Int4Linear: Int4LoraLinear})
    return config


def _trainable(model: nn.Module) -> dict[str, tuple[LoraLayer | None, list[nn.Parameter]]]:
    """Trainable parameters by the weight that they adapt; those that are no adapters under their own name."""
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
    Checks that a scope trains, whole and alone.

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
    """What of a model trains: one line per kind of weight, layers taken together, and the share of the base model."""
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
    """Adapts a scope of a model as [`lora_config`] says, checks that this alone trains, and prints the table."""
    peft_model = get_peft_model(model, lora_config(model, scope, rank, budget, alpha))
    check_adapters(peft_model, scope)
    print(trainable_table(peft_model))
    return peft_model


def load_lora(model: PreTrainedModel, path: str, is_trainable: bool = False) -> PeftModel:
    """A saved adapter on its base. `PeftModel.from_pretrained` alone does not know how to adapt a packed base."""
    config = LoraConfig.from_pretrained(path)
    config._register_custom_module({Int4Linear: Int4LoraLinear})
    return PeftModel.from_pretrained(model, path, config=config, is_trainable=is_trainable)
