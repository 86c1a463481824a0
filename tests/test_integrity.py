"""Programs that are not what was exported are refused before ExecuTorch gets them."""

import json
import os
from pathlib import Path

import pytest

from mobilemoe import integrity
from mobilemoe.cli import main
from mobilemoe.integrity import PROGRAM_HEADER, check_program, describe_files, explain, verify_model


REPORT = {
    "model": "model",
    "weights_sha256": {},
    "versions": {},
    "moe_op": None,
    "expert_axis": None,
    "experts_rounded_twice": False,
    "expert_rounding_sqnr_db": None,
    "max_seq_len": 64,
    "weights": "int4",
    "expert_bits": 4,
    "embedding_bits": 4,
    "kv_cache": "int8",
    "all_logits": False,
    "eos_ids": [],
    "experts_file": "experts.ptd",
    "operators": [],
}
HEAD, WEIGHTS = 64, 1000


@pytest.fixture
def program(tmp_path: Path, monkeypatch) -> Path:
    """A directory with the header of a program, weights and experts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "pte"
    directory.mkdir()
    header = PROGRAM_HEADER.pack(b"ET12", b"eh00", 32, HEAD, HEAD, WEIGHTS)
    (directory / "model.pte").write_bytes(header + bytes(HEAD - len(header)) + os.urandom(WEIGHTS))
    (directory / "experts.ptd").write_bytes(os.urandom(500))
    report = REPORT | describe_files(directory, "experts.ptd")
    (directory / "export.json").write_text(json.dumps(report))
    return directory


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_program_that_was_exported_is_accepted(program):
    assert check_program(program).pte_bytes == HEAD + WEIGHTS
    verify_model(program)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pte", lambda content: os.urandom(len(content)), "is no program for ExecuTorch: it does not begin"),
        ("model.pte", lambda content: content[:-1], "has 1063 bytes, export.json says 1064: it is truncated"),
        ("model.pte", lambda content: b"", "has 0 bytes, export.json says 1064"),
        ("experts.ptd", lambda content: content + b"x", "has 501 bytes, export.json says 500"),
    ],
)
def test_another_file_is_refused(name, content, message, program):
    path = program / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} {message}"):
        check_program(program)


@pytest.mark.parametrize(("name", "at"), [("model.pte", 50), ("model.pte", HEAD + 10), ("experts.ptd", 499)])
def test_one_changed_bit_is_refused(name, at, program):
    check_program(program)
    change(program / name, at)
    with pytest.raises(ValueError, match=f"{name} is not what was exported: its SHA-256 differs"):
        check_program(program)


def test_weights_of_a_large_program_are_read_on_request_and_once(program, monkeypatch):
    monkeypatch.setattr(integrity, "CHEAP_BYTES", 100)
    read, file_sha256 = [], integrity.file_sha256
    monkeypatch.setattr(integrity, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    check_program(program)
    assert read == []
    verify_model(program)
    assert read == ["model.pte", "experts.ptd"]
    verify_model(program)
    assert len(read) == 2
    # The program without its weights is always read.
    change(program / "model.pte", 50)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        check_program(program)
    change(program / "model.pte", 50)
    change(program / "model.pte", HEAD + 10)
    check_program(program)
    with pytest.raises(SystemExit, match="mobilemoe run: .*SHA-256 differs.*Copy the whole directory again"):
        main(["run", "--model", str(program), "--prompt", "x", "--verify"])
    with pytest.raises(SystemExit, match="mobilemoe bench: .*SHA-256 differs"):
        main(["bench", "--model", "S", str(program), "--verify"])


def test_a_cache_that_cannot_be_used_does_not_matter(program, tmp_path):
    verify_model(program)
    integrity.cache_file().write_text("{")
    verify_model(program)
    assert "files" in json.loads(integrity.cache_file().read_text())
    integrity.cache_file().unlink()
    integrity.cache_file().mkdir()
    verify_model(program)


def test_what_cannot_be_verified_is_said(program, tiny_checkpoint):
    with pytest.raises(ValueError, match="A checkpoint is checked when it loads: leave --verify out"):
        verify_model(tiny_checkpoint)
    report = json.loads((program / "export.json").read_text())
    del report["pte_sha256"], report["pte_head_sha256"]
    (program / "export.json").write_text(json.dumps(report))
    check_program(program)
    with pytest.raises(ValueError, match="export.json has no hash of model.pte: it is of an older version. Export ag"):
        verify_model(program)
    (program / "experts.ptd").unlink()
    with pytest.raises(ValueError, match="experts.ptd is missing: it holds the experts of model.pte"):
        check_program(program)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Failed to load program, error: 0x:23", "a program that is damaged or of another version"),
        ("Failed to load method forward, error: 0x14", "an operator that this runtime lacks"),
        ("method->execute() failed with error 0x12", "an argument that the program does not accept"),
        ("Method execution failed with status 0x21", "a lack of memory"),
        ("something else", "an error"),
    ],
)
def test_codes_are_words(message, words):
    assert f"cannot run pte/model.pte, because of {words}: {message}" in str(explain(RuntimeError(message), "pte"))
