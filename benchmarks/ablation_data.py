"""The text of the ablation: Python sources of the standard library and of the installed packages, as token ids."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilemoe.artifacts import replace_file


# The files and the tokenizer of the demo.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import is_heldout, standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


VOCAB_SIZE, LENGTH = 512, 128
# Smaller files say little; larger ones are mostly generated tables.
FILE_BYTES = (500, 200_000)
TOKENIZER_BYTES = 20_000_000


class Text(NamedTuple):
    """
    Sequences `(rows, LENGTH + 1)` of training and of held-out files, bytes per predicted held-out token, and a digest
    of all ids.
    """

    train: np.ndarray
    heldout: np.ndarray
    bytes_per_token: float
    digest: str


def package_files() -> Iterator[tuple[str, Path]]:
    """(relative name, path) of the sources of installed packages."""
    root = Path(sysconfig.get_paths()["purelib"])
    for path in root.rglob("*.py"):
        if FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]:
            yield str(path.relative_to(root)), path


def sources(num_bytes: float) -> dict[str, list[str]]:
    """Distinct training and held-out sources of this many bytes, in the order of a hash of their names."""
    files: dict[str, str | Path] = {**dict(standard_library_files()), **dict(package_files())}
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        file = files[name]
        text = file if isinstance(file, str) else file.read_text(encoding="utf-8", errors="ignore")
        # Packages contain copies of each other's files.
        if text not in seen:
            seen.add(text)
            parts["heldout" if is_heldout(name) else "train"].append(text)
            num_bytes -= len(text)
        if num_bytes < 0:
            break
    return parts


def sequences(tokens: np.ndarray) -> np.ndarray:
    """Consecutive rows of `LENGTH + 1` ids, overlapping by one, for inputs and targets; a view."""
    rows = (len(tokens) - 1) // LENGTH
    return np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[: rows * LENGTH : LENGTH]


def load_text(directory: Path, num_tokens: int, num_heldout: int) -> Text:
    """
    This many training and held-out tokens; tokenized on the first call and cached. Held-out rows are spread over all
    held-out files: neighbouring rows are alike, so a block of them would say less about other text.

    Raises:
        ValueError: when this machine has less text.
    """
    names = {part: directory / f"{part}-{num_tokens}.npy" for part in ("train", "heldout", "lengths")}
    if not names["lengths"].is_file():
        directory.mkdir(parents=True, exist_ok=True)
        # A token has 1.9 bytes, or up to 2.5 in less text, and about a twentieth is held out.
        texts = sources(3.0 * num_tokens)
        head = "".join(texts["train"])[:TOKENIZER_BYTES]
        tokenizer = train_tokenizer(iter([head]), VOCAB_SIZE)
        for part, rows in texts.items():
            encoded = []
            for first in range(0, len(rows), 64):
                encoded += [np.array(ids, dtype=np.uint16) for ids in tokenizer(rows[first : first + 64]).input_ids]
            with replace_file(names[part]) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate(encoded))
        # In a byte-level vocabulary a character of a token is a byte. Special tokens stand for no text.
        special = set(tokenizer.all_special_ids)
        tokens = tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))
        lengths = [0 if index in special else len(token) for index, token in enumerate(tokens)]
        with replace_file(names["lengths"]) as partial, partial.open("wb") as file:
            np.save(file, np.array(lengths))
    train, heldout = (np.load(names[part], mmap_mode="r") for part in ("train", "heldout"))
    if len(train) <= num_tokens or len(heldout) < num_heldout + 1:
        raise ValueError(
            f"This machine has {len(train):,} training and {len(heldout):,} held-out tokens of Python source, but the "
            f"runs need {num_tokens:,} and {num_heldout:,} without repeating one. Install more packages, or use a "
            "smaller --budget."
        )
    train, rows = train[: num_tokens + 1], sequences(heldout)
    heldout = rows[np.linspace(0, len(rows) - 1, num_heldout // LENGTH).round().astype(int)]
    digest = hashlib.sha256(train.tobytes() + heldout.tobytes()).hexdigest()[:12]
    return Text(sequences(train), heldout, float(np.load(names["lengths"])[heldout[:, 1:]].mean()), digest)
