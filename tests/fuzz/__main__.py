"""
Damaged inputs of every kind, each in a process of its own: what becomes of them.

    python -m tests.fuzz [--cases 2000] [--seed N] [--processes 2] [--case NUMBER]

Prints a table of outcomes by family, and every case that ended in a traceback, a wrong result, a crash or a hang,
with the command that repeats it. One JSON line last. Fails after a wrong result, a crash, a hang, or tracebacks in
more than one case of a hundred.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from .server import OUTCOMES, Case, Outcome, run_case, warm_up


BAD = ("traceback", "silent", "crash", "hang")


def today() -> int:
    return int(datetime.now(UTC).strftime("%Y%m%d"))


def run_numbers(inputs, seed: int, numbers: range) -> list[tuple[int, Case, Outcome]]:
    from .families import make_case

    results = []
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            case = make_case(seed, number, inputs, Path(directory))
            results.append((number, case, run_case(case, Path(directory))))
    return results


def fork(work: Callable[[], None]) -> int:
    """Starts a process that runs this, and returns its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return child


def join(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a process of the suite itself ended with status {status}")


def run_all(seed: int, num_cases: int, num_processes: int = 1) -> list[dict]:
    """Outcomes of all cases, as rows. Every process forks children of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-inputs-") as scratch:
        inputs = prepare(Path(scratch))

        def work(process: int) -> None:
            rows = [
                {"number": number, "family": case.family, "damage": case.damage, **outcome.__dict__}
                for number, case, outcome in run_numbers(inputs, seed, range(process, num_cases, num_processes))
            ]
            Path(scratch, f"outcomes-{process}.json").write_text(json.dumps(rows))

        rows = []
        for process, child in enumerate([fork(partial(work, process)) for process in range(num_processes)]):
            join(child)
            rows += json.loads(Path(scratch, f"outcomes-{process}.json").read_text())
    return sorted(rows, key=lambda row: row["number"])


def prepare(directory: Path):
    """Imports what the cases need and makes the good inputs."""
    warm_up()
    from .inputs import Inputs, make_inputs

    join(fork(lambda: make_inputs(directory)))
    return Inputs(directory)


def show(rows: list[dict], seed: int) -> None:
    counts = Counter((row["family"], row["kind"]) for row in rows)
    families = sorted({row["family"] for row in rows})
    print(f"{'':14}" + "".join(f"{kind:>10}" for kind in OUTCOMES))
    for family in [*families, "all"]:
        numbers = [sum(counts[name, kind] for name in families if family in (name, "all")) for kind in OUTCOMES]
        print(f"{family:14}" + "".join(f"{number:>10}" for number in numbers))
    places: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["kind"] in BAD:
            places.setdefault((row["kind"], row["place"], row["message"][:60]), []).append(row)
    for (kind, place, _), found in sorted(places.items()):
        row = found[0]
        print(f"\n{kind} x{len(found)} {place}\n    {row['message'][:300]}\n    {row['family']}: {row['damage']}")
        print(f"    python -m tests.fuzz --seed {seed} --case {row['number']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=today(), help="default: today's date")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this one alone")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.case is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-inputs-") as scratch:
            inputs = prepare(Path(scratch))
            ((_, case, outcome),) = run_numbers(inputs, arguments.seed, range(arguments.case, arguments.case + 1))
        print(f"{case.family}: {case.damage}\n{outcome}")
        return
    started = time.monotonic()
    rows = run_all(arguments.seed, arguments.cases, arguments.processes)
    show(rows, arguments.seed)
    counts = Counter(row["kind"] for row in rows)
    seconds = round(time.monotonic() - started)
    print(json.dumps({"fuzz": arguments.seed, "cases": len(rows), "seconds": seconds, **counts}))
    if counts["silent"] or counts["crash"] or counts["hang"] or counts["traceback"] > len(rows) / 100:
        sys.exit(1)


if __name__ == "__main__":
    main()
