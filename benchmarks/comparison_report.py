"""Tables and the picture of bench_llama_cpp.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mobilemoe.display import number, picture, table, with_spread
from mobilemoe.results import RuntimeComparison, RuntimeTrial, Spread


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

LABELS = {"executorch": "Python", "runner": "runner", "llama.cpp": "llama.cpp"}
# Width of a group of bars; groups are 1 apart.
GROUP = 0.8
# Shape, prompt length and computing processes.
Place = tuple[str, int, int]


def extremes(row: Spread | None) -> str:
    """A median with its extremes over the invocations."""
    return "" if row is None else with_spread(row.median, row.min, row.max)


def short(shape: str) -> str:
    """The name of a shape for a narrow column: "S" or "Pro"."""
    return shape.removeprefix("MobileLLM-")


def by_runtime(result: RuntimeComparison) -> dict[Place, dict[str, RuntimeTrial]]:
    """The trials by place, then by runtime in the order of `LABELS`."""
    found: dict[Place, dict[str, RuntimeTrial]] = {}
    for runtime in LABELS:
        for trial in result.trials:
            if trial.runtime == runtime:
                place = (trial.shape, trial.prompt_length, trial.busy_processes)
                found.setdefault(place, {})[runtime] = trial
    return dict(sorted(found.items()))


def tables(result: RuntimeComparison) -> "list[Group]":
    trials, machine = by_runtime(result), result.machine
    made = [
        speed_table(
            trials,
            f"Decode tokens/s, {machine.cpu}, {machine.threads} threads: median of {result.invocations} invocations",
            lambda trial: (trial.decode_tokens_per_s, trial.decode_over_llama_cpp),
            "busy: processes that compute meanwhile. x llama.cpp: ratio (least-most of the invocations)",
        ),
        speed_table(
            trials,
            "Prefill tokens/s",
            lambda trial: (trial.prefill_tokens_per_s, trial.prefill_over_llama_cpp),
        ),
        detail_table(trials, result.read_gb_per_s),
    ]
    if any(trial.decode_over_dense for trial in result.trials):
        made.append(dense_table(trials))
    return made


def speed_table(
    trials: dict[Place, dict[str, RuntimeTrial]],
    title: str,
    speed: Callable[[RuntimeTrial], tuple[Spread, Spread | None]],
    caption: str = "",
) -> "Group":
    rows = []
    for (shape, *place), runtimes in trials.items():
        pairs = [speed(trial) for trial in runtimes.values()]
        speeds = [number(median.median) for median, _ in pairs]
        rows.append((short(shape), *place, *speeds, *(extremes(ratio) for _, ratio in pairs if ratio is not None)))
    columns = ("shape", "prompt", "busy", *LABELS.values(), "Python x llama.cpp", "runner x llama.cpp")
    return table(columns, rows, title, caption)


def detail_table(trials: dict[Place, dict[str, RuntimeTrial]], read_gb_per_s: Spread) -> "Group":
    rows = []
    for (shape, *place), runtimes in trials.items():
        for runtime, trial in runtimes.items():
            times, share, agreement = trial.token_ms, trial.decode_of_memory_limit, trial.top1_agreement
            rows.append(
                (
                    short(shape),
                    *place,
                    LABELS[runtime],
                    *(number(value) for value in (times.median, times.p90, times.max)),
                    "" if share is None else f"{share.median:.0%}",
                    f"{trial.peak_memory_bytes / 1e6:,.0f}",
                    "" if agreement is None else f"{agreement:.0%}",
                )
            )
    columns = ("shape", "prompt", "busy", "runtime", "median ms", "90 % ms", "max ms", "of limit", "peak MB", "same")
    caption = (
        f"ms: of a token. of limit: of the decode speed at which weights and cache are read as fast as a plain loop "
        f"reads memory, {extremes(read_gb_per_s)} GB/s. same: positions with llama.cpp's most probable token"
    )
    return table(columns, rows, "Latency, memory and agreement", caption)


def dense_table(trials: dict[Place, dict[str, RuntimeTrial]]) -> "Group":
    rows = []
    for (shape, *place), runtimes in trials.items():
        for runtime, trial in runtimes.items():
            if trial.decode_over_dense is not None:
                ratios = (extremes(trial.prefill_over_dense), extremes(trial.decode_over_dense))
                rows.append((short(shape), *place, LABELS[runtime], *ratios))
    columns = ("shape", "prompt", "busy", "runtime", "prefill", "decode")
    return table(columns, rows, "Speed as a multiple of MobileLLM-Pro's shape in the same runtime")


def draw(result: RuntimeComparison, path: str | Path) -> None:
    """
    Plots speeds as grouped bars with their extremes over the invocations, in the format of the file suffix: a row per
    shape, of prefill and decode by prompt length, and of decode by computing processes where it was measured.
    """
    trials = by_runtime(result)
    names = list(dict.fromkeys(trial.shape for trial in result.trials))
    busy = {trial.prompt_length for trial in result.trials if trial.busy_processes}
    columns = 3 if busy else 2
    with picture(path, (3.8 * columns, 2.6 * len(names) + 0.5), len(names), columns) as axes:
        for row, name in enumerate(names):
            own = {place: runtimes for place, runtimes in trials.items() if place[0] == name}
            idle = {f"{place[1]:,}": runtimes for place, runtimes in own.items() if place[2] == 0}
            prefill, decode, *loaded = axes[row * columns : (row + 1) * columns]
            bars(prefill, idle, lambda trial: trial.prefill_tokens_per_s)
            prefill.set(title=f"{name}: prefill, tokens/s", xlabel="prompt, tokens")
            bars(decode, idle, lambda trial: trial.decode_tokens_per_s)
            limits(decode, idle, result.read_gb_per_s.median)
            decode.set(title=f"{name}: decode, tokens/s", xlabel="context, tokens")
            for axis in loaded:
                beside = {str(place[2]): runtimes for place, runtimes in own.items() if place[1] in busy}
                bars(axis, beside, lambda trial: trial.decode_tokens_per_s)
                axis.set(title=f"{name}: decode on a busy machine", xlabel="processes that compute meanwhile")
        handles, labels = axes[1].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        machine = result.machine
        axes[0].figure.suptitle(
            f"{machine.cpu}, {machine.threads} threads, median of {result.invocations} invocations"
        )


def bars(axis: "Axes", groups: dict[str, dict[str, RuntimeTrial]], speed: Callable[[RuntimeTrial], Spread]) -> None:
    width = GROUP / len(LABELS)
    for index, (runtime, label) in enumerate(LABELS.items()):
        rows = [speed(runtimes[runtime]) for runtimes in groups.values()]
        errors = [[row.median - row.min for row in rows], [row.max - row.median for row in rows]]
        positions = [group + (index - 1) * width for group in range(len(rows))]
        label = label if runtime == "llama.cpp" else f"ours, {label}"
        axis.bar(positions, [row.median for row in rows], width, yerr=errors, capsize=2, label=label)
    axis.set_xticks(range(len(groups)), list(groups))


def limits(axis: "Axes", groups: dict[str, dict[str, RuntimeTrial]], read_gb_per_s: float) -> None:
    """Lines at the decode speed at which our weights and cache are read as fast as a plain loop reads memory."""
    heights = [1e9 * read_gb_per_s / runtimes["executorch"].bytes_per_token for runtimes in groups.values()]
    starts = [group - GROUP / 2 for group in range(len(groups))]
    axis.hlines(heights, starts, [start + GROUP for start in starts], "black", "dashed", label="memory's limit")
