"""
Prints what each extra of this package adds to an installation: packages and megabytes of their files.

    python benchmarks/install_sizes.py

Reads the metadata of the environment that it runs in, which must have all extras. One JSON line last.
"""

import json
import math
import os
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mobilemoe.display import show, table


EXTRAS = ("", "plan", "train", "export", "gguf", "mlx", "bench", "eval", "all")


def requirements(name: str, extra: str) -> list[Requirement]:
    """What a package requires with this extra on this platform, and would not require without it."""
    found = [Requirement(text) for text in distribution(name).requires or []]

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    return [one for one in found if applies(one, extra) and (not extra or not applies(one, ""))]


def closure(name: str, extra: str = "") -> set[str]:
    """All packages that are installed with a package and its extra, itself included."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), ""), (canonicalize_name(name), extra)]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            for requirement in requirements(*item):
                other = canonicalize_name(requirement.name)
                todo += [(other, ""), *((other, wanted) for wanted in requirement.extras)]
        except PackageNotFoundError:
            continue
    return {package for package, _ in seen}


def size(package: str) -> float:
    """Bytes of a package's files; NaN if it is not installed."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return math.nan
    # Some record files that are gone.
    return sum(os.stat(path).st_size for path in (file.locate() for file in files) if os.path.isfile(path))


def main() -> None:
    base = closure("mobilemoe")
    sizes: dict[str, float] = {}
    rows, result = [], {}
    for extra in EXTRAS:
        packages = closure("mobilemoe", extra) - (base if extra else set())
        for package in packages - sizes.keys():
            sizes[package] = size(package)
        total = sum(sizes[package] for package in packages)
        largest = sorted(packages, key=sizes.__getitem__, reverse=True)[:3]
        megabytes = None if math.isnan(total) else f"{total / 1e6:,.0f}"
        rows.append((extra or "none", len(packages), megabytes, ", ".join(largest)))
        result[extra] = {"packages": len(packages), "bytes": total if megabytes else None, "largest": largest}
    show(table(("extra", "packages", "MB", "largest"), rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
