"""Fits the scaling law to a table of runs, with intervals and held-out error."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .law import COEFFICIENTS, COLUMNS, PAPER_GRID, PAPER_LAW, ScalingLaw, effective_experts
from .table import check_table


# Indices of A, B and c, which are fitted as logarithms.
LOGARITHMIC = [0, 4, 8]
# Maximum solver iterations. Most starts need fewer than 50; those in flat valleys stop at the maximum.
MAX_ITERATIONS = 100
# Values of the constant c, as shares of the lowest loss, at which it is fixed in the first phase of the search.
C_SHARES = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.78, 0.84, 0.88, 0.92, 0.95, 0.98)
# Number of local minima from which every resampled fit starts.
NUM_VALLEYS = 3
# Profile points of a coefficient in each direction.
PROFILE_STEPS = 36


@dataclass(frozen=True)
class LawFit:
    """
    A law fitted to a table, with its uncertainty.

    Args:
        law (`ScalingLaw`): the law with the estimated coefficients.
        samples (`np.ndarray` of shape `(bootstrap, 9)`): coefficients refitted to resampled residuals, in the order of
            `COEFFICIENTS`.
        residuals (`np.ndarray` of shape `(rows,)`): log of predicted over measured loss.
        profile (`np.ndarray` of shape `(9, 2, 2, steps)`): per coefficient and direction (down, up), the values going
            outwards from the estimate (logarithms for A, B and c), and the likelihood-ratio statistic of the best fit
            with the coefficient fixed at that value. `None` without resampling.
        excess (`np.ndarray` of shape `(bootstrap,)`): that statistic for the estimate itself in each resampled table.
    """

    law: ScalingLaw
    samples: np.ndarray
    residuals: np.ndarray
    profile: np.ndarray | None
    excess: np.ndarray

    def intervals(self, level: float = 0.95, joint: bool = False) -> dict[str, tuple[float, float]]:
        """
        Profile-likelihood interval of each coefficient.

        Percentiles of the resampled coefficients would be too narrow, since the minimum lies in a curved valley. An
        end that the table does not determine is infinite, or zero for A, B and c.

        Args:
            level (`float`, defaults to 0.95): confidence level.
            joint (`bool`, defaults to `False`): wider intervals that cover all nine coefficients at once, with the
                threshold taken from the resampled fits.

        Raises:
            ValueError: for a fit without resampling.
        """
        if self.profile is None:
            raise ValueError("This law was fitted with bootstrap=0, which computes no intervals. Set 200, say.")
        if joint:
            limit = float(np.quantile(self.excess, level))
        else:
            # Quantile of Student's t, expanded from the normal quantile, since a table has few runs.
            z, freedom = NormalDist().inv_cdf((1 + level) / 2), max(1, len(self.residuals) - len(COEFFICIENTS))
            limit = (z + (z**3 + z) / (4 * freedom)) ** 2
        result = {}
        for index, name in enumerate(COEFFICIENTS):
            ends = [_crossing(values, statistics, limit) for values, statistics in self.profile[index]]
            result[name] = tuple(math.exp(end) for end in ends) if index in LOGARITHMIC else tuple(ends)
        return result

    def loss_interval(
        self, active_parameters, tokens, expansion, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the expected loss, without the noise of a single run. Broadcasts as `ScalingLaw.loss`."""
        losses = self.losses(active_parameters, tokens, expansion)
        return tuple(np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest"))

    def losses(self, active_parameters, tokens, expansion) -> np.ndarray:
        """
        Losses by every resampled fit, `(bootstrap, *shape)`, infinite where one overflows. Differences between points
        within a fit are paired, so their spread is smaller than that of the losses.

        Raises:
            ValueError: for a fit without resampling.
        """
        if not len(self.samples):
            raise ValueError("This law was fitted with bootstrap=0, so it has no uncertainty to use. Set 200, say.")
        rank = np.broadcast(active_parameters, tokens, expansion).ndim
        columns = self.samples.T.reshape(len(COEFFICIENTS), -1, *[1] * rank)
        law = dataclasses.replace(self.law, **dict(zip(COEFFICIENTS, columns, strict=True)))
        # Undetermined coefficients may overflow: such a loss is unbounded.
        with np.errstate(over="ignore", invalid="ignore"):
            losses = law.loss(active_parameters, tokens, expansion)
        return np.where(np.isnan(losses), np.inf, losses)


def _crossing(values: np.ndarray, statistics: np.ndarray, limit: float) -> float:
    """The outermost value at which a profile crosses `limit`; infinite if it ends below it."""
    inside = np.flatnonzero(statistics <= limit)
    last = inside[-1] if len(inside) else 0
    if last == len(values) - 1:
        return math.copysign(math.inf, values[-1] - values[0])
    # Interpolate the square root, which is nearly linear where the statistic is a parabola.
    first, second = np.sqrt(np.maximum(statistics[last : last + 2], 0))
    share = (math.sqrt(limit) - first) / (second - first)
    return float(values[last] + share * (values[last + 1] - values[last]))


def fit_law(
    table: dict[str, np.ndarray],
    bootstrap: int = 200,
    seed: int = 0,
    unit: float = 1e9,
    e_start: float = 1.0,
    e_max: float = 32.0,
) -> LawFit:
    """
    Fits the joint law: Huber loss on log losses, 96 starts, and a bootstrap of the residuals.

    The Huber loss is squared up to 1.345 robust standard deviations of the residuals and linear beyond.

    Args:
        table (`dict` of `np.ndarray`, shape `(rows,)`): the columns of [`read_table`].
        bootstrap (`int`, defaults to 200): number of resampled fits.
        seed (`int`, defaults to 0): seed of the resampling.
        unit (`float`, defaults to 1e9): unit of N and D for the coefficients.
        e_start, e_max (`float`): see [`effective_experts`].

    Raises:
        ValueError: when the table has too few points or values that are not positive.
    """
    check_table(table)
    n, d, expansion, loss = (np.asarray(table[name], dtype=np.float64) for name in COLUMNS)
    log_e = np.log(effective_experts(expansion, e_start, e_max))
    # Centre N and D: around the middle of the table the coefficients are least correlated.
    middle = np.exp([np.log(n).mean(), np.log(d).mean()])
    design = _Design(log_e, np.log(n / middle[0]), np.log(d / middle[1]))
    target = np.log(loss)
    found, cost = design.search(loss, target)
    # Distinct minima. Resampled fits start from each, or the intervals would cover only one of them.
    apart = np.concatenate([[True], np.diff(cost) > 1e-3 * cost[0]])
    valleys = found[apart][:NUM_VALLEYS]
    residuals = design.predict(valleys[:1])[0][0] - target
    # Twice: the first residuals come from a nearly absolute loss.
    for _ in range(2):
        delta = max(1.345 * 1.4826 * float(np.median(np.abs(residuals))), 1e-9)
        valleys, cost = design.minimize(valleys, np.broadcast_to(target, (len(valleys), len(target))), delta)
        valleys = valleys[np.argsort(cost)]
        residuals = design.predict(valleys[:1])[0][0] - target
    # 2 (cost - lowest cost) * scale is chi-squared distributed, as in a likelihood-ratio test. This is the robust form
    # with Huber's correction for the number of coefficients (Robust Statistics, 1981).
    freedom = max(1, len(loss) - len(COEFFICIENTS))
    squared = float(np.mean(np.abs(residuals) <= delta))
    correction = 1 + len(COEFFICIENTS) / len(loss) * (1 - squared) / squared
    variance = np.sum(np.clip(residuals, -delta, delta) ** 2) / freedom
    scale = squared / max(variance, 1e-300) / correction**2

    rng = np.random.default_rng(seed)
    # Rescaled to the noise level before nine coefficients were fitted.
    noise = (residuals - residuals.mean()) * math.sqrt(len(loss) / freedom)
    resampled = (target + residuals) + rng.choice(noise, (bootstrap, len(loss)))
    fits = [design.minimize(np.broadcast_to(start, (bootstrap, len(start))), resampled, delta) for start in valleys]
    found, cost = (np.stack(parts) for parts in zip(*fits, strict=True))
    samples = np.take_along_axis(found, cost.argmin(axis=0)[None, :, None], axis=0)[0]
    excess = _huber(target + residuals - resampled, delta) - cost.min(axis=0)

    to_units = _unit_map(middle / unit)
    profile = design.profile(valleys, target, delta, to_units, scale) if bootstrap else None
    law = ScalingLaw(
        *map(float, _exponentiate(to_units @ valleys[0])),
        rmse=float(np.sqrt(np.mean((np.exp(target + residuals) - loss) ** 2))),
        unit=unit,
        e_start=e_start,
        e_max=e_max,
        ranges={name: (float(min(table[name])), float(max(table[name]))) for name in COLUMNS[:3]},
    )
    return LawFit(law, _exponentiate(samples @ to_units.T), residuals, profile, 2 * scale * excess)


@functools.cache
def published_fit(bootstrap: int = 400, seed: int = 0) -> LawFit:
    """
    The published law with the uncertainty that its grid and its RMSE imply: refits to tables of the 90 runs, drawn
    from the law with normal noise. The paper publishes no errors of the coefficients. If the form is wrong, or runs
    share their noise, the real uncertainty is larger.
    """
    cells = np.array(list(itertools.product(*(PAPER_GRID[name] for name in COLUMNS[:3]))))  # (90, 3)
    expected = PAPER_LAW.loss(*cells.T)
    log_n, log_d = np.log(cells[:, :2]).T
    middle = np.exp([log_n.mean(), log_d.mean()])
    log_e = np.log(effective_experts(cells[:, 2], PAPER_LAW.e_start, PAPER_LAW.e_max))
    design = _Design(log_e, log_n - log_n.mean(), log_d - log_d.mean())
    to_units = _unit_map(middle / PAPER_LAW.unit)
    published = np.array([PAPER_LAW.__dict__[name] for name in COEFFICIENTS])
    published[LOGARITHMIC] = np.log(published[LOGARITHMIC])
    start = np.broadcast_to(np.linalg.solve(to_units, published), (bootstrap, len(COEFFICIENTS)))
    noise = np.random.default_rng(seed).normal(0, PAPER_LAW.rmse, (bootstrap, len(cells)))
    # Squared loss: the noise has no outliers.
    samples, _ = design.minimize(start, np.log(expected + noise), delta=1.0)
    return LawFit(PAPER_LAW, _exponentiate(samples @ to_units.T), np.zeros(len(cells)), None, np.zeros(0))


def _unit_map(middle: np.ndarray) -> np.ndarray:
    """`(9, 9)` matrix from the coefficients for `N / middle[0]` and `D / middle[1]` to those for N and D."""
    matrix = np.eye(len(COEFFICIENTS))
    for first, log_middle in zip((0, 4), np.log(middle), strict=True):
        # In A N^alpha and in Ê^delta N^(gamma ln Ê).
        matrix[first, first + 2] = matrix[first + 1, first + 3] = -log_middle
    return matrix


def _exponentiate(theta: np.ndarray) -> np.ndarray:
    """Coefficients `(..., 9)` from theta, which has ln A, ln B and ln c."""
    theta = theta.copy()
    theta[..., LOGARITHMIC] = np.exp(theta[..., LOGARITHMIC])
    return theta


class _Design:
    """The logarithms of a table, `(rows,)` each, and the solver. `theta` is `(fits, 9)` with ln A, ln B and ln c."""

    def __init__(self, log_e: np.ndarray, log_n: np.ndarray, log_d: np.ndarray):
        ones = np.ones_like(log_e)
        self.size_features = np.stack([ones, log_e, log_n, log_e * log_n])  # (4, rows)
        self.data_features = np.stack([ones, log_e, log_d, log_e * log_d])

    def predict(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log losses `(fits, rows)` and their derivatives `(fits, 9, rows)`."""
        by_size = np.exp(np.clip(theta[:, :4] @ self.size_features, -50, 50))
        by_data = np.exp(np.clip(theta[:, 4:8] @ self.data_features, -50, 50))
        constant = np.exp(np.clip(theta[:, 8:], -50, 50))
        total = by_size + by_data + constant
        jacobian = np.concatenate(
            [
                (by_size / total)[:, None] * self.size_features,
                (by_data / total)[:, None] * self.data_features,
                (constant / total)[:, None],
            ],
            axis=1,
        )
        return np.log(total), jacobian

    def search(self, loss: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Searches minima from many starts. Returns `(12, 9)` coefficients, best first, and their costs.

        The minimum lies in a valley along c, which trades off against A and alpha, and descending along it converges
        slowly. So c is first fixed at twelve shares of the lowest loss, with eight starts each. The best start of each
        share is then refined with c free.
        """
        rows = []
        for share in C_SHARES:
            constant = share * loss.min()
            half = math.log((np.median(loss) - constant) / 2)
            for alpha, beta in itertools.product((-0.1, -0.5), repeat=2):
                for omega, zeta in ((0, 0), (-0.5, -0.3)):
                    rows.append([half, 0, alpha, 0, half, omega, beta, zeta, math.log(constant)])
        starts = np.array(rows, dtype=np.float64)
        held = np.broadcast_to(np.eye(9)[:, :8], (len(starts), 9, 8))
        found, cost = self.minimize(starts, np.broadcast_to(target, (len(starts), len(target))), 1e-3, held)
        found, cost = found.reshape(len(C_SHARES), -1, 9), cost.reshape(len(C_SHARES), -1)
        best = np.take_along_axis(found, cost.argmin(axis=1)[:, None, None], axis=1)[:, 0]
        best, cost = self.minimize(best, np.broadcast_to(target, (len(best), len(target))), 1e-3)
        order = np.argsort(cost)
        return best[order], cost[order]

    def profile(
        self, valleys: np.ndarray, target: np.ndarray, delta: float, to_units: np.ndarray, scale: float
    ) -> np.ndarray:
        """`LawFit.profile`: each coefficient is fixed at values further and further out, and the rest is refitted."""
        lowest = _huber(self.predict(valleys[:1])[0] - target, delta)[0]
        # Directions that keep a coefficient fixed: the null space of its row.
        null_spaces = np.stack([np.linalg.svd(row[None])[2][1:].T for row in to_units])  # (coefficients, 9, 8)
        # One chain per coefficient, direction and minimum; each fit starts from an extrapolation of the previous one.
        coefficient, way, start = (index.ravel() for index in np.indices((len(to_units), 2, len(valleys))))
        rows, basis, sign = to_units[coefficient], null_spaces[coefficient], np.where(way, 1.0, -1.0)
        targets = np.broadcast_to(target, (len(rows), len(target)))
        theta = valleys[start]
        shape = (len(to_units), 2, len(valleys))
        values, statistics = [], []
        for step in range(PROFILE_STEPS):
            if step:
                jacobian = self.predict(theta)[1]
                curvature = jacobian @ jacobian.transpose(0, 2, 1) * scale
                covariance = np.linalg.pinv(curvature, rcond=1e-12, hermitian=True)
                direction = np.einsum("cpq,cq->cp", covariance, rows)
                error = np.sqrt(np.einsum("cp,cp->c", direction, rows))
                # About a third of a local standard error along the valley, less where the valley is curved. The chain
                # of the best minimum sets the step of all chains.
                straight = 0.25 * error**2 / np.abs(direction).max(axis=1)
                moved = (sign * np.minimum(0.35 * error, straight)).reshape(shape)[..., :1]
                goal = values[-1][..., None] + np.broadcast_to(moved, shape)
                moved = goal.ravel() - np.einsum("cp,cp->c", rows, theta)
                theta = theta + (moved / error**2)[:, None] * direction
            else:
                goal = np.broadcast_to((to_units @ valleys[0])[:, None, None], shape)
                theta = (
                    theta
                    + (goal.ravel() - np.einsum("cp,cp->c", rows, theta))[:, None]
                    * rows
                    / (np.einsum("cp,cp->c", rows, rows)[:, None])
                )
            theta, cost = self.minimize(theta, targets, delta, basis)
            values.append(goal[..., 0])
            statistics.append(2 * scale * (cost.reshape(shape).min(axis=2) - lowest))
        return np.stack([np.stack(values, axis=2), np.stack(statistics, axis=2)], axis=2)

    def minimize(
        self, theta: np.ndarray, target: np.ndarray, delta: float, basis: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Levenberg-Marquardt with Huber weights, batched over fits.

        Args:
            theta (`np.ndarray` of shape `(fits, 9)`): starting points.
            target (`np.ndarray` of shape `(fits, rows)`): log losses.
            delta (`float`): residual at which the loss changes from squared to linear.
            basis (`np.ndarray` of shape `(fits, 9, directions)`, *optional*): directions in which each fit may move.

        Returns:
            The coefficients `(fits, 9)` and the costs `(fits,)`.
        """
        theta, damping = theta.copy(), np.full(len(theta), 1e-3)
        if basis is None:
            basis = np.broadcast_to(np.eye(theta.shape[1]), (len(theta), theta.shape[1], theta.shape[1]))
        predicted, jacobian = self.predict(theta)
        cost = _huber(predicted - target, delta)
        # Fits that have not converged.
        active = np.arange(len(theta))
        for _ in range(MAX_ITERATIONS):
            residuals = predicted[active] - target[active]
            slopes = basis[active].transpose(0, 2, 1) @ jacobian[active]
            weighted = slopes * np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300))[:, None]
            gradient = np.einsum("fpr,fr->fp", weighted, residuals)
            hessian = weighted @ slopes.transpose(0, 2, 1)
            diagonal = np.einsum("fpp->fp", hessian)
            scale = diagonal * damping[active, None] + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
            hessian = hessian + np.eye(basis.shape[2]) * scale[:, :, None]
            step = basis[active] @ np.linalg.solve(hessian, gradient[..., None])
            candidate = theta[active] - step[..., 0]
            new_predicted, new_jacobian = self.predict(candidate)
            new_cost = _huber(new_predicted - target[active], delta)
            better = new_cost < cost[active]
            settled = better & (cost[active] - new_cost < 1e-6 * cost[active]) & (damping[active] < 1)
            moved = active[better]
            theta[moved], cost[moved] = candidate[better], new_cost[better]
            predicted[moved], jacobian[moved] = new_predicted[better], new_jacobian[better]
            damping[active] *= np.where(better, 0.3, 4.0)
            np.clip(damping, 1e-9, None, out=damping)
            active = active[~settled & (damping[active] < 1e8)]
            if not len(active):
                break
        return theta, cost


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(axis=-1)


def heldout_error(table: dict[str, np.ndarray], **fit_arguments) -> float:
    """
    Held-out error of the law: fitted to all runs but those with the most tokens, evaluated on these.

    Returns:
        Root mean square error in nats per token.

    Raises:
        ValueError: when the remaining runs are too few.
    """
    last = np.asarray(table["tokens"]) == max(table["tokens"])
    fit = fit_law({name: np.asarray(table[name])[~last] for name in COLUMNS}, bootstrap=0, **fit_arguments)
    n, d, expansion, loss = (np.asarray(table[name])[last] for name in COLUMNS)
    return float(np.sqrt(np.mean((fit.law.loss(n, d, expansion) - loss) ** 2)))
