"""
Runs the notebooks of this directory from top to bottom, and keeps in them what they print and draw.

    python examples/notebooks.py [examples/1_chat.ipynb ...]

They read what `make demo` wrote. Progress bars and warnings are not kept.
"""

import argparse
import time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from mobilemoe.artifacts import replace_file


HERE = Path(__file__).parent


def run_notebook(path: Path, parameters: dict[str, object] | None = None) -> NotebookNode:
    """
    Runs a notebook in its own directory and returns it with its outputs. The file stays as it is.

    Args:
        path (`Path`): of the notebook.
        parameters (`dict`, *optional*): values that replace those of its first code cell, the settings.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
        ValueError: for a parameter that the notebook does not have.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in (parameters or {}).items():
        if f"\n{name} = " not in f"\n{settings.source}":
            raise ValueError(f"{path.name} has no setting {name}. Set one of its first code cell.")
        settings.source += f"\n{name} = {value!r}"
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=resources).execute()
    return notebook


def palette_png(picture: str) -> str:
    """A picture in 128 colours: a third of the bytes."""
    file = BytesIO()
    Image.open(BytesIO(b64decode(picture))).convert("RGB").quantize(128).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def save_notebook(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook with small pictures, and without what it wrote to stderr and this machine's Python version."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = palette_png(output.data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    with replace_file(path) as partial:
        nbformat.write(notebook, partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    notebooks = parser.parse_args().notebooks
    if not (HERE.parent / "out/demo/4-qat").is_dir():
        raise SystemExit("out/demo/ has no checkpoints to look at. Run `make demo` first.")
    for path in notebooks:
        started = time.perf_counter()
        notebook = run_notebook(path)
        save_notebook(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
