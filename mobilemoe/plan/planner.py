"""Finds the best model for a device: the shape within the limits with the lowest loss predicted by a scaling law.

The search covers width, depth and expert expansion E. Granularity and the number of shared experts are fixed to the
paper's values (8 and 1), since the law has no term for them. The plan shows what other granularities would change.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

from ..costs import expected_experts, inference_flops, program_bytes
from .fit import LawFit, published_fit
from .law import ScalingLaw
from .search import PAPER_EXPANSION, Candidate, Request, explain_nothing_fits, millions, search


# "d_model / n_l about 40" (paper): 38.4, 39.4 and 40 in S, M and L.
PAPER_ASPECT = 40
# Prompt length of the prefill time.
PROMPT_TOKENS = 512
# Speeds, as multiples of the requested one, of which a plan shows the cost.
SPEEDS = (1, 2, 3, 4)
# Losses of undetermined fits are infinite. Below this, their differences are numbers.
MAX_LOSS = 1e9


@dataclass(frozen=True)
class Choice:
    """
    The best of some shapes, and what the law cannot tell from it.

    Args:
        best (`Candidate`): the chosen shape.
        per_expansion (`list[Candidate]`): the best shape of every E, sorted by E.
        excess (`list[tuple[float, float, float]]`): for each of them, its loss minus that of the chosen one, and the
            95 % interval of that difference over the resampled fits.
        equivalent (`list[int]`): every E whose best shape is within the law's RMSE of the lowest loss.
        expansion_interval (`tuple[int, int]`): 95 % interval, over the resampled fits, of the E with the lowest loss.
    """

    best: Candidate
    per_expansion: list[Candidate]
    excess: list[tuple[float, float, float]]
    equivalent: list[int]
    expansion_interval: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """
    The result of [`plan`].

    Args:
        request (`Request`): the limits and budgets.
        fit (`LawFit`): the law that predicted the losses, with its uncertainty.
        choice (`Choice`): the best shape within the limits.
        loss_interval (`tuple[float, float]`): 95 % interval of its expected loss, over the resampled fits.
        speeds (`dict[float, Choice]`): the best shape at this and, where others are needed, at higher speeds.
        runners_up (`list[Candidate]`): the next best shapes of the chosen E, sorted by loss.
        candidates (`list[Candidate]`): all shapes of the search.
        warnings (`list[str]`): quantities in which the law extrapolates, or its range instead of a limit was met.
    """

    request: Request
    fit: LawFit
    choice: Choice
    loss_interval: tuple[float, float]
    speeds: dict[float, Choice]
    runners_up: list[Candidate]
    candidates: list[Candidate]
    warnings: list[str]

    @property
    def law(self) -> ScalingLaw:
        return self.fit.law

    @property
    def best(self) -> Candidate:
        return self.choice.best

    @property
    def per_expansion(self) -> list[Candidate]:
        return self.choice.per_expansion

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
            "expansion_interval": list(self.choice.expansion_interval),
            "equivalent_expansions": self.choice.equivalent,
            "per_expansion": [
                shape.row | {"excess_loss": excess[0], "excess_loss_interval": list(excess[1:])}
                for shape, excess in zip(self.per_expansion, self.choice.excess, strict=True)
            ],
            "speeds": [
                choice.best.row
                | {"tokens_per_second": speed, "expansion_interval": list(choice.expansion_interval)}
                | {"equivalent_expansions": choice.equivalent}
                for speed, choice in self.speeds.items()
            ],
            "runners_up": [candidate.row for candidate in self.runners_up],
            "granularities": self.granularities,
            "warnings": self.warnings,
            "candidates": [candidate.row for candidate in self.candidates],
        }

    @property
    def intervals(self) -> dict:
        """95 % intervals of a fitted law's coefficients; `None` for an end that the runs do not determine."""
        if self.fit.profile is None:
            return {}
        finite = {name: [e if math.isfinite(e) else None for e in ends] for name, ends in self.fit.intervals().items()}
        return {"intervals": finite}

    @property
    def prefill_seconds(self) -> float | None:
        """Seconds to process a prompt of 512 tokens, or of the context length if that is shorter."""
        return self.request.device.prefill_seconds(self.best.config, min(PROMPT_TOKENS, self.request.context))

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


