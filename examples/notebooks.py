"""
Runs the notebooks of this directory from top to bottom and saves them with their outputs.

    python examples/notebooks.py [examples/1_chat.ipynb ...]

They read the output of `make demo`. Progress bars and warnings are not saved.
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
    Runs a notebook in its own directory and returns it with its outputs. The file is not changed.

    Args:
        path (`Path`): the notebook.
        parameters (`dict`, *optional*): values that override the settings in its first code cell.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
        ValueError: when the notebook has no such setting.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in (parameters or {}).items():
        if f"\n{name} = " not in f"\n{settings.source}":
            raise ValueError(f"{path.name} has no setting {name}. Use one from its first code cell.")
        settings.source += f"\n{name} = {value!r}"
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=resources).execute()
    return notebook


def palette_png(picture: str) -> str:
    """Reduces a PNG to 128 colours, which makes it a third of the size."""
    file = BytesIO()
    Image.open(BytesIO(b64decode(picture))).convert("RGB").quantize(128).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def save_notebook(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook with small images, without stderr output and the Python version of this machine."""
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
        raise SystemExit("out/demo/ has no checkpoints. Run `make demo` first.")
    for path in notebooks:
        started = time.perf_counter()
        notebook = run_notebook(path)
        save_notebook(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
