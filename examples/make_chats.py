"""
Fifty short conversations about functions of the Python standard library, to try `mobilemoe train` with.

    python examples/make_chats.py out/chats.jsonl
"""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path


MODULES = "base64 bisect calendar copy difflib fnmatch functools glob gzip heapq inspect json linecache locale".split()
MODULES += "mimetypes operator os.path pprint random shlex shutil statistics string tempfile textwrap tokenize".split()
NUM_CONVERSATIONS = 50


def functions() -> Iterator[tuple[str, str, str]]:
    """Yields (name, signature, first paragraph of the docstring) of public functions with a short one."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            summary = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            if not name.startswith("_") and function.__module__ == module.__name__ and 20 <= len(summary) <= 120:
                yield f"{module_name}.{name}", f"{name}{inspect.signature(function)}", summary


def conversation(name: str, signature: str, summary: str) -> dict:
    turns = [f"What does `{name}` do?", summary, "How is it called?", f"`{signature}`"]
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


def main(path: str) -> None:
    found = list(functions())
    # Some of every module.
    chosen = [found[index * len(found) // NUM_CONVERSATIONS] for index in range(NUM_CONVERSATIONS)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(conversation(*row)) + "\n" for row in chosen))
    print(f"{path}: {len(chosen)} conversations, the first about `{chosen[0][0]}`")


if __name__ == "__main__":
    main(*sys.argv[1:])
