"""Output of a plan and of a fitted law: tables, a summary sentence, figures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..costs import read_device
from ..display import markdown, picture, table
from .fit import LawFit, heldout_error
from .law import PAPER_GRID
from .planner import PROMPT_TOKENS, Candidate, Plan, describe, millions


if TYPE_CHECKING:
    from rich.console import Group

# Tokens per second below which an answer takes longer than people like to wait: about twice the speed of reading.
SLOW = 10.0
# For a request without a device.
EXAMPLE_DEVICE = "galaxy-s25"


def plan_report(result: Plan) -> "list[str | Group]":
    """A sentence on why this shape was chosen, a table of the best shape of every E, and extrapolation warnings."""
    parts = [why(result), plan_table(result)]
    if note := slowness(result):
        parts.append(note)
    if result.warnings:
        parts.append(f"The law extrapolates: {'; '.join(result.warnings)}.")
    return parts


def why(result: Plan) -> str:
    best, (low, high) = result.best, result.loss_interval
    shape, reason = describe(best), best.verdict.removeprefix("chosen: ")
    within = sum(not candidate.broken for candidate in result.candidates)
    return (
        f"{shape[0].upper()}{shape[1:]}: {reason} among the {within} of {len(result.candidates)} shapes that are "
        f"within the limits; {best.loss:.4f} nats per token, 95 % interval {low:.4f} to {high:.4f}."
    )


def slowness(result: Plan) -> str | None:
    """A sentence on a shape that is slow because no speed was asked for; `None` for another."""
    request, config = result.request, result.best.config
    if request.inference_flops is not None or request.tokens_per_second is not None:
        return None
    device = request.device or read_device(EXAMPLE_DEVICE)
    speed = device.decode_tokens_per_second(config, request.context)
    if speed >= SLOW:
        return None
    option = "--tokens-per-second 20" if request.device else f"--device {EXAMPLE_DEVICE} --tokens-per-second 20"
    return (
        f"Slow: {speed:.1f} tokens/s at a context of {request.context} on {device.name}, because no speed was asked "
        f"for. For a faster model, set {option} or --inference-gflops 0.5."
    )


def plan_table(result: Plan) -> "Group":
    """The best shape of every E within the limits."""
    best, request, device = result.best, result.request, result.request.device

    def verdict(shape: Candidate) -> str:
        if shape.config is best.config:
            return "chosen"
        difference = shape.loss - best.loss
        return "tied" if abs(difference) <= result.law.rmse else f"{difference:+.4f}"

    columns = ["E", "width", "layers", "experts", "active", "total", "GB", "loss", "verdict"]
    rows = [
        [
            shape.expansion,
            shape.config.hidden_size,
            shape.config.num_hidden_layers,
            f"{shape.config.num_local_experts} x {shape.config.intermediate_size}",
            millions(shape.config.num_active_parameters),
            millions(shape.config.num_total_parameters),
            f"{shape.memory / 1e9:.3g}",
            f"{shape.loss:.4f}",
            verdict(shape),
        ]
        for shape in result.per_expansion
    ]
    notes = [f"GB: weights and a cache of {request.context} tokens at {request.kv_bits} bits."]
    if device is not None:
        columns.insert(-1, "tok/s")
        for row, shape in zip(rows, result.per_expansion, strict=True):
            row.insert(-1, f"{shape.decode_speed:.1f}")
        notes.append(f"tok/s: decoding at that context on {device.name}.")
        if result.prefill_seconds is not None:
            prompt = min(PROMPT_TOKENS, request.context)
            notes.append(f"First token of a {prompt}-token prompt after {result.prefill_seconds:.2f} s.")
    if any(row[-1] == "tied" for row in rows):
        notes.append(f"Tied: within the law's error ({result.law.rmse:.2g}).")
    return table(
        columns, rows, "Best shape of every E within the limits", " ".join(notes), result.per_expansion.index(best)
    )


def plot_plan(result: Plan, path: str | Path) -> None:
    """Plots predicted loss over memory for all shapes, coloured by E, with the memory limit and the chosen shape."""
    best, (low, high) = result.best, result.loss_interval
    with picture(path, (7.5, 4.5)) as (axis,):
        for color, expansion in enumerate(PAPER_GRID["expansion"]):
            members = [shape for shape in result.candidates if shape.expansion == expansion]
            within = [shape for shape in members if not shape.broken]
            for shapes, alpha in ((members, 0.15), (within, 1.0)):
                axis.scatter(
                    [shape.memory / 1e9 for shape in shapes],
                    [shape.loss for shape in shapes],
                    s=12,
                    color=f"C{color}",
                    alpha=alpha,
                    label=f"E = {expansion}" if alpha == 1 else None,
                )
        axis.axvline(result.request.memory / 1e9, color="grey", linestyle="--", linewidth=1)
        axis.errorbar(
            best.memory / 1e9, best.loss, [[best.loss - low], [high - best.loss]], fmt="k*", markersize=12, capsize=4
        )
        axis.set(xscale="log", xlabel="memory (GB)", ylabel="predicted loss (nats per token)", title=describe(best))
        axis.set_xlim(best.memory / 1e9 / 20, max(result.request.memory, best.memory) / 1e9 * 4)
        axis.legend()


def fit_rows(fit: LawFit) -> list[tuple[str, str, str]]:
    """Rows of coefficient, estimate and interval."""
    return [
        (name, f"{fit.law.__dict__[name]:.4g}", f"{low:.4g} to {high:.4g}")
        for name, (low, high) in fit.intervals().items()
    ]


def fit_sentences(fit: LawFit, runs: dict[str, np.ndarray]) -> tuple[str, str]:
    """Sentences on what was fitted and on the errors of the fit."""
    try:
        heldout = f"{heldout_error(runs, unit=fit.law.unit, e_start=fit.law.e_start, e_max=fit.law.e_max):.4f}"
    except ValueError:
        heldout = "not known: the others are too few"
    return (
        f"The joint law fitted to {len(fit.residuals)} runs, N and D in units of {fit.law.unit:g}, 95 % intervals",
        f"RMSE {fit.law.rmse:.4f}; of the runs with most tokens, fitted to the others, {heldout}",
    )


def fit_table(fit: LawFit, runs: dict[str, np.ndarray]) -> "Group":
    return table(("coefficient", "estimate", "interval"), fit_rows(fit), *fit_sentences(fit, runs))


def describe_fit(fit: LawFit, runs: dict[str, np.ndarray]) -> str:
    """[`fit_table`] as Markdown."""
    title, error = fit_sentences(fit, runs)
    return f"{title}\n\n{markdown(('coefficient', 'estimate', 'interval'), fit_rows(fit))}\n\n{error}"


def plot_fit(fit: LawFit, runs: dict[str, np.ndarray], path: str | Path) -> None:
    """Plots measured losses over E with the fitted curves and their 95 % intervals, one panel per size."""
    sizes = _sizes(runs)
    expansions = sorted(set(runs["expansion"]))
    curve = np.geomspace(1, expansions[-1], 60)
    with picture(path, (4.2 * len(sizes), 4), 1, len(sizes), sharey=True) as axes:
        for axis, members in zip(axes, sizes, strict=True):
            size = float(np.mean(runs["active_parameters"][members]))
            for number, tokens in enumerate(sorted(set(runs["tokens"][members]))):
                rows = members & (runs["tokens"] == tokens)
                low, high = fit.loss_interval(size, tokens, curve)
                color = f"C{number}"
                axis.fill_between(curve, low, high, color=color, alpha=0.2, linewidth=0)
                axis.plot(curve, fit.law.loss(size, tokens, curve), color=color, label=f"{tokens:.3g} tokens")
                axis.plot(runs["expansion"][rows], runs["loss"][rows], "o", color=color, markersize=4)
            axis.set(xscale="log", xlabel="expert expansion E", title=f"{size:.3g} active parameters")
            axis.set_xticks(expansions, [f"{value:g}" for value in expansions])
            axis.minorticks_off()
            axis.legend()
        axes[0].set_ylabel("loss (nats per token)")


def _sizes(runs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Masks of the rows of each size. Router weights make active parameters vary slightly with E."""
    order = np.sort(np.unique(runs["active_parameters"]))
    groups = np.split(order, np.flatnonzero(order[1:] > 1.2 * order[:-1]) + 1)
    return [np.isin(runs["active_parameters"], group) for group in groups]
