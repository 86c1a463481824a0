"""Tables and figures of `mobilemoe bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..display import number, picture, table, with_spread
from ..results import Benchmark, Spread
from ..shapes import published_speeds


if TYPE_CHECKING:
    from rich.console import Group

MEASURES = {
    "prefill_tokens_per_s": "prefill tok/s",
    "first_token_ms": "first token ms",
    "decode_tokens_per_s": "decode tok/s",
}


def tables(result: Benchmark, paper: bool = False) -> "list[Group]":
    """Tables of speeds, load times and memory, of operators if profiled, and with `paper` of the paper's phones."""
    made = [speed_table(result), load_table(result)]
    for name, model in result.models.items():
        for length, times in (model.operator_ms or {}).items():
            for phase, operators in times.items():
                rows = [(operator, f"{milliseconds:.3f}") for operator, milliseconds in operators.items()]
                made.append(table(("operator", "ms"), rows, f"{name}, {phase}, {length} tokens"))
    if paper:
        made.append(paper_table({"S", "MobileLLM-Pro", *result.models}))
    return made


def paper_table(models: set[str]) -> "Group":
    rows, above = [], None
    for device, name, length, row in published_speeds():
        if name in models:
            speeds = (number(row[key]) if key in row else "" for key in MEASURES)
            # Print the name of a phone once.
            rows.append(("" if device == above else device, name, length, *speeds))
            above = device
    return table(("phone", "model", "context", *MEASURES.values()), rows, "Published by the paper")


def cell(row: Spread | None) -> str:
    return "" if row is None else with_spread(row.median, row.p10, row.p90)


def speed_table(result: Benchmark) -> "Group":
    rows = []
    for name, model in result.models.items():
        for index, (length, row) in enumerate(model.lengths.items()):
            share = row.decode_of_memory_limit
            rows.append(
                (
                    # Print the name of a model once.
                    "" if index else name,
                    length,
                    cell(row.prefill_tokens_per_s),
                    # No spread: it is that of the prefill.
                    "" if row.first_token_ms is None else number(row.first_token_ms.median),
                    cell(row.decode_tokens_per_s),
                    "" if share is None else f"{share:.0%}",
                )
            )
    machine = result.machine
    title = f"{machine.cpu}, {machine.threads} threads, {result.prompt}: median (10-90 %)"
    caption = "of limit: of the decode speed at which the weights are read as fast as the memory allows"
    if result.read_gb_per_s is not None:
        caption += f", {cell(result.read_gb_per_s)} GB/s"
    return table(("model", "prompt", *MEASURES.values(), "of limit"), rows, title, f"{caption}.")


def load_table(result: Benchmark) -> "Group":
    rows = []
    for name, model in result.models.items():
        starts, peak = model.start_seconds, model.peak_memory_bytes
        loads = [number(starts[state].load) if state in starts else "" for state in ("cold", "warm")]
        rows.append((name, *loads, "" if peak is None else f"{peak / 1e6:,.0f}"))
    return table(("model", "cold load s", "warm load s", "peak MB"), rows, "Load times and memory")


def draw(result: Benchmark, path: str | Path, paper: bool = False) -> None:
    """
    Plots prefill and decode speeds over the length, with their spread, in the format of the file suffix. With `paper`,
    the paper's speeds on phones are dashed lines.
    """
    panels = (
        ("prefill_tokens_per_s", "prompt, tokens", lambda row: row.prefill_tokens_per_s),
        ("decode_tokens_per_s", "context, tokens", lambda row: row.decode_tokens_per_s),
    )
    with picture(path, (10, 3.6), 1, 2) as axes:
        for axis, (key, label, rate) in zip(axes, panels, strict=True):
            for name, model in result.models.items():
                measured = {int(length): rate(row) for length, row in model.lengths.items() if rate(row)}
                lengths, rows = list(measured), list(measured.values())
                medians = [row.median for row in rows]
                errors = [[row.median - row.p10 for row in rows], [row.p90 - row.median for row in rows]]
                axis.errorbar(lengths, medians, yerr=errors, marker="o", capsize=3, label=name)
            published: dict[str, list[tuple[int, float]]] = {}
            for device, name, length, row in published_speeds() if paper else ():
                if key in row and name in ("S", "MobileLLM-Pro"):
                    published.setdefault(f"{name}, {device.split(' (')[0]}, paper", []).append((length, row[key]))
            for name, points in published.items():
                axis.plot(*zip(*points, strict=True), linestyle="--", marker=".", linewidth=1, label=name)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set_ylim(bottom=0)
            axis.set(xlabel=label, title=f"{key.split('_')[0]}, tokens/s")
        # Only the decode panel has all lines: some sources do not report prefill.
        axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        axes[0].figure.suptitle(f"{result.machine.cpu}, {result.machine.threads} threads")
