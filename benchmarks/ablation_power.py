"""
How many paired seeds resolve the findings of the ablation.

    python benchmarks/ablation_power.py

Prints the table of docs/scaling.md: per finding the expected effect, and the pairs with which a two-sided paired
t-test at 95 % detects it with a probability of 90 %. One JSON line last.
"""

import json
import math

from scipy import stats

from mobilemoe.display import markdown


# Standard deviation of the difference of two runs of a seed, in nats per token: the largest of the pilot, that of the
# shared expert over six seeds. Those of E and granularity over three seeds are 0.004 to 0.009.
PAIR_SD = 0.011
NUM_PAIRS = 24
# Expected differences in nats per token: in the paper (its fit at 0.3B and 500B tokens where there is one), and in the
# pilot at 47 thousand active parameters, three to six seeds.
EXPECTED = {
    "1. E = 8 against dense": (-0.045, -0.036),
    "1. E = 32 against 8": (0.009, -0.007),
    "2. granularity 8 against 2": (None, -0.021),
    "2. granularity 16 against 8": (-0.01, -0.013),
    "3. a shared expert against none": (None, 0.0018),
}


def power(effect: float, sd: float, pairs: int, level: float = 0.95) -> float:
    """Probability that the interval of the mean of `pairs` differences excludes zero, on the side of the effect."""
    freedom = pairs - 1
    quantile = stats.t.ppf((1 + level) / 2, freedom)
    return float(stats.nct.sf(quantile, freedom, abs(effect) / sd * math.sqrt(pairs)))


def pairs_needed(effect: float, sd: float, probability: float = 0.9) -> int:
    """
    The fewest pairs that detect an effect with this probability.

    Raises:
        ValueError: for an effect or a standard deviation that no number of pairs resolves.
    """
    if not (0 < abs(effect) < math.inf and 0 < sd < math.inf):
        raise ValueError(
            f"effect={effect} with sd={sd} cannot be resolved by any number of pairs. Set both to numbers "
            "other than 0."
        )
    low, high = 1, 2
    while power(effect, sd, high) < probability:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, sd, middle) >= probability else (middle, high)
    return high


def smallest_effect(pairs: int, sd: float, probability: float = 0.9) -> float:
    """The effect that this many pairs detect with this probability."""
    low, high = 0.0, 100 * sd
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, sd, pairs) >= probability else (middle, high)
    return high


def power_table() -> str:
    """Markdown."""
    rows = []
    for finding, (paper, pilot) in EXPECTED.items():
        rows.append(
            (
                finding,
                "not published" if paper is None else f"{paper:+.3f}",
                f"{pilot:+.4f}",
                pairs_needed(pilot, PAIR_SD),
                f"{power(pilot, PAIR_SD, NUM_PAIRS):.2f}",
            )
        )
    columns = ("finding", "paper", "pilot", "pairs for 90 % power", f"power of {NUM_PAIRS} pairs")
    return markdown(columns, rows)


def main() -> None:
    print(power_table())
    half = stats.t.ppf(0.975, NUM_PAIRS - 1) * PAIR_SD / math.sqrt(NUM_PAIRS)
    result = {"benchmark": "ablation_power", "pairs": NUM_PAIRS, "half_width": round(half, 4)}
    print(json.dumps(result | {"smallest_effect": round(smallest_effect(NUM_PAIRS, PAIR_SD), 4)}))


if __name__ == "__main__":
    main()
