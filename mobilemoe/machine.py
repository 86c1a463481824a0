"""Describes the machine of a measurement (processor, package versions, memory) and summarises repeated values."""

import contextlib
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "executorch", "torchao", "mobilemoe")


def cpu_name() -> str:
    """The model name from /proc/cpuinfo, elsewhere what Python's `platform` reports."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the given packages, without those that are not installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def machine() -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def available_memory() -> int | None:
    """Bytes of available memory and free swap; `None` where the system is not Linux."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: after a fork it starts at the peak of the parent process.
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (nearest rank), extremes, all to four digits, and the number of values."""
    ranked = sorted(values)
    p10, p90 = (ranked[round(q * (len(ranked) - 1))] for q in (0.1, 0.9))
    numbers = {"median": statistics.median(ranked), "p10": p10, "p90": p90, "min": ranked[0], "max": ranked[-1]}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()} | {"repeats": len(ranked)}


@contextmanager
def without_lines(pattern: str) -> Generator[None]:
    """
    Removes lines from what native code writes to stderr. The others follow when the block ends, also by an error.

    Args:
        pattern (`str`): regular expression, searched in each line.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            kept = [line for line in written if not re.search(pattern, line)]
            os.write(2, "".join(kept).encode())
