"""Output of a plan and of a fitted law: tables, a summary sentence, figures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..display import markdown, picture, table
from .fit import LawFit, heldout_error
from .planner import PROMPT_TOKENS, Choice, Plan, sample_losses
from .search import EXPANSIONS, describe, millions


if TYPE_CHECKING:
    from rich.console import Group


def plan_report(result: Plan) -> "list[str | Group]":
    """What was chosen and how certain that is, the best shape of every E, what speed costs, and warnings."""
    parts = [why(result), plan_table(result)]
    if len(result.speeds) > 1:
        parts.append(speed_table(result))
    if result.warnings:
        parts.append(
            f"The law extrapolates: {'; '.join(result.warnings)}."
            if result.request.extrapolate
            else f"Note: {'; '.join(result.warnings)}."
        )
    return parts


def why(result: Plan) -> str:
    best, choice, (low, high) = result.best, result.choice, result.loss_interval
    shape, lowest = describe(best), min(choice.per_expansion, key=lambda shape: shape.loss)
    within = sum(not candidate.broken for candidate in result.candidates)
    sentences = [
        f"{shape[0].upper()}{shape[1:]}; {best.loss:.4f} nats per token, 95 % interval {low:.4f} to {high:.4f}.",
        f"Of the {within} of {len(result.candidates)} shapes within the limits, the law gives the lowest loss to E = "
        f"{lowest.expansion}, 95 % interval {expansions(choice)}.",
    ]
    if len(choice.equivalent) > 1:
        equivalent = [shape for shape in choice.per_expansion if shape.expansion in choice.equivalent]
        smallest = min(equivalent, key=lambda shape: shape.memory)
        sentences.append(
            f"E = {choice.equivalent[0]} to {choice.equivalent[-1]} are within its error of {result.law.rmse:.2g}"
            + (", and of these 8 is the paper's choice." if best.expansion != lowest.expansion else ".")
        )
        if smallest.expansion != best.expansion:
            sentences.append(f"E = {smallest.expansion} needs the least memory, {smallest.memory / 1e9:.3g} GB.")
    return " ".join(sentences)


def expansions(choice: Choice) -> str:
    """The interval of the E with the lowest loss."""
    low, high = choice.expansion_interval
    return f"{low}" if low == high else f"{low} to {high}"


def plan_table(result: Plan) -> "Group":
    """The best shape of every E within the limits."""
    best, request = result.best, result.request
    rows = []
    for shape, (excess, low, high) in zip(result.per_expansion, result.choice.excess, strict=True):
        equivalent = "equivalent" if shape.expansion in result.choice.equivalent else ""
        chosen = shape.config is best.config
        rows.append(
            [
                shape.expansion,
                shape.config.hidden_size,
                shape.config.num_hidden_layers,
                millions(shape.config.num_active_parameters),
                millions(shape.config.num_total_parameters),
                f"{shape.memory / 1e9:.3g}",
                f"{shape.decode_speed:.1f}",
                "0" if chosen else f"{excess:+.4f} ± {(high - low) / 2:.4f}",
                "chosen" if chosen else equivalent,
            ]
        )
    columns = ["E", "width", "layers", "active", "total", "GB", "tok/s", "loss", "verdict"]
    notes = [
        f"GB: weights and a cache of {request.context} tokens at {request.kv_bits} bits.",
        f"tok/s: decoding at that context on {request.device.name}.",
        "Loss: over that of the chosen one, 95 % interval.",
        f"Equivalent: within the law's error ({result.law.rmse:.2g}) of the lowest.",
    ]
    if result.prefill_seconds is not None:
        prompt = min(PROMPT_TOKENS, request.context)
        notes.append(f"First token of a {prompt}-token prompt after {result.prefill_seconds:.2f} s.")
    return table(
        columns, rows, "Best shape of every E within the limits", " ".join(notes), result.per_expansion.index(best)
    )


def speed_table(result: Plan) -> "Group":
    """The best shape at higher speeds."""
    rows = [
        [
            f"{speed:g}",
            choice.best.expansion,
            expansions(choice),
            choice.best.config.hidden_size,
            choice.best.config.num_hidden_layers,
            millions(choice.best.config.num_active_parameters),
            f"{choice.best.memory / 1e9:.3g}",
            f"{choice.best.decode_speed:.1f}",
            f"{choice.best.loss:.4f}",
        ]
        for speed, choice in result.speeds.items()
    ]
    columns = ["tok/s wanted", "E", "lowest", "width", "layers", "active", "GB", "tok/s", "loss"]
    return table(columns, rows, "What speed costs", "Lowest: 95 % interval of the E with the lowest loss.")


def plot_plan(result: Plan, path: str | Path) -> None:
    """
    Plots predicted loss over memory and over decode speed for all shapes, coloured by E, with the limits and the
    chosen shape. The line is the lowest loss within the other limits for this much memory, or at this speed, and its
    band the 95 % interval.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    request, best, (low, high) = result.request, result.best, result.loss_interval
    colors = plt.get_cmap("viridis_r")(np.linspace(0.05, 1, len(EXPANSIONS)))
    with picture(path, (11, 4.5), 1, 2, sharey=True) as axes:
        for axis, name in zip(axes, ("memory", "decode_speed"), strict=True):
            unit, limit = (1e9, request.memory) if name == "memory" else (1, request.tokens_per_second)
            for color, expansion in zip(colors, EXPANSIONS, strict=True):
                members = [shape for shape in result.candidates if shape.expansion == expansion]
                within = [shape for shape in members if not shape.broken]
                for shapes, alpha in ((members, 0.12), (within, 1.0)):
                    axis.scatter(
                        [shape.__dict__[name] / unit for shape in shapes],
                        [shape.loss for shape in shapes],
                        s=8,
                        color=color,
                        alpha=alpha,
                        label=f"E = {expansion}" if shapes and shapes is members else None,
                    )
            values, lowest, ends = frontier(result, name)
            axis.fill_between(values / unit, *ends, color="C3", alpha=0.2, linewidth=0, step="post")
            axis.step(values / unit, lowest, color="C3", linewidth=1, where="post", label="lowest")
            axis.axvline(limit / unit, color="grey", linestyle="--", linewidth=1)
            axis.errorbar(
                best.__dict__[name] / unit,
                best.loss,
                [[best.loss - low], [high - best.loss]],
                fmt="k*",
                markersize=12,
                capsize=4,
            )
            axis.set(xscale="log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        axes[0].set(xlabel="memory (GB)", ylabel="predicted loss (nats per token)", title=describe(best))
        axes[1].set(xlabel="tokens per second at the full context", title=request.device.name)
        for handle in axes[0].legend().legend_handles:
            if handle is not None:
                handle.set_alpha(1)


def frontier(result: Plan, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The lowest loss as one limit changes and the others stay: values of `memory`, or of `decode_speed`, that change
    it, the loss at each, and the ends of its 95 % interval `(2, values)`.
    """
    request = result.request
    limits = {
        "memory": [s for s in result.candidates if s.decode_speed >= request.tokens_per_second],
        "decode_speed": [s for s in result.candidates if s.memory <= request.memory],
    }
    # More memory is easier to meet, more speed harder.
    shapes = sorted(limits[name], key=lambda shape: shape.__dict__[name], reverse=name == "decode_speed")
    if request.inference_flops is not None:
        shapes = [s for s in shapes if 2 * s.config.num_active_parameters <= request.inference_flops]
    lowest = np.minimum.accumulate([shape.loss for shape in shapes])
    samples = np.minimum.accumulate(sample_losses(shapes, result.fit), axis=1)
    ends = np.quantile(samples, [0.025, 0.975], axis=0)
    return np.array([shape.__dict__[name] for shape in shapes]), lowest, ends


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
