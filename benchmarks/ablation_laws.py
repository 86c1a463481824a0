"""Scaling laws of several published forms, fitted to the ablation and compared out of sample.

Every form is fitted with scipy to log losses with the Huber loss (Chinchilla, arXiv 2203.15556), from many starts. N
is the number of active parameters, T of all, D of training tokens, in millions; Ê is the paper's transform of E.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from mobilemoe.plan.law import effective_experts


# Residual of a log loss at which the loss changes from squared to linear, as Chinchilla's.
HUBER = 1e-3
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Form:
    """A law: its loss from the parameters `theta` and the columns, and starting values, one list per parameter."""

    loss: Callable[[np.ndarray, Columns], np.ndarray]
    starts: tuple[tuple[float, ...], ...]


def power(log_scale: float, exponent, values: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(log_scale + exponent * np.log(values), -50, 50))


def chinchilla(theta: np.ndarray, columns: Columns, size: str) -> np.ndarray:
    a, alpha, b, beta, c = theta
    return power(a, alpha, columns[size]) + power(b, beta, columns["D"]) + np.exp(c)


def joint(theta: np.ndarray, columns: Columns, e_start: float, e_max: float) -> np.ndarray:
    a, delta, alpha, gamma, b, omega, beta, zeta, c = theta
    log_e = np.log(effective_experts(columns["E"], e_start, e_max))
    by_size = power(a + delta * log_e, alpha + gamma * log_e, columns["N"])
    return by_size + power(b + omega * log_e, beta + zeta * log_e, columns["D"]) + np.exp(c)


def joint_free(theta: np.ndarray, columns: Columns) -> np.ndarray:
    # E_start and E_max - E_start are positive.
    start = 1 + np.exp(np.clip(theta[9], -20, 5))
    return joint(theta[:9], columns, start, start + np.exp(np.clip(theta[10], -5, 10)))


def granular(theta: np.ndarray, columns: Columns) -> np.ndarray:
    fine, gamma, a, alpha, b, beta, c = theta
    scale = power(fine, gamma, columns["G"]) + np.exp(a)
    return scale * power(0.0, alpha, columns["T"]) + power(b, beta, columns["D"]) + np.exp(c)


_HALF, _SLOPES, _FLOOR = (-1.0, 0.5), (-0.15, -0.5), (-1.0, 0.5)
_JOINT = (_HALF, (0.0,), _SLOPES, (0.0,), _HALF, (0.0,), _SLOPES, (0.0,), _FLOOR)
FORMS = {
    "paper (E_start 1, E_max 32)": Form(lambda theta, columns: joint(theta, columns, 1.0, 32.0), _JOINT),
    "Joint MoE, arXiv 2502.05172 (E_start, E_max fitted)": Form(joint_free, (*_JOINT, (-1.0,), (3.5,))),
    "Chinchilla on active parameters": Form(
        lambda theta, columns: chinchilla(theta, columns, "N"), (_HALF, _SLOPES, _HALF, _SLOPES, _FLOOR)
    ),
    "Chinchilla on total parameters": Form(
        lambda theta, columns: chinchilla(theta, columns, "T"), (_HALF, _SLOPES, _HALF, _SLOPES, _FLOOR)
    ),
    "Krajewski et al., arXiv 2402.07871, with granularity": Form(
        granular, ((-1.0,), (-0.5,), _HALF, _SLOPES, _HALF, _SLOPES, _FLOOR)
    ),
}


def columns_of(points: Sequence[dict], embeddings: bool) -> Columns:
    """The columns of points, with the embedding counted in N and T or not."""
    less = 0 if embeddings else 1
    return {
        "N": np.array([p["active_parameters"] - less * p["embedding_parameters"] for p in points]) / 1e6,
        "T": np.array([p["total_parameters"] - less * p["embedding_parameters"] for p in points]) / 1e6,
        "D": np.array([p["tokens"] for p in points]) / 1e6,
        "E": np.array([p["expansion"] for p in points], dtype=float),
        "G": np.array([p["granularity"] for p in points], dtype=float),
        "L": np.array([p["loss"] for p in points]),
    }


def check_values(points: Sequence[dict]) -> None:
    """
    Raises:
        ValueError: for a loss that is not a positive number, or for runs on different text.
    """
    broken = [point["id"] for point in points if not 0 < point["loss"] < np.inf]
    if broken:
        raise ValueError(
            f"Run {broken[0]} has the loss {next(p['loss'] for p in points if p['id'] == broken[0])}: it diverged or "
            "its line was edited. Delete the line and run benchmarks/ablation.py again, or lower its learning rate."
        )
    texts = {point["text"] for point in points}
    if len(texts) > 1:
        raise ValueError(
            f"The runs are on {len(texts)} texts ({', '.join(sorted(texts))}), whose losses do not compare. Give the "
            "runs of one."
        )


def check_points(points: Sequence[dict], num_parameters: int) -> None:
    """
    Raises:
        ValueError: when the points cannot determine a law with this many parameters. It says what is missing.
    """
    check_values(points)
    widths, tokens = {point["width"] for point in points}, {point["tokens"] for point in points}
    if len(widths) < 3 or len(tokens) < 3 or len(points) <= num_parameters:
        raise ValueError(
            f"{len(points)} points at {len(widths)} widths and {len(tokens)} numbers of tokens do not determine a law "
            f"of {num_parameters} parameters. Add runs: 3 widths, 3 numbers of tokens, {num_parameters + 1} points."
        )


def fit_form(form: Form, columns: Columns, start: np.ndarray | None = None) -> np.ndarray:
    """The parameters with the lowest Huber loss, from all starts or from one."""
    target = np.log(columns["L"])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.log(form.loss(theta, columns)) - target

    best = None
    for theta in itertools.product(*form.starts) if start is None else [start]:
        found = least_squares(residuals, theta, loss="huber", f_scale=HUBER, max_nfev=60 if start is None else 100)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    if start is None:
        best = least_squares(residuals, best.x, loss="huber", f_scale=HUBER, max_nfev=2000)
    return best.x


def rmse(form: Form, theta: np.ndarray, columns: Columns) -> float:
    return float(np.sqrt(np.mean((form.loss(theta, columns) - columns["L"]) ** 2)))


def run_of(point: dict) -> tuple:
    """What the points of one run share."""
    return tuple(point[name] for name in ("width", "layers", "expansion", "granularity", "shared", "seed", "rate"))


def resampled(points: Sequence[dict], generator: np.random.Generator) -> list[dict]:
    """A bootstrap sample of whole runs, since the points of a run share its noise."""
    runs: dict[tuple, list[dict]] = {}
    for point in points:
        runs.setdefault(run_of(point), []).append(point)
    groups = list(runs.values())
    return [point for index in generator.integers(len(groups), size=len(groups)) for point in groups[index]]


@dataclass(frozen=True)
class Comparison:
    """A form fitted to all points, and to those of smaller widths: errors in nats, 95 % intervals of a bootstrap."""

    name: str
    embeddings: bool
    num_parameters: int
    rmse: float
    heldout: float
    heldout_interval: tuple[float, float]


def compare_forms(points: Sequence[dict], bootstrap: int = 30, seed: int = 0) -> list[Comparison]:
    """
    Fits every form to the widths below the largest and measures its error on the largest.

    Args:
        points (`list[dict]`): of the grid; other arms at other granularities are used by the form that has it.
        bootstrap (`int`, defaults to 30): refits to resampled runs for the interval of the held-out error.

    Raises:
        ValueError: see [`check_points`].
    """
    check_points(points, 11)
    largest = max(point["width"] for point in points)
    generator = np.random.default_rng(seed)
    grid = [point for point in points if point["granularity"] == 2 and not point["shared"]]
    results = []
    for (name, form), embeddings in itertools.product(FORMS.items(), (True, False)):
        used = [point for point in points if not point["shared"]] if form.loss is granular else grid
        smaller = [point for point in used if point["width"] < largest]
        check_points(grid, len(form.starts))
        test = columns_of([point for point in grid if point["width"] == largest], embeddings)
        theta = fit_form(form, columns_of(smaller, embeddings))
        errors = []
        for _ in range(bootstrap):
            refitted = fit_form(form, columns_of(resampled(smaller, generator), embeddings), theta)
            errors.append(rmse(form, refitted, test))
        everything = columns_of(used, embeddings)
        low, high = np.quantile(errors, [0.025, 0.975]) if errors else (np.nan, np.nan)
        results.append(
            Comparison(
                name,
                embeddings,
                len(form.starts),
                rmse(form, fit_form(form, everything), columns_of(grid, embeddings)),
                rmse(form, theta, test),
                (float(low), float(high)),
            )
        )
    return results
