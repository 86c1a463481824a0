"""Which cores of a phone compute: `--threads auto`."""

from collections.abc import Sequence
from dataclasses import dataclass


# As many as in the paper's measurements. Decoding is bound by memory, which a few cores read at its full rate.
MAX_CORES = 4
# Shares of the fastest core's. Slower cores are those of an efficiency cluster, which compute less per clock, too.
LEAST_CAPACITY = 1 / 2
LEAST_CLOCK = 3 / 4


@dataclass(frozen=True)
class Core:
    number: int
    max_khz: int
    # Speed at the highest clock, 1024 for the fastest core of the system (Linux' cpu_capacity).
    capacity: int | None = None


def fast_cores(cores: Sequence[Core]) -> list[int]:
    """
    Numbers of the fastest cores, at most `MAX_CORES`, without those of the slow clusters.

    A core is slow below half of the largest capacity, or below three quarters of the highest clock where the kernel
    reports no capacities.

    Raises:
        ValueError: when the device reports no clocks.
    """
    if not cores:
        raise ValueError(
            "The device does not report the clocks of its cores, so --threads auto cannot choose. Give a number."
        )
    by_capacity = all(core.capacity for core in cores)

    def speed(core: Core) -> int:
        return core.capacity if by_capacity and core.capacity else core.max_khz

    least = max(map(speed, cores)) * (LEAST_CAPACITY if by_capacity else LEAST_CLOCK)
    fast = [core for core in cores if speed(core) >= least]
    return sorted(core.number for core in sorted(fast, key=lambda core: (-speed(core), core.number))[:MAX_CORES])
