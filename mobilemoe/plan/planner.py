"""Finds the best model for a device: the shape within the limits with the lowest loss predicted by a scaling law.

The search covers width, depth and expert expansion E. Granularity and the number of shared experts are fixed to the
paper's values (8 and 1), since the law has no term for them. The plan shows what other granularities would change.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

from ..costs import (
    PROGRAM_KV_BITS,
    Device,
    expected_experts,
    inference_flops,
    kv_cache_bytes,
    memory_bytes,
    program_bytes,
    training_flops,
)
from .fit import LawFit
from .law import PAPER_GRID, PAPER_LAW, ScalingLaw


# The paper's choice of E, among values that the law cannot distinguish, and of the granularity.
PAPER_EXPANSION, PAPER_GRANULARITY = 8, 8
# Of the 8 active units per token, the number that the shared expert replaces (paper).
SHARED_UNITS = 4
# "d_model / n_l about 40" (paper): 38.4, 39.4 and 40 in S, M and L.
PAPER_ASPECT, ASPECTS = 40, (32, 48)
WIDTHS = (64, 96, 128, 192, *range(256, 2049, 128))
# Prompt length of the prefill time.
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Request:
    """
    The limits and budgets of a plan. Exactly one of `tokens` and `flops` must be set.

    Args:
        memory (`float`): limit in bytes for the weights and the key-value cache of the exported program.
        context (`int`, defaults to 8192): tokens that the cache holds.
        tokens (`float`, *optional*): training tokens.
        flops (`float`, *optional*): training FLOPs, `6 N_act D`.
        inference_flops (`float`, *optional*): maximum FLOPs per token, `2 N_act`.
        tokens_per_second (`float`, *optional*): minimum decode speed at the full context; needs `device`.
        device (`Device`, *optional*): the device for which speeds are predicted.
        kv_bits (`int`, defaults to 8): bits of a cache entry, 8 in the programs of this package and in the paper.
        vocab_size (`int`, defaults to 128256): vocabulary size of the tokenizer.

    Raises:
        ValueError: for a value that is not positive, or a combination that is incomplete or contradictory.
    """

    memory: float
    context: int = 8192
    tokens: float | None = None
    flops: float | None = None
    inference_flops: float | None = None
    tokens_per_second: float | None = None
    device: Device | None = None
    kv_bits: int = PROGRAM_KV_BITS
    vocab_size: int = 128256

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and name != "device" and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} cannot be met by any model. Set a positive number.")
        if (self.tokens is None) == (self.flops is None):
            raise ValueError(
                f"tokens={self.tokens} and flops={self.flops}: the training budget is one of the two, and the other "
                "follows from the size. Set exactly one."
            )
        if self.tokens_per_second is not None and self.device is None:
            raise ValueError(
                f"tokens_per_second={self.tokens_per_second} needs a device. Give its bandwidth, or "
                "measurements of it."
            )


@dataclass(frozen=True)
class Candidate:
    """A shape with its costs, its predicted loss, the limits that it exceeds, and the verdict on it."""

    config: MobileMoEConfig
    expansion: int
    memory: int
    tokens: float
    loss: float
    decode_speed: float | None
    broken: tuple[str, ...] = ()
    verdict: str = ""

    @property
    def row(self) -> dict:
        """The candidate as plain numbers, for tables and JSON."""
        config = self.config
        return {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "expansion": self.expansion,
            "num_local_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "intermediate_size": config.intermediate_size,
            "intermediate_size_mlp": config.intermediate_size_mlp,
            "active_parameters": config.num_active_parameters,
            "total_parameters": config.num_total_parameters,
            "memory_bytes": self.memory,
            "training_tokens": self.tokens,
            "training_flops": training_flops(config, self.tokens),
            "loss": self.loss,
            "decode_tokens_per_second": self.decode_speed,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Plan:
    """
    The result of [`plan`].

    Args:
        request (`Request`): the limits and budgets.
        law (`ScalingLaw`): the law that predicted the losses.
        fit (`LawFit`, *optional*): set if the law was fitted to the user's own runs.
        best (`Candidate`): the chosen shape.
        loss_interval (`tuple[float, float]`): 95 % interval. With a fitted law it is the interval of the expected loss
            from the resampled fits. The published law has no errors of its coefficients, so there it is the interval
            of a single run from the law's RMSE.
        per_expansion (`list[Candidate]`): the best shape within the limits for every E, sorted by E.
        runners_up (`list[Candidate]`): the next best shapes of the chosen E, sorted by loss.
        candidates (`list[Candidate]`): all shapes of the search.
        warnings (`list[str]`): quantities in which the law extrapolates.
    """

    request: Request
    law: ScalingLaw
    fit: LawFit | None
    best: Candidate
    loss_interval: tuple[float, float]
    per_expansion: list[Candidate]
    runners_up: list[Candidate]
    candidates: list[Candidate]
    warnings: list[str]

    @property
    def granularities(self) -> list[dict]:
        """The effect of other granularities. Parameters, bytes and the predicted loss do not depend on it."""
        config, rows = self.best.config, []
        dense_width = 4 * config.hidden_size
        for granularity in GRANULARITY_FINDINGS:
            # The shared expert replaces half of the active units.
            top_k = granularity // 2
            experts = granularity * self.best.expansion - top_k
            rows.append(
                {
                    "granularity": granularity,
                    "num_local_experts": experts,
                    "num_experts_per_tok": top_k,
                    "intermediate_size": dense_width // granularity,
                    "experts_reached": expected_experts(experts, top_k, PROMPT_TOKENS),
                    "tokens_per_expert": PROMPT_TOKENS * top_k / experts,
                    "finding": GRANULARITY_FINDINGS[granularity],
                }
            )
        return rows

    @property
    def as_json(self) -> dict:
        parts = program_bytes(self.best.config, self.request.context)
        request = {name: value for name, value in self.request.__dict__.items() if value is not None}
        if self.request.device is not None:
            request["device"] = dataclasses.asdict(self.request.device)
        return {
            "request": request,
            "law": dataclasses.asdict(self.law) | self.intervals,
            "best": self.best.row
            | {
                "loss_interval": list(self.loss_interval),
                "bytes": parts | {"kv_cache": self.best.memory - sum(parts.values())},
                "inference_flops_per_token": inference_flops(self.best.config),
                "prefill_seconds": self.prefill_seconds,
            },
            "config": json.loads(self.best.config.to_json_string()),
            "per_expansion": [candidate.row for candidate in self.per_expansion],
            "runners_up": [candidate.row for candidate in self.runners_up],
            "granularities": self.granularities,
            "warnings": self.warnings,
            "candidates": [candidate.row for candidate in self.candidates],
        }

    @property
    def intervals(self) -> dict:
        """95 % intervals of a fitted law's coefficients; `None` for an end that the runs do not determine."""
        if self.fit is None:
            return {}
        finite = {name: [e if math.isfinite(e) else None for e in ends] for name, ends in self.fit.intervals().items()}
        return {"intervals": finite}

    @property
    def prefill_seconds(self) -> float | None:
        """Seconds to process a prompt of 512 tokens, or of the context length if that is shorter."""
        device = self.request.device
        return device and device.prefill_seconds(self.best.config, min(PROMPT_TOKENS, self.request.context))

    def save(self, directory: str | Path) -> None:
        """Writes `config.json`, which the recipes can train from, and `plan.json`."""
        with replace_when_complete(directory) as partial:
            (partial / "config.json").write_text(self.best.config.to_json_string())
            (partial / "plan.json").write_text(json.dumps(self.as_json, indent=2) + "\n")