def plan(request: Request, fit: LawFit | None = None) -> Plan:
    """
    Chooses width, depth and E; see [`choose`].

    Args:
        request (`Request`): limits and budgets.
        fit (`LawFit`, defaults to [`published_fit`]): predicts the losses.

    Raises:
        ValueError: when no shape is within the limits, or the law does not reach to the budget. The message says what
            would fit.
    """
    fit = published_fit() if fit is None else fit
    shapes = search(request, fit.law)
    feasible = [shape for shape in shapes if not shape.broken]
    if not feasible:
        raise ValueError(explain_nothing_fits(shapes, request))
    speeds: dict[float, Choice] = {}
    for multiple in SPEEDS:
        speed, met = multiple * request.tokens_per_second, [known.best.decode_speed for known in speeds.values()]
        fast = [shape for shape in feasible if shape.decode_speed >= speed]
        if fast and speed > max(met, default=0):
            speeds[speed] = choose(fast, fit)
    choice = speeds[request.tokens_per_second]
    best, lowest, rmse = choice.best, min(shape.loss for shape in choice.per_expansion), fit.law.rmse

    def judged(shape: Candidate) -> Candidate:
        return dataclasses.replace(shape, verdict="; ".join(shape.broken) or verdict(shape, best, lowest, rmse))

    numbers = (best.config.num_active_parameters, best.tokens, best.expansion)
    warnings = fit.law.outside(*numbers)
    largest = fit.law.ranges.get("active_parameters", (0, math.inf))[1]
    if not request.extrapolate and numbers[0] > largest:
        warnings.append(
            f"sizes end at the {millions(largest)} active parameters (+ 10 %) that the law was fitted to, "
            "before the limits do"
        )
    runners_up = sorted(
        (shape for shape in feasible if shape.expansion == best.expansion and shape is not best),
        key=lambda shape: shape.loss,
    )
    low, high = fit.loss_interval(*numbers)
    return Plan(
        request,
        fit,
        dataclasses.replace(
            choice, best=judged(best), per_expansion=[judged(shape) for shape in choice.per_expansion]
        ),
        (float(low), float(high)),
        speeds,
        [judged(shape) for shape in runners_up[:5]],
        [judged(shape) for shape in shapes],
        warnings,
    )


def choose(shapes: list[Candidate], fit: LawFit) -> Choice:
    """
    The shape with the lowest predicted loss, up to differences that the law cannot resolve.

    E = 8, which the paper chose for S, M and L, is preferred if it is within the law's RMSE of the lowest loss. Of the
    shapes of the chosen E within a tenth of the RMSE, the one with width / depth closest to the paper's 40 is chosen.
    """
    by_expansion: dict[int, list[Candidate]] = {}
    for shape in sorted(shapes, key=lambda shape: (shape.expansion, shape.loss)):
        by_expansion.setdefault(shape.expansion, []).append(shape)
    leaders = [members[0] for members in by_expansion.values()]
    lowest = min(leaders, key=lambda shape: shape.loss)
    equivalent = [shape.expansion for shape in leaders if shape.loss <= lowest.loss + fit.law.rmse]
    chosen = PAPER_EXPANSION if PAPER_EXPANSION in equivalent else lowest.expansion
    members = by_expansion[chosen]
    near = [shape for shape in members if shape.loss <= members[0].loss + fit.law.rmse / 10]
    best = min(near, key=lambda shape: (abs(math.log(aspect(shape) / PAPER_ASPECT)), shape.loss))
    per_expansion = [best if shape.expansion == chosen else shape for shape in leaders]

    # By every resampled fit, the lowest loss of each E: (bootstrap, expansions).
    refitted = np.stack([sample_losses(group, fit).min(axis=1) for group in by_expansion.values()], axis=1)
    expansions = np.array(list(by_expansion))
    low, high = np.quantile(expansions[refitted.argmin(axis=1)], [0.025, 0.975], method="nearest")
    differences = sample_losses(per_expansion, fit) - sample_losses([best], fit)
    ends = np.quantile(differences, [0.025, 0.975], axis=0)
    excess = [
        (shape.loss - best.loss, float(one), float(two)) for shape, one, two in zip(per_expansion, *ends, strict=True)
    ]
    return Choice(best, per_expansion, excess, equivalent, (int(low), int(high)))


def sample_losses(shapes: list[Candidate], fit: LawFit) -> np.ndarray:
    """Losses by every resampled fit, `(bootstrap, shapes)`."""
    points = np.array([(shape.config.num_active_parameters, shape.tokens, shape.expansion) for shape in shapes])
    return np.minimum(fit.losses(*points.T), MAX_LOSS)


def aspect(shape: Candidate) -> float:
    return shape.config.hidden_size / shape.config.num_hidden_layers


def verdict(shape: Candidate, best: Candidate, lowest: float, rmse: float) -> str:
    """Explains why a shape within all limits was chosen or not."""
    if shape.config is best.config:
        if best.loss > lowest + rmse / 10:
            return f"chosen: the paper's E = {best.expansion}, within the law's error ({rmse:.2g}) of the lowest loss"
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
