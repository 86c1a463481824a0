"""
Checks whether the fit of the scaling law recovers known coefficients from synthetic tables with the paper's noise.

    python benchmarks/bench_law.py [--trials 100] [--bootstrap 200] [--noise 0.0076]

Every trial computes the 90 losses of the published sweep (6 expansions, 3 sizes, 5 token counts) from the published
law, adds normal noise with the published RMSE, and fits the law. It counts how often the true coefficients are inside
the 95 % intervals: each inside its profile interval, each inside its bootstrap percentiles, and all nine inside the
joint intervals. One JSON line last.
"""

import argparse
import itertools
import json
import statistics
import time

import numpy as np
from tqdm import tqdm

from mobilemoe.display import show, table
from mobilemoe.plan.fit import fit_law
from mobilemoe.plan.law import COEFFICIENTS, COLUMNS, PAPER_GRID, PAPER_LAW


def synthetic_table(noise: float, seed: int) -> dict[str, np.ndarray]:
    """The paper's grid with losses of the published law and normal noise, in nats per token."""
    cells = np.array(list(itertools.product(*(PAPER_GRID[name] for name in COLUMNS[:3]))))  # (90, 3)
    loss = PAPER_LAW.loss(*cells.T) + np.random.default_rng(seed).normal(0, noise, len(cells))
    return dict(zip(COLUMNS, [*cells.T, loss], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--noise", type=float, default=PAPER_LAW.rmse)
    arguments = parser.parse_args()

    truth = {name: PAPER_LAW.__dict__[name] for name in COEFFICIENTS}
    inside, inside_percentiles = dict.fromkeys(COEFFICIENTS, 0), dict.fromkeys(COEFFICIENTS, 0)
    estimates: dict[str, list[float]] = {name: [] for name in COEFFICIENTS}
    joint, errors, seconds = 0, [], []
    for trial in tqdm(range(arguments.trials), unit="trial"):
        runs = synthetic_table(arguments.noise, trial)
        started = time.perf_counter()
        fit = fit_law(runs, bootstrap=arguments.bootstrap, seed=trial)
        seconds.append(time.perf_counter() - started)
        own, together = fit.intervals(), fit.intervals(joint=True)
        percentiles = np.quantile(fit.samples, [0.025, 0.975], axis=0)
        for (name, value), (low, high) in zip(truth.items(), percentiles.T, strict=True):
            inside_percentiles[name] += bool(low <= value <= high)
            inside[name] += own[name][0] <= value <= own[name][1]
            estimates[name].append(fit.law.__dict__[name])
        joint += all(together[name][0] <= value <= together[name][1] for name, value in truth.items())
        grid = [runs[name] for name in COLUMNS[:3]]
        errors.append(float(np.abs(fit.law.loss(*grid) - PAPER_LAW.loss(*grid)).max()))

    count = len(errors)
    error = statistics.median(errors)
    columns = ("coefficient", "published", "median fit", "profile interval", "bootstrap percentiles")
    rows = [
        (name, f"{value:.4f}", f"{statistics.median(estimates[name]):.4f}", inside[name], inside_percentiles[name])
        for name, value in truth.items()
    ]
    show(
        table(columns, rows, f"Inside a 95 % interval, of {count} trials"),
        f"All nine inside the joint 95 % intervals: {joint} of {count}. Largest error of the fitted loss on the grid, "
        f"median of trials: {error:.4f}; noise {arguments.noise}.",
    )
    result = {"benchmark": "law", "trials": count, "inside": inside, "inside_percentiles": inside_percentiles}
    result |= {"joint": joint, "max_loss_error": error, "seconds_per_fit": statistics.median(seconds)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