# Finding 2 of the paper. Losses per granularity are not published.
GRANULARITY_FINDINGS = {
    4: "higher loss than 8 (how much is not published)",
    8: "the paper's choice",
    16: "less than 0.01 lower loss, about 50 % more training time (paper)",
}


# Cached, so do not modify the result: a plan needs about a thousand configs, and validating one takes 2 ms.
@functools.cache
def shape_config(
    hidden_size: int, num_hidden_layers: int, expansion: int, vocab_size: int = 128256, context: int = 8192
) -> MobileMoEConfig:
    """
    The config for a width, a depth and an E, with granularity 8 and one shared expert as in S, M and L (paper, 2.4).

    There are 8E units, each an eighth of the dense width `4 hidden_size`, and 8 are active per token. A shared expert
    of four units' width replaces four of them. The head size is as close to 64 as the width allows, with four
    key-value heads.
    """
    unit = 4 * hidden_size // PAPER_GRANULARITY
    # A multiple of the four key-value heads that gives an even head size, as close to 64 as possible.
    heads = min(
        (count for count in range(4, hidden_size // 8, 4) if hidden_size % (2 * count) == 0),
        key=lambda count: abs(math.log(hidden_size / count / 64)),
        default=4,
    )
    return MobileMoEConfig(
        architectures=["MobileMoEForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=unit,
        intermediate_size_mlp=SHARED_UNITS * unit,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=hidden_size // heads,
        num_local_experts=PAPER_GRANULARITY * expansion - SHARED_UNITS,
        num_experts_per_tok=PAPER_GRANULARITY - SHARED_UNITS,
        max_position_embeddings=max(8192, context),
        bos_token_id=128000 if vocab_size == 128256 else None,
    )


def plan(request: Request, law: ScalingLaw | LawFit = PAPER_LAW) -> Plan:
    """
    Chooses width, depth and E.

    The shape with the lowest predicted loss within the limits is chosen, with two tie-breaks for differences below the
    law's error. First, if the best shapes of several E are within the law's RMSE, E = 8 is preferred, since the paper
    calls 4 to 8 the sweet spot and trained S, M and L with 8; if 8 is not among them, the one with the least memory.
    Second, among shapes within a tenth of the RMSE, the one with width / depth closest to the paper's 40 is chosen.

    Args:
        request (`Request`): limits and budgets.
        law (`ScalingLaw` or `LawFit`, defaults to the paper's): predicts the losses; a fit also gives intervals.

    Raises:
        ValueError: when no shape is within the limits. The message says what would fit.
    """
    fit = law if isinstance(law, LawFit) else None
    law = fit.law if fit else law
    shapes = [
        evaluate(shape_config(width, depth, expansion, request.vocab_size, request.context), expansion, request, law)
        for width in WIDTHS
        for depth in range(math.ceil(width / ASPECTS[1]), width // ASPECTS[0] + 1)
        for expansion in PAPER_GRID["expansion"]
    ]
    feasible = [shape for shape in shapes if not shape.broken]
    if not feasible:
        raise ValueError(explain_nothing_fits(shapes, request))

    by_expansion = {}
    for shape in sorted(feasible, key=lambda shape: shape.loss):
        by_expansion.setdefault(shape.expansion, []).append(shape)
    lowest = min(members[0].loss for members in by_expansion.values())
    tied = [members[0] for members in by_expansion.values() if members[0].loss <= lowest + law.rmse]
    chosen = min(tied, key=lambda shape: (shape.expansion != PAPER_EXPANSION, shape.memory)).expansion
    near = [shape for shape in by_expansion[chosen] if shape.loss <= by_expansion[chosen][0].loss + law.rmse / 10]
    best = min(near, key=lambda shape: (abs(math.log(aspect(shape) / PAPER_ASPECT)), shape.loss))

    def judged(shape: Candidate) -> Candidate:
        return dataclasses.replace(shape, verdict="; ".join(shape.broken) or verdict(shape, best, lowest, law.rmse))

    numbers = (best.config.num_active_parameters, best.tokens, best.expansion)
    if fit:
        interval = tuple(map(float, fit.loss_interval(*numbers)))
    else:
        interval = (best.loss - 1.96 * law.rmse, best.loss + 1.96 * law.rmse)
    return Plan(
        request,
        law,
        fit,
        judged(best),
        interval,
        [judged(best if expansion == chosen else by_expansion[expansion][0]) for expansion in sorted(by_expansion)],
        [judged(shape) for shape in by_expansion[chosen] if shape is not best][:5],
        [judged(shape) for shape in shapes],
        law.outside(*numbers),
    )


def evaluate(config: MobileMoEConfig, expansion: int, request: Request, law: ScalingLaw) -> Candidate:
    """Computes the costs and the predicted loss of a shape, and the limits that it exceeds."""
    active = config.num_active_parameters
    memory = memory_bytes(config, request.context, request.kv_bits)
    tokens = request.tokens if request.flops is None else request.flops / (6 * active)
    speed = request.device and request.device.decode_tokens_per_second(config, request.context)
    broken = []
    if memory > request.memory:
        broken.append(f"needs {memory / 1e9:.3g} GB of {request.memory / 1e9:.3g}")
    if request.inference_flops is not None and inference_flops(config) > request.inference_flops:
        broken.append(f"{inference_flops(config) / 1e9:.3g} GFLOPs per token of {request.inference_flops / 1e9:.3g}")
    if request.tokens_per_second is not None and speed < request.tokens_per_second:
        broken.append(f"decodes {speed:.3g} tokens/s of {request.tokens_per_second:.3g}")
    loss = float(law.loss(active, tokens, expansion))
    return Candidate(config, expansion, memory, tokens, loss, speed, tuple(broken))


def aspect(shape: Candidate) -> float:
    return shape.config.hidden_size / shape.config.num_hidden_layers


def verdict(shape: Candidate, best: Candidate, lowest: float, rmse: float) -> str:
    """Explains why a shape within all limits was chosen or not."""
    if shape.config is best.config:
        if best.loss > lowest + rmse / 10:
            return f"chosen: E = {best.expansion}, within the law's error ({rmse:.2g}) of the lowest loss"
        return "chosen: lowest predicted loss"
    difference = shape.loss - best.loss
    if shape.expansion == best.expansion:
        if difference <= rmse / 10:
            return f"the same loss ({difference:+.4f}), width / depth {aspect(shape):.0f} further from {PAPER_ASPECT}"
        return f"loss {difference:+.4f}"
    less = "less" if shape.memory < best.memory else "more"
    memory = f"{abs(best.memory - shape.memory) / 1e9:.3g} GB {less} memory"
    if abs(difference) <= rmse:
        return f"loss {difference:+.4f}, within the law's error; {memory}"
    return f"loss {difference:+.4f}; {memory}"


def explain_nothing_fits(shapes: list[Candidate], request: Request) -> str:
    """Explains which limit, or combination of limits, excludes every shape, and what would fit."""
    smallest = min(shapes, key=lambda shape: shape.memory)
    if smallest.memory > request.memory:
        cache = kv_cache_bytes(smallest.config, request.context, request.kv_bits)
        return (
            f"memory={request.memory / 1e9:.3g} GB holds no model: the smallest one ({describe(smallest)}) needs "
            f"{smallest.memory / 1e9:.3g} GB, {cache / 1e9:.2g} GB of it for a context of {request.context} tokens. "
            "Give more memory, a shorter context, or a smaller vocabulary."
        )
    if request.inference_flops is not None:
        least = min(shapes, key=lambda shape: shape.config.num_active_parameters)
        if inference_flops(least.config) > request.inference_flops:
            return (
                f"inference_flops={request.inference_flops:.3g} per token is less than the smallest model needs: "
                f"{inference_flops(least.config):.3g} ({describe(least)}). Set that or more, or a smaller vocabulary."
            )
    if request.tokens_per_second is not None:
        fitting = [shape for shape in shapes if shape.memory <= request.memory]
        fastest = max(fitting, key=lambda shape: shape.decode_speed)
        if fastest.decode_speed < request.tokens_per_second:
            return (
                f"tokens_per_second={request.tokens_per_second:.3g} is above what {request.device.name} can read: at "
                f"{request.device.bandwidth / 1e9:.3g} GB/s the fastest model that fits ({describe(fastest)}) decodes "
                f"{fastest.decode_speed:.3g} tokens per second at a context of {request.context} tokens. Set that or "
                "less, or a shorter context."
            )
    nearest = min(shapes, key=lambda shape: (len(shape.broken), shape.memory))
    return (
        f"Each limit can be met, but not all by one model: {describe(nearest)}, which breaks the fewest, "
        f"{'; '.join(nearest.broken)}. Loosen that limit."
    )


def describe(shape: Candidate) -> str:
    config = shape.config
    return (
        f"width {config.hidden_size}, {config.num_hidden_layers} layers, E = {shape.expansion}, "
        f"{millions(config.num_active_parameters)} of {millions(config.num_total_parameters)} parameters active"
    )


def millions(count: float) -> str:
    """Parameters in millions: whole ones for large models, with digits for small ones."""
    return f"{count / 1e6:,.0f}M" if count >= 1e8 else f"{count / 1e6:.3g}M"
