"""
Re-makes the report of the ablation and its pictures from the points of one or several files.

    python benchmarks/ablation_report.py [docs/ablation.jsonl ...] [--output docs/ablation.md]

Findings are differences within a seed, with the interval of Student's t over seeds; docs/scaling.md has the design.
The laws are compared by `ablation_laws.py`. One JSON line last.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ablation import ARMS, RATES, read_points
from ablation_laws import check_values, compare_forms
from ablation_power import pairs_needed
from scipy import stats

from mobilemoe.artifacts import write_text
from mobilemoe.display import markdown, picture
from mobilemoe.plan.fit import fit_law
from mobilemoe.plan.law import COLUMNS, ScalingLaw
from mobilemoe.plan.report import fit_rows


Arm = tuple[int, int, bool]
# Each finding: the claim, a weighted sum of losses of the arms, and the sign that it has if the claim holds. For a
# gain that diminishes, the sum is the gain of the second step minus that of the first.
FINDINGS: tuple[tuple[str, dict[Arm, int], int], ...] = (
    ("1. experts help: E = 8 below dense", {(8, 2, False): 1, (1, 2, False): -1}, -1),
    ("1. no further: E = 32 not below 8", {(32, 2, False): 1, (8, 2, False): -1}, 1),
    (
        "1. saturation: 8 to 32 gains less than dense to 8",
        {(8, 2, False): 2, (32, 2, False): -1, (1, 2, False): -1},
        -1,
    ),
    ("2. finer experts help: granularity 8 below 2", {(8, 8, False): 1, (8, 2, False): -1}, -1),
    ("2. and further: granularity 16 below 8", {(8, 16, False): 1, (8, 8, False): -1}, -1),
    (
        "2. diminishing: 8 to 16 gains less than 2 to 8",
        {(8, 8, False): 2, (8, 16, False): -1, (8, 2, False): -1},
        -1,
    ),
    ("3. a shared expert helps, at granularity 8", {(8, 8, True): 1, (8, 8, False): -1}, -1),
)


def paired(points: Sequence[dict], weights: dict[Arm, int]) -> list[float]:
    """The weighted sum of losses of every seed that has all arms."""
    losses: dict[int, dict[Arm, float]] = {}
    for point in points:
        arm = (point["expansion"], point["granularity"], point["shared"])
        losses.setdefault(point["seed"], {})[arm] = point["loss"]
    return [
        sum(weight * arms[arm] for arm, weight in weights.items())
        for _, arms in sorted(losses.items())
        if all(arm in arms for arm in weights)
    ]


def interval(sums: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its confidence interval, by Student's t; infinite for a single value."""
    if len(sums) < 2:
        return statistics.mean(sums), math.inf
    quantile = float(stats.t.ppf((1 + level) / 2, len(sums) - 1))
    return statistics.mean(sums), quantile * statistics.stdev(sums) / math.sqrt(len(sums))


def judge(mean: float, half: float, sign: int) -> str:
    if abs(mean) <= half:
        return "not resolved"
    return "holds" if mean * sign > 0 else "does not hold"


def findings_cell(points: Sequence[dict]) -> list[dict]:
    """The width and the number of tokens with the most points; of equal ones, those with the most tokens."""
    cells: dict[tuple, list[dict]] = {}
    for point in points:
        if point["rate"] == 1:
            cells.setdefault((point["width"], point["layers"], point["tokens"]), []).append(point)
    return cells[max(cells, key=lambda key: (len(cells[key]), key[2]))]


def losses_table(points: Sequence[dict]) -> str:
    rows = []
    for arm in ARMS:
        members = [p for p in points if (p["expansion"], p["granularity"], p["shared"]) == arm]
        if not members:
            continue
        values = [point["loss"] for point in members]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        first = members[0]
        rows.append(
            (
                arm[0],
                arm[1],
                "yes" if arm[2] else "no",
                f"{first['active_parameters']:,}",
                f"{first['active_parameters'] - first['embedding_parameters']:,}",
                f"{first['total_parameters']:,}",
                f"{statistics.mean(values):.4f}{spread}",
                f"{statistics.mean(point['bits_per_byte'] for point in members):.4f}",
                len(values),
            )
        )
    columns = ("E", "granularity", "shared", "active", "without embedding", "total", "loss, mean ± sd")
    return markdown((*columns, "bits per byte", "seeds"), rows)


