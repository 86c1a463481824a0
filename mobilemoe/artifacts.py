"""The files that steps exchange: what a path is, its hash, the typed contents of our JSONs, and whole writes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError


# The built-in shapes; `mobilemoe.shapes` has their sizes.
SIZES = ("S", "M", "L")
SHAPES = (*SIZES, "MobileLLM-Pro")
PROGRAM_FILE = "model.pte"


def is_pte(model: str | os.PathLike) -> bool:
    """Whether this is a directory that `mobilemoe export` wrote for ExecuTorch."""
    return (Path(model) / PROGRAM_FILE).is_file()


def is_checkpoint(model: str | os.PathLike) -> bool:
    """Whether this is a directory with a `config.json` and weights in safetensors."""
    return (Path(model) / "config.json").is_file() and any(Path(model).glob("*.safetensors"))


def is_shape(model: str | os.PathLike) -> bool:
    """Whether this names a built-in shape; a directory of that name goes first."""
    return str(model) in SHAPES and not Path(model).is_dir()


def local_checkpoint(model: str | os.PathLike) -> Path:
    """
    The directory itself, or the snapshot of a Hub id.

    Raises:
        ValueError: when it is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{model} is not a directory, and the Hub does not give it: {error} Name a checkpoint directory; for a "
            "gated model accept its licence on the Hub and log in with `hf auth login`."
        ) from error


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(directory: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of every safetensors file, by name."""
    return {path.name: file_sha256(path) for path in sorted(Path(directory).glob("*.safetensors"))}


def describe_model(model: str | os.PathLike) -> dict:
    """
    Kind, size and SHA-256 over names and contents of the files that decide what a model answers.

    Raises:
        ValueError: where there is no such model.
    """
    path = local_checkpoint(model)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither model.pte nor config.json. Name a checkpoint or a directory with a .pte."
        )
    config = json.loads((path / "config.json").read_text())
    kind = "int4" if config.get("quantization") or config.get("quantization_config") else "checkpoint"
    if is_pte(path):
        kind = "pte"
    suffixes = {".pte", ".ptd", ".safetensors", ".jinja"}
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.suffix in suffixes or file.name in names):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
            size += file.stat().st_size
    description = {"name": str(model), "kind": kind, "sha256": digest.hexdigest(), "bytes": size, "config": config}
    if kind == "pte":
        description["export"] = json.loads((path / "export.json").read_text())
    return description


@contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the block ends well, the file written there takes its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own name for every writer; the suffix stays, by which some writers choose a format.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.partial-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # `mkstemp` makes files that only their owner reads.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    with replace_file(path) as partial:
        partial.write_text(text)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """As [`write_text`], indented by 2."""
    write_text(path, json.dumps(content, indent=2) + "\n")
