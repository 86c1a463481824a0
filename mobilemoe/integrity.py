"""Whether a program is the one that was exported. Asked before it runs: some files make ExecuTorch end the process."""

import hashlib
import os
import re
import struct
from pathlib import Path

from .artifacts import PROGRAM_FILE, Artifact, Export, file_sha256, is_pte, read_export, write_json


# Up to this size, some 0.1 seconds, whole files are hashed whenever they are loaded.
CHEAP_BYTES = 64 * 10**6
# https://github.com/pytorch/executorch/blob/v1.5.1/schema/extended_header.h, of a file with segments.
PROGRAM_HEADER = struct.Struct("<4x4s4sIQQQ")
# https://github.com/pytorch/executorch/blob/v1.5.1/runtime/core/error.h
ERRORS = {
    0x01: "an internal error",
    0x02: "a call in the wrong state",
    0x03: "a call after the end of the program",
    0x10: "an operation that it does not support",
    0x11: "an operation that it does not implement",
    0x12: "an argument that the program does not accept",
    0x13: "a value of another type than the program declares",
    0x14: "an operator that this runtime lacks",
    0x20: "something that the program needs and does not hold",
    0x21: "a lack of memory",
    0x22: "a file that cannot be read",
    0x23: "a program that is damaged or of another version",
    0x24: "an external data file that does not belong to the program",
    0x25: "a lack of resources",
    0x30: "a part for a backend that is damaged or of another version",
    0x31: "a lack of memory in a backend",
    0x32: "a backend's handle that is not valid",
}
COPY_AGAIN = "Copy the whole directory again, or export again."


class Verified(Artifact):
    """The files whose contents were found to be right, in the user's cache."""

    # By absolute path: size, modification time in ns, inode, and SHA-256.
    files: dict[str, tuple[int, int, int, str]]


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobilemoe" / "verified.json"


def head_bytes(path: Path) -> int:
    """
    Bytes of a program before its weights.

    Raises:
        ValueError: when the file is no program, or is shorter than its header says.
    """
    with open(path, "rb") as file:
        header = file.read(PROGRAM_HEADER.size)
    size = path.stat().st_size
    if len(header) < PROGRAM_HEADER.size or header[4:8] != b"ET12" or header[8:11] != b"eh0":
        raise ValueError(f"{path} is no program for ExecuTorch: it does not begin as one. {COPY_AGAIN}")
    _, _, _, program, weights, weights_size = PROGRAM_HEADER.unpack(header)
    if program > size or weights + weights_size > size:
        raise ValueError(f"{path} has {size} bytes, and its header says {weights + weights_size}. {COPY_AGAIN}")
    return weights or program


def describe_files(directory: Path, experts_file: str | None) -> dict[str, int | str]:
    """Sizes and hashes of a program's files, as fields of [`Export`]."""
    program = directory / PROGRAM_FILE
    described: dict[str, int | str] = {
        "pte_bytes": program.stat().st_size,
        "pte_sha256": file_sha256(program),
        "pte_head_sha256": _head_sha256(program),
    }
    if experts_file is not None:
        described["ptd_bytes"] = (directory / experts_file).stat().st_size
        described["ptd_sha256"] = file_sha256(directory / experts_file)
    return described


def _head_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(head_bytes(path))).hexdigest()


def check_program(directory: str | os.PathLike, verify: bool = False) -> Export:
    """
    Checks the files of a program against `export.json`: sizes and the program without its weights; the weights too in
    small files, or where it is asked for. Those that were right before and have not changed are not read again.

    Args:
        directory (`str` or `Path`): holds `model.pte` and `export.json`.
        verify (`bool`, defaults to `False`): check the weights of large files too, 1 to 3 seconds per GB.

    Returns:
        The content of `export.json`.

    Raises:
        ValueError: when a file is missing, cut off, damaged or of another export; with `verify` also when the export
            has no hashes.
    """
    directory = Path(directory)
    report = read_export(directory)
    program = directory / PROGRAM_FILE
    files = {program: (report.pte_bytes, report.pte_sha256)}
    if report.experts_file is not None:
        experts = directory / report.experts_file
        if not experts.is_file():
            raise ValueError(f"{experts} is missing: it holds the experts of {PROGRAM_FILE}. {COPY_AGAIN}")
        files[experts] = (report.ptd_bytes, report.ptd_sha256)
    for path, (size, sha256) in files.items():
        actual = path.stat().st_size
        if size is not None and actual != size:
            raise ValueError(
                f"{path} has {actual} bytes, export.json says {size}: it is truncated or belongs to another export. "
                f"{COPY_AGAIN}"
            )
        if sha256 is None and verify:
            raise ValueError(
                f"{directory / 'export.json'} has no hash of {path.name}: it is of an older version. Export again."
            )
    head_bytes(program)
    if report.pte_head_sha256 is not None and _head_sha256(program) != report.pte_head_sha256:
        raise ValueError(_other_contents(program))
    for path, (_, sha256) in files.items():
        if sha256 is not None and (verify or path.stat().st_size <= CHEAP_BYTES):
            _check_sha256(path, sha256)
    return report


def _check_sha256(path: Path, sha256: str) -> None:
    stat, key = path.stat(), str(path.resolve())
    entry = (stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256)
    try:
        known = Verified.load(cache_file()).files
    except (ValueError, OSError):
        known = {}
    if known.get(key) == entry:
        return
    if file_sha256(path) != sha256:
        raise ValueError(_other_contents(path))
    try:
        kept = {name: found for name, found in known.items() if Path(name).exists()}
        write_json(cache_file(), {"files": kept | {key: entry}})
    except OSError:
        # Then it is checked again the next time.
        pass


def _other_contents(path: Path) -> str:
    return f"{path} is not what was exported: its SHA-256 differs from that in export.json. {COPY_AGAIN}"


def verify_model(model: str | os.PathLike) -> None:
    """
    Checks all bytes of a program.

    Raises:
        ValueError: as [`check_program`], and for a checkpoint.
    """
    if not is_pte(model):
        raise ValueError(
            f"--verify compares a program with its export.json, and {model} is no directory with {PROGRAM_FILE}. "
            "A checkpoint is checked when it loads: leave --verify out."
        )
    check_program(model, verify=True)


def explain(error: RuntimeError, directory: str | os.PathLike) -> ValueError:
    """An error of ExecuTorch's runtime with its code in words."""
    found = re.search(r"(?:error|status):? 0x:?([0-9a-f]+)", str(error))
    reason = ERRORS.get(int(found[1], 16), "an unknown error") if found else "an error"
    return ValueError(
        f"ExecuTorch cannot run {Path(directory) / PROGRAM_FILE}, because of {reason}: {str(error).strip()}. "
        "`mobilemoe run --verify` checks the file; if it is whole, export it again with the installed executorch."
    )
