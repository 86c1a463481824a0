"""
All families of damaged inputs. A family makes a case from random numbers, the good inputs, and the empty directory of
the case.
"""

import random
from collections.abc import Callable
from pathlib import Path

from .commands import adb_answer, command_line
from .files import data_file, recipe_file, result_file, runs_table
from .inputs import Inputs
from .models import checkpoint_file, config_file, config_values, export_report, program_file
from .server import Case


# With their shares.
FAMILIES: tuple[tuple[Callable[[random.Random, Inputs, Path], Case], int], ...] = (
    (checkpoint_file, 5),
    (config_file, 4),
    (config_values, 4),
    (recipe_file, 4),
    (data_file, 3),
    (program_file, 3),
    (export_report, 2),
    (result_file, 4),
    (runs_table, 2),
    (command_line, 5),
    (adb_answer, 3),
)


def make_case(seed: int, number: int, inputs: Inputs, directory: Path) -> Case:
    """The case of a number, the same whatever ran before it."""
    rng = random.Random(f"{seed} {number}")
    (family,) = rng.choices([family for family, _ in FAMILIES], [share for _, share in FAMILIES])
    return family(rng, inputs, directory)