def router_part(points: Sequence[dict], weights: dict[Arm, int], law: ScalingLaw) -> float:
    """
    The part of a weighted sum that a law ascribes to the routers' parameters: finer and more experts have larger
    routers, which are a sixth of the active parameters at this size and 0.3 % in S.
    """
    arms = {(point["expansion"], point["granularity"], point["shared"]): point for point in points}
    part = 0.0
    for arm, weight in weights.items():
        active, tokens = arms[arm]["active_parameters"], arms[arm]["tokens"]
        without = active - arms[arm]["router_parameters"]
        part += weight * float(law.loss(active, tokens, arm[0]) - law.loss(without, tokens, arm[0]))
    return part


def findings_table(points: Sequence[dict], law: ScalingLaw | None) -> tuple[str, dict]:
    rows, result = [], {}
    for claim, weights, sign in FINDINGS:
        sums = paired(points, weights)
        if len(sums) < 2:
            rows.append((claim, "", "", len(sums), "", "not measured: fewer than two seeds"))
            continue
        part = "" if law is None else f"{router_part(points, weights, law):+.4f}"
        mean, half = interval(sums)
        verdict = judge(mean, half, sign)
        needed = pairs_needed(mean, statistics.stdev(sums)) if verdict == "not resolved" else ""
        rows.append((claim, f"{mean:+.4f} ± {half:.4f}", part, len(sums), needed, verdict))
        result[claim] = {"mean": float(mean), "half_width": half, "pairs": len(sums), "verdict": verdict}
    columns = ("finding of the paper", "difference, 95 %", "of it by router parameters", "pairs")
    return markdown((*columns, "pairs for 90 % power", "verdict"), rows), result


def rates_table(points: Sequence[dict]) -> str | None:
    """Losses at other learning rates less those at the one of the runs, or `None` without such runs."""
    losses = {(p["width"], p["expansion"], p["tokens"], p["seed"], p["rate"]): p["loss"] for p in points}
    rows = []
    for (width, expansion, tokens, seed, rate), loss in sorted(losses.items()):
        base = losses.get((width, expansion, tokens, seed, 1.0))
        if rate in RATES and base is not None:
            rows.append((width, expansion, f"{tokens:,}", f"{rate:g}", f"{loss - base:+.4f}"))
    return markdown(("width", "E", "tokens", "learning rate, times ours", "loss over ours"), rows) if rows else None


def laws_section(points: Sequence[dict], bootstrap: int) -> tuple[str, dict, ScalingLaw | None]:
    grid = [point for point in points if point["rate"] == 1]
    try:
        comparisons = compare_forms(grid, bootstrap)
    except ValueError as error:
        return f"None yet. {error}", {}, None
    rows = [
        (
            one.name,
            "yes" if one.embeddings else "no",
            one.num_parameters,
            f"{one.rmse:.4f}",
            f"{one.heldout:.4f} ({one.heldout_interval[0]:.4f} to {one.heldout_interval[1]:.4f})",
        )
        for one in comparisons
    ]
    width = max(point["width"] for point in points)
    columns = ("law", "embedding in N", "parameters", "RMSE", f"RMSE at width {width}, fitted to the others (95 %)")
    lines = [markdown(columns, rows)]
    sweep = [point for point in grid if point["granularity"] == 2 and not point["shared"]]
    fit = fit_law({name: np.array([float(p[name]) for p in sweep]) for name in COLUMNS}, unit=1e6)
    lines.append(
        f"The paper's form on {len(sweep)} points, N with the embedding and D in millions, 95 % profile intervals, "
        f"RMSE {fit.law.rmse:.4f}:"
    )
    lines.append(markdown(("coefficient", "estimate", "interval"), fit_rows(fit)))
    best = min(comparisons, key=lambda one: one.heldout)
    return "\n\n".join(lines), {"best_law": best.name, "heldout_rmse": best.heldout}, fit.law


