"""Tables and figures of `mobilemoe bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..display import number, picture, table, with_spread
from ..results import Benchmark, Phone, Spread
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
    if result.phone is not None:
        made.append(phone_table(result, result.phone))
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


def phone_table(result: Benchmark, phone: Phone) -> "Group":
    """How warm the device became, and where the runner ran. Empty without what the device does not report."""
    during = [phone, *phone.samples, phone.after]
    values = {
        "battery C": [condition.battery_celsius for condition in during],
        "warmest sensor C": [max(condition.zones_celsius.values(), default=None) for condition in during],
        "thermal status, 0 is none": [condition.thermal_status for condition in during],
        "highest clock MHz": [max(condition.mhz, default=None) for condition in during],
    }
    rows = []
    for name, row in values.items():
        known = [value for value in row if value is not None]
        if known:
            rows.append(
                (name, *("" if value is None else number(value, 4) for value in (row[0], max(known), row[-1])))
            )
    cores = [f"{name} on {', '.join(map(str, model.cores))}" for name, model in result.models.items() if model.cores]
    caption = f"Cores of the runner: {'; '.join(cores)}." if cores else ""
    return table(("of the device", "before", "highest", "after"), rows, "Heat", caption)


def submitted_rows(result: Benchmark) -> str:
    """Rows of a device's result, for the table in docs/phone.md. They have no serial number, host name or path."""
    phone = result.phone
    assert phone is not None
    system = f"Android {phone.android}" if phone.android else phone.build
    warmest = max((sample.thermal_status for sample in phone.samples if sample.thermal_status is not None), default="")
    lines = []
    for name, model in result.models.items():
        peak = "" if model.peak_memory_bytes is None else f"{model.peak_memory_bytes / 1e6:,.0f}"
        for length, row in model.lengths.items():
            speeds = ("" if spread is None else number(spread.median) for spread in map(vars(row).get, MEASURES))
            cells = (result.machine.cpu, system, result.machine.threads, name, length, *speeds, peak, warmest)
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


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
