"""Which cores of a phone compute."""

import pytest

from mobilemoe.device.cores import Core, fast_cores


def cores(*clusters: tuple[int, int] | tuple[int, int, int]) -> list[Core]:
    """Of clusters with a count, a clock in MHz and perhaps a capacity."""
    rows = [cluster[1:] for cluster in clusters for _ in range(cluster[0])]
    return [Core(number, mhz * 1000, *capacity) for number, (mhz, *capacity) in enumerate(rows)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Snapdragon 8 Elite (Galaxy S25): six fast cores, and two faster ones after them.
        (cores((6, 3532), (2, 4320)), [0, 1, 6, 7]),
        # Tensor G3 (Pixel 8).
        (cores((4, 1704), (4, 2367), (1, 2914)), [4, 5, 6, 8]),
        # Snapdragon 865: little cores at 63 % of the highest clock.
        (cores((4, 1805), (3, 2419), (1, 2842)), [4, 5, 6, 7]),
        # Helio G99: two big cores.
        (cores((6, 1600), (2, 2200)), [6, 7]),
        # Snapdragon 778G: little cores at 79 % of the clock, with a third of the speed.
        (cores((4, 1900, 343), (3, 2200, 939), (1, 2400, 1024)), [4, 5, 6, 7]),
        # Raspberry Pi 5, and a board of eight equal cores.
        (cores((4, 2400)), [0, 1, 2, 3]),
        (cores((8, 2000, 1024)), [0, 1, 2, 3]),
        # One that reports capacities for some cores only.
        ([Core(0, 1000), Core(1, 2000, 1024)], [1]),
    ],
)
def test_slow_clusters_are_left_out(given: list[Core], expected: list[int]):
    assert fast_cores(given) == expected


def test_without_clocks_there_is_no_choice():
    with pytest.raises(ValueError, match="does not report the clocks of its cores.*Give a number"):
        fast_cores([])