def plot_findings(points: Sequence[dict], path: Path) -> None:
    """One panel per finding: differences within a seed, their mean and its 95 % interval."""
    panels = (
        ("1. experts", "E", [((e, 2, False), f"{e}") for e in (4, 8, 32)], (1, 2, False), "dense"),
        ("2. granularity", "granularity", [((8, g, False), f"{g}") for g in (8, 16)], (8, 2, False), "2"),
        ("3. shared expert", "", [((8, 8, True), "shared")], (8, 8, False), "none"),
    )
    with picture(path, (10, 3.4), 1, 3, sharey=True, width_ratios=(3, 2, 1.4)) as axes:
        for axis, (title, label, arms, base, name) in zip(axes, panels, strict=True):
            axis.axhline(0, color="black", linewidth=1)
            for position, (arm, _) in enumerate(arms):
                sums = paired(points, {arm: 1, base: -1})
                axis.plot([position - 0.15] * len(sums), sums, ".", color="C0", alpha=0.5, markersize=5)
                if len(sums) > 1:
                    mean, half = interval(sums)
                    axis.errorbar(position, mean, half, fmt="o", color="C1", capsize=5, linewidth=2)
            axis.set_xticks(range(len(arms)), [text for _, text in arms])
            axis.set_xlim(-0.6, len(arms) - 0.4)
            axis.set(title=title, xlabel=f"{label} (against {name})".strip())
        axes[0].set_ylabel("loss difference (nats per token)")


def plot_compute(points: Sequence[dict], path: Path) -> None:
    """Loss against training compute 6 N D, one panel per E beside the dense model; bars span the seeds."""
    grid = [point for point in points if point["rate"] == 1 and point["granularity"] == 2 and not point["shared"]]
    groups: dict[tuple, list[dict]] = {}
    for point in grid:
        groups.setdefault((point["expansion"], point["width"], point["tokens"]), []).append(point)
    expansions = sorted({point["expansion"] for point in grid})
    with picture(path, (7, 4.2)) as (axis,):
        for number, expansion in enumerate(expansions):
            cells = sorted(
                (6 * members[0]["active_parameters"] * tokens, [member["loss"] for member in members])
                for (e, _, tokens), members in groups.items()
                if e == expansion
            )
            means = np.array([statistics.mean(losses) for _, losses in cells])
            compute = np.array([flops for flops, _ in cells])
            low = means - [min(losses) for _, losses in cells]
            high = np.array([max(losses) for _, losses in cells]) - means
            axis.errorbar(compute, means, [low, high], fmt="o", markersize=3, color=f"C{number}", alpha=0.5)
            # The best loss for this much compute.
            axis.plot(compute, np.minimum.accumulate(means), color=f"C{number}", label=f"E = {expansion}")
        axis.set(xscale="log", xlabel="training FLOPs, 6 N D", ylabel="loss (nats per token)")
        axis.legend()


def report(points: list[dict], output: Path, bootstrap: int = 30) -> tuple[str, dict]:
    """
    The report as Markdown, and its numbers. Pictures are written next to `output`.

    Raises:
        ValueError: without a point, for a loss that is not a number, or for runs on different text.
    """
    if not points:
        raise ValueError("There is no complete run to report. Run benchmarks/ablation.py, or name its --output.")
    # A point in two files is the same run.
    points = list({point["id"]: point for point in points}.values())
    check_values(points)
    cell = findings_cell(points)
    first = cell[0]
    laws, law_result, law = laws_section(points, bootstrap)
    findings, result = findings_table(cell, law)
    pictures = [output.with_name(f"{output.stem}_{name}.png") for name in ("findings", "compute")]
    plot_findings(cell, pictures[0])
    plot_compute(points, pictures[1])
    sections = [
        "# Ablation",
        "The paper's three findings on small models, as designed in [scaling.md](scaling.md#the-experiment). Written "
        "by `python benchmarks/ablation_report.py` from the runs in `ablation.jsonl`.",
        f"{len(points)} points on text {first['text']}.",
        "## Findings",
        f"Width {first['width']}, {first['layers']} layers, {first['tokens']:,} tokens; nats per held-out token. "
        "Differences are within a seed, with the 95 % interval of their mean. By router parameters: what the law "
        "below ascribes to them.",
        findings,
        f"![Differences within a seed, by finding]({pictures[0].name})",
        "## Losses",
        losses_table(cell),
        f"![Loss against compute]({pictures[1].name})",
        "## Laws",
        laws,
    ]
    if rates := rates_table(points):
        sections += ["## Learning rates", rates]
    return "\n\n".join(sections) + "\n", {"benchmark": "ablation_report", "points": len(points)} | {
        "findings": result,
        **law_result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("points", type=Path, nargs="*", default=[Path("docs/ablation.jsonl")])
    parser.add_argument("--output", type=Path, default=Path("docs/ablation.md"))
    parser.add_argument("--bootstrap", type=int, default=30, help="refits for the intervals of the held-out error")
    arguments = parser.parse_args()
    text, result = report(
        [point for file in arguments.points for point in read_points(file)], arguments.output, arguments.bootstrap
    )
    write_text(arguments.output, text)
    print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
