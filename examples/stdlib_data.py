"""Training data from the Python standard library, which is real text and available on every machine.

Writes `{code,docstrings,chat}.{train,heldout}.jsonl`. Whole files are held out, chosen by a hash of their name, so no
part of them is trained on.
"""

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path


HELDOUT_SHARE = 0.05
# Skip tests, generated tables and bundled third-party code.
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "ensurepip"}


def standard_library_files() -> Iterator[tuple[str, str]]:
    """Yields (relative name, source text), sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield str(name), path.read_text(encoding="utf-8", errors="ignore")


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """Yields (signature, first paragraph of the docstring or "", source text) of every function."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield f"def {node.name}({ast.unparse(node.args)}):", summary, text


def is_heldout(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < HELDOUT_SHARE * 256


def pair(question: str, answer: str) -> dict:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"prompt": [prompt], "completion": [completion]}


def write_data(directory: Path) -> dict[str, int]:
    """Writes the six files and returns their sizes in bytes of text."""
    rows: dict[str, list[dict]] = {
        f"{kind}.{part}": [] for kind in ("code", "docstrings", "chat") for part in ("train", "heldout")
    }
    for name, source in standard_library_files():
        part = "heldout" if is_heldout(name) else "train"
        rows[f"code.{part}"].append({"text": source})
        for signature, summary, text in functions(source):
            if 10 <= len(summary) <= 200:
                rows[f"docstrings.{part}"].append({"text": f'{signature}\n    """{summary}"""\n'})
                rows[f"chat.{part}"].append(pair(f"Write the docstring of `{signature}`", summary))
            if len(text) <= 300:
                rows[f"chat.{part}"].append(pair(f"Write the function `{signature}`", text))
    directory.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: sum(len(json.dumps(item)) for item in items) for name, items in rows.items()}
