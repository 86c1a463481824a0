"""The paper's on-device scaling law: the formula and the published coefficients.

    L(N, D, E) = A Ê^delta N^(alpha + gamma ln Ê) + B Ê^omega D^(beta + zeta ln Ê) + c            (paper, equation 1)

N is the number of active parameters and D the number of training tokens, both in units of `unit` (billions in the
paper). E is the expert expansion and Ê its saturating transform (Clark et al., arXiv 2202.01169). Losses are in nats
per token on the data and tokenizer of the fitted runs, so losses of different laws are not comparable.

The published form has no term for granularity and the shared expert. The paper fits them separately, and only two
numbers of those fits are known here (docs/scaling.md). Neither choice changes N or the total number of parameters.
"""

from dataclasses import dataclass, field

import numpy as np


COEFFICIENTS = ("A", "delta", "alpha", "gamma", "B", "omega", "beta", "zeta", "c")
COLUMNS = ("active_parameters", "tokens", "expansion", "loss")


def effective_experts(expansion, e_start: float = 1.0, e_max: float = 32.0) -> np.ndarray:
    """
    The saturating transform Ê of the expert expansion E: 1 for a dense model, at most `e_max`.

    `1 / Ê = 1 / (E - 1 + (1 / e_start - 1 / e_max)^-1) + 1 / e_max`. The paper fixes e_start = 1 and e_max = 32.

    Raises:
        ValueError: for an expansion below 1.
    """
    expansion = np.asarray(expansion, dtype=np.float64)
    if not (expansion >= 1).all():
        raise ValueError(f"expansion={expansion.min()} is below that of a dense model. Set 1 (dense) or more.")
    return 1 / (1 / (expansion - 1 + 1 / (1 / e_start - 1 / e_max)) + 1 / e_max)


@dataclass(frozen=True)
class ScalingLaw:
    """
    The joint law with its coefficients. Arguments and results broadcast as in numpy.

    Args:
        A, delta, alpha, gamma, B, omega, beta, zeta, c (`float`): the coefficients of the formula above.
        rmse (`float`): root mean square error of the fit, in nats per token.
        unit (`float`, defaults to 1e9): unit of N and D in the formula.
        e_start, e_max (`float`): see [`effective_experts`].
        ranges (`dict`): smallest and largest active parameters, tokens and expansion of the fitted runs.
    """

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float
    rmse: float
    unit: float = 1e9
    e_start: float = 1.0
    e_max: float = 32.0
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def loss(self, active_parameters, tokens, expansion) -> np.ndarray:
        """
        Predicted loss in nats per token. Parameters and tokens are plain counts, not in units of `unit`.

        Raises:
            ValueError: when a count is not positive or an expansion is below 1.
        """
        values = {"active_parameters": active_parameters, "tokens": tokens}
        for name, value in values.items():
            if not (np.asarray(value) > 0).all():
                raise ValueError(f"{name}={value} has no loss. Set a positive count.")
        log_e = np.log(effective_experts(expansion, self.e_start, self.e_max))
        log_n, log_d = (np.log(np.asarray(value, dtype=np.float64) / self.unit) for value in values.values())
        by_size = self.A * np.exp(self.delta * log_e + (self.alpha + self.gamma * log_e) * log_n)
        by_data = self.B * np.exp(self.omega * log_e + (self.beta + self.zeta * log_e) * log_d)
        return by_size + by_data + self.c

    def outside(self, active_parameters: float, tokens: float, expansion: float) -> list[str]:
        """Describes in which quantities a point lies outside the range of the fitted runs, so the law extrapolates."""
        point = {"active_parameters": active_parameters, "tokens": tokens, "expansion": expansion}
        # 10 % tolerance: the paper quotes sizes of 0.272, 0.528 and 0.922 billion as 0.3, 0.5 and 0.9.
        return [
            f"{name} {point[name]:.3g} is outside the fitted {low:.3g} to {high:.3g}"
            for name, (low, high) in self.ranges.items()
            if not 0.9 * low <= point[name] <= 1.1 * high
        ]


# Table A.2, the sweep over E, from a secondary source that does not state the units. Only with billions does the
# formula behave as the paper describes. N includes the tied embedding: the grid's sizes of 0.3, 0.5 and 0.9 billion
# match S, M and L only with it.
PAPER_LAW = ScalingLaw(
    A=0.2388,
    delta=0.0906,
    alpha=-0.2833,
    gamma=0.0387,
    B=0.6019,
    omega=1.0593,
    beta=-0.3210,
    zeta=-0.3684,
    c=1.9730,
    rmse=0.0076,
    ranges={"active_parameters": (0.3e9, 0.9e9), "tokens": (100e9, 500e9), "expansion": (1, 32)},
)
# The runs of that sweep (secondary source).
PAPER_GRID = {
    "expansion": (1, 2, 4, 8, 16, 32),
    "active_parameters": (0.3e9, 0.5e9, 0.9e9),
    "tokens": (100e9, 200e9, 300e9, 400e9, 500e9),
}
