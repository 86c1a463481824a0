"""The import arrows between the rooms of the two packages."""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]
TRAVELLING = list((ROOT / "modeling_mobilemoe").glob("*_mobilemoe.py"))
GROUND = {"artifacts", "results", "console", "display", "machine", "tools"}
LOW = GROUND | {"costs", "integrity", "limits", "shapes", "generation", "runtime"}
# Rooms of `mobilemoe` that each room may import, beside itself and the architecture.
ALLOWED = {
    "artifacts": set(),
    "results": {"artifacts"},
    "console": set(),
    "tools": {"artifacts"},
    "display": set(),
    "machine": set(),
    "costs": GROUND,
    "shapes": GROUND,
    "integrity": {"artifacts"},
    "limits": set(),
    "lookup": set(),
    "grammar": set(),
    "generation": {"limits", "lookup", "grammar"},
    "llamacpp": {"generation", "grammar", "limits"},
    "runtime": GROUND | {"integrity", "generation", "llamacpp"},
    "chat": LOW | {"grammar", "device"},
    "serve": LOW | {"grammar"},
    "train": LOW,
    "plan": LOW,
    "eval": LOW,
    "export": LOW,
    "device": LOW,
    "bench": LOW | {"export", "device"},
    "card": GROUND | {"costs", "shapes", "eval.report", "eval.suites"},
    "train_verb": LOW | {"train", "card", "export"},
    "cli": LOW | {"train_verb", "chat", "serve", "plan", "export", "device", "bench", "eval", "card"},
    "recipes": {"train"},
}


def imported_modules(path: Path, package: str) -> set[str]:
    """Absolute names of what a file imports, also inside of functions; `package` is the one that the file is in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    found = {}
    for root in ("modeling_mobilemoe", "mobilemoe", "recipes"):
        for path in (ROOT / root).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> dict[str, set[str]]:
    """Modules of ours by the modules of ours that they import."""
    ours = modules()
    found = {}
    for name, path in ours.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = {target for target in imported_modules(path, package) if target in ours} - {name}
    return found


def test_only_the_allowed_arrows():
    for name, targets in arrows().items():
        room = name.removeprefix("mobilemoe.").split(".")[0]
        for target in targets:
            if name.startswith("modeling_mobilemoe"):
                assert target.startswith("modeling_mobilemoe"), f"{name} imports {target}"
            elif target.startswith("mobilemoe."):
                place = target.removeprefix("mobilemoe.")
                allowed = {room} | ALLOWED.get(room, set())
                assert place.split(".")[0] in allowed or place in allowed, f"{name} imports {target}"


def test_no_circle():
    graph = arrows()
    # A package's own file re-exports what its modules define.
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in graph[name]:
            if not name.startswith(f"{target}."):
                visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_travelling_files_stand_alone():
    """They are copied to the Hub: torch, transformers and each other, nothing else of ours."""
    for path in TRAVELLING:
        for target in imported_modules(path, "modeling_mobilemoe"):
            if target.startswith("modeling_mobilemoe."):
                assert target.split(".")[1].endswith("_mobilemoe"), f"{path.name} imports {target}"
