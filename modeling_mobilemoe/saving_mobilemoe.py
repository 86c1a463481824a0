"""How directories are written: a killed process leaves what was there before, or all of the new files."""

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path


try:
    import fcntl
except ImportError:
    # Windows has other locks. There, what killed saves leave stays.
    fcntl = None

# The files that `from_pretrained` reads unless a variant is requested.
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
INDEX_FILE = "model.safetensors.index.json"
# In the name of a temporary directory.
MARK = ".partial-"
# In it: second names of its files, and the list of its shards as they lie there.
LINKS, COMMITTED_INDEX = ".links", f"committed.{INDEX_FILE}"


@contextmanager
def replace_when_complete(directory: str | os.PathLike) -> Generator[Path]:
    """
    Yields a temporary directory whose files replace those of the target when the block ends without an error.

    After an error, such as a full disk, the target is unchanged and the temporary directory is removed. A process that
    is killed at any moment leaves a target that loads as before or as after. Other files in the target stay, but not
    weight files of an earlier save: a reader would mix the two.

    Raises:
        OSError: when the files cannot be written.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_remnants(directory)
    # Inside the target if it exists: it may be a mount point or a link, and a rename cannot cross file systems.
    with _new_directory(directory if directory.is_dir() else directory.parent, directory.name) as partial:
        try:
            yield partial
            files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            if directory.is_dir():
                if partial.parent != directory:
                    partial = partial.rename(directory / partial.name)
                # Nobody else writes into a temporary directory, and that is locked already.
                with nullcontext() if MARK in directory.name else locked(directory):
                    _finish_committed(directory)
                    _publish(partial, files, directory)
            elif files:
                partial.rename(directory)
        finally:
            if partial != committed_save(directory):
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _new_directory(parent: Path, name: str) -> Generator[Path]:
    """A temporary directory, locked as long as this process lives: what is not locked has no writer left."""
    while True:
        path = parent / f".{name}{MARK}{os.getpid()}-{secrets.token_hex(4)}"
        path.mkdir()
        with locked(path):
            # Another process may have found it before it was locked.
            if path.is_dir():
                yield path
                return


def _publish(partial: Path, files: list[Path], directory: Path) -> None:
    """
    Moves files to an existing directory, `config.json` last, where there is a model only with it.

    A model that is replaced has other weight files, and no rename replaces several files. So the old `config.json`
    gives way to the new one with a `transformers_weights`, by which transformers finds weights under other names:
    those in the temporary directory. With that one rename the new model is complete. Then its files get hard links
    under their own names, and at last `config.json` loses the key again.
    """
    config, names = Path("config.json"), {str(file) for file in files}
    weights = [name for name in names if WEIGHT_FILE.fullmatch(name)]
    if not weights or config not in files or not (directory / config).exists():
        for file in sorted(files, key=lambda file: file == config):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            if file == config:
                _remove_stale(directory, names)
            os.replace(partial / file, directory / file)
        return
    links = _make_links(partial, files)
    pointer = INDEX_FILE if INDEX_FILE in names else "model.safetensors"
    if pointer == INDEX_FILE:
        index = json.loads((partial / INDEX_FILE).read_text())
        # Relative to the checkpoint, not to the list.
        index["weight_map"] = {name: f"{partial.name}/{shard}" for name, shard in index["weight_map"].items()}
        pointer = COMMITTED_INDEX
        (partial / pointer).write_text(json.dumps(index))
    content = json.loads((partial / config).read_text())
    committed = partial / LINKS / "committed.json"
    committed.write_text(json.dumps(content | {"transformers_weights": f"{partial.name}/{pointer}"}))
    os.replace(committed, directory / config)
    _finish(partial, links, directory)


def _make_links(partial: Path, files: list[Path]) -> dict[Path, Path]:
    """A second name for each file, or a copy where the file system has no hard links."""
    shutil.rmtree(partial / LINKS, ignore_errors=True)
    (partial / LINKS).mkdir()
    links = {file: partial / LINKS / f"{number}" for number, file in enumerate(files)}
    for file, link in links.items():
        try:
            os.link(partial / file, link)
        except OSError:
            shutil.copyfile(partial / file, link)
    return links


def _finish(partial: Path, links: dict[Path, Path], directory: Path) -> None:
    """What follows once `config.json` names the weights in the temporary directory."""
    config = Path("config.json")
    for file, link in links.items():
        if file != config:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(link, directory / file)
    _remove_stale(directory, {str(file) for file in links})
    os.replace(links[config], directory / config)
    shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(directory: Path, names: set[str]) -> None:
    """Removes weight files of an earlier save, which this one does not have."""
    if any(WEIGHT_FILE.fullmatch(name) for name in names):
        for path in list(directory.iterdir()):
            if WEIGHT_FILE.fullmatch(path.name) and path.name not in names:
                path.unlink()


def committed_save(directory: Path) -> Path | None:
    """The temporary directory that the weights are in, if a save over this checkpoint was killed before its end."""
    try:
        content = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None
    pointer = content.get("transformers_weights") if isinstance(content, dict) else None
    name, _, file = pointer.partition("/") if isinstance(pointer, str) else ("", "", "")
    return directory / name if file and name.startswith(f".{directory.name}{MARK}") else None


def finish_save(directory: str | os.PathLike) -> None:
    """Ends a save over this checkpoint that was killed when it was complete. Does nothing if there was none."""
    directory = Path(directory).absolute()
    if committed_save(directory) is not None:
        with locked(directory):
            _finish_committed(directory)


def _finish_committed(directory: Path) -> None:
    partial = committed_save(directory)
    if partial is not None:
        ours = {LINKS, COMMITTED_INDEX}
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        files = [file for file in files if file.parts[0] not in ours]
        _finish(partial, _make_links(partial, files), directory)


def remove_remnants(directory: str | os.PathLike) -> None:
    """Removes what killed saves to this directory left, unless it is its model."""
    directory = Path(directory).absolute()
    for parent in (directory, directory.parent):
        for path in parent.glob(f".{glob.escape(directory.name)}{MARK}*"):
            if path != committed_save(directory):
                with locked(path, wait=False) as is_free:
                    if is_free:
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(directory: Path, wait: bool = True) -> Generator[bool]:
    """
    Locks a directory against other processes that do the same. Yields whether that worked: not every file system has
    locks, and without `wait` another process may have it.
    """
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)
