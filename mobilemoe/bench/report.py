"""Tables and pictures of what `mobilemoe bench` measured."""

from pathlib import Path

from ..artifacts import Benchmark, Spread
from ..shapes import published_speeds


MEASURES = ("prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s")


def print_table(result: Benchmark, paper: bool = False) -> None:
    """Prints the medians with their spread; with `paper`, the paper's phones below."""
    from rich.console import Console
    from rich.table import Table

    def with_spread(row: Spread | None) -> str:
        if row is None:
            return ""
        return f"{row.median:.4g} ({row.p10:.4g}-{row.p90:.4g})"

    machine = result.machine
    table = Table(
        title=f"{machine.cpu}, {machine.threads} threads, {result.prompt}: median (10-90 %)",
        caption=f"Memory read rate {with_spread(result.read_gb_per_s)} GB/s" if result.read_gb_per_s else None,
    )
    for column in ("model", "prompt", "prefill tok/s", "first token ms", "decode tok/s", "of limit", "load s", "MB"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for name, model in result.models.items():
        load = " ".join(f"{state} {start.load:.2f}" for state, start in model.start_seconds.items())
        for length, row in model.lengths.items():
            share = row.decode_of_memory_limit
            table.add_row(
                name,
                length,
                *map(with_spread, (row.prefill_tokens_per_s, row.first_token_ms, row.decode_tokens_per_s)),
                "" if share is None else f"{share:.0%}",
                load,
                "" if model.peak_memory_bytes is None else f"{model.peak_memory_bytes / 1e6:,.0f}",
            )
            # Once per model.
            name, load = "", ""
    # Wide enough for every number, also when the output is a file.
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    for name, model in result.models.items():
        for length, times in (model.operator_ms or {}).items():
            for phase, operators in times.items():
                table = Table("operator", "ms", title=f"{name}, {phase}, {length} tokens")
                for operator, milliseconds in operators.items():
                    table.add_row(operator, f"{milliseconds:.3f}")
                console.print(table)
    if paper:
        table = Table("the paper's", "model", "context", "prefill tok/s", "first token ms", "decode tok/s")
        measured = {"S", "MobileLLM-Pro", *result.models}
        for device, name, length, row in (row for row in published_speeds() if row[1] in measured):
            cells = (f"{row[key]:.4g}" if key in row else "" for key in MEASURES)
            table.add_row(device, name, str(length), *cells)
        console.print(table)


def draw(result: Benchmark, path: str | Path, paper: bool = False) -> None:
    """
    Writes prefill and decode rates by length, with their spread, as a picture; its suffix names the format. With
    `paper`, those of the paper's phones for the same shapes are dashed lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (
        ("prefill_tokens_per_s", "prompt, tokens", lambda row: row.prefill_tokens_per_s),
        ("decode_tokens_per_s", "context, tokens", lambda row: row.decode_tokens_per_s),
    )
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
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_title(f"{key.split('_')[0]}, tokens/s")
    # Decoding has all lines; of prefill some sources say nothing.
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{result.machine.cpu}, {result.machine.threads} threads", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
