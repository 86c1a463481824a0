"""
Load imbalance with and without the balancing bias: two otherwise identical pre-training runs, and a figure.

    python benchmarks/balance.py [--steps 480] [--output docs/balance.png]

Needs the text and the tokenizer of `make demo` in `out/demo/`. Trains `recipes/tiny/pretrain.yaml` twice into
`out/balance/` and prints the highest load of an expert over the mean, in the worst layer. The values are medians over
20 steps, since a step has only eight sequences and its load varies with their text. One JSON line last.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.ticker import ScalarFormatter

from mobilemoe.display import picture, show, table
from mobilemoe.train.routing import read_routing


OUT = Path("out/balance")
RUNS = {"with the bias": [], "without": ["--expert_bias_update_rate", "0"]}
GOAL, WINDOW = 1.5, 20


def report(output: Path) -> dict:
    """Plots and prints both runs; returns the numbers."""
    result: dict = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with picture(output, (8, 4)) as (axis,):
        for name in RUNS:
            steps = [max(row["imbalance"]) for row in read_routing(OUT / name.replace(" ", "-"))]
            medians = [statistics.median(steps[max(0, end - WINDOW) : end]) for end in range(1, len(steps) + 1)]
            above = [step for step, value in enumerate(medians, start=1) if value >= GOAL]
            below_from = (max(above, default=0) + 1) if max(above, default=0) < len(steps) else None
            first = medians[min(WINDOW, len(steps)) - 1]
            result[name] = {"first": first, "last": medians[-1], "below_from": below_from}
            (line,) = axis.plot(range(1, len(steps) + 1), medians, label=f"{name}, median of {WINDOW} steps")
            axis.plot(range(1, len(steps) + 1), steps, color=line.get_color(), alpha=0.3, linewidth=0.8)
        axis.axhline(GOAL, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="optimizer step", ylabel="busiest expert over the mean, worst layer", yscale="log")
        axis.set_yticks([1, 1.5, 2, 3, 4])
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.legend()
    rows = [
        (name, f"{row['first']:.2f}", f"{row['last']:.2f}", row["below_from"] or "never")
        for name, row in result.items()
    ]
    columns = ("busiest expert over the mean", "at first", "at last", f"stays below {GOAL} from step")
    show(table(columns, rows))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--output", type=Path, default=Path("docs/balance.png"))
    arguments = parser.parse_args()
    if not Path("out/demo/tokenizer").is_dir():
        raise SystemExit("out/demo/ has no text and tokenizer to train on. Run `make demo` first.")
    for name, options in RUNS.items():
        command = ["recipes/pretrain.py", "--config", "recipes/tiny/pretrain.yaml", *options]
        command += ["--output_dir", str(OUT / name.replace(" ", "-")), "--max_steps", str(arguments.steps)]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    print(json.dumps({"benchmark": "balance", "steps": arguments.steps} | report(arguments.output)))


if __name__ == "__main__":
    main()
