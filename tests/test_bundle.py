"""The runner for 64-bit Arm as a directory that needs nothing else: how it is built, kept and refused."""

import logging
import re
import subprocess
from pathlib import Path

import pytest

from mobilemoe.cli import main
from mobilemoe.device import bundle
from mobilemoe.device.bundle import LOADER, RUNNER, build_bundle


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mobilemoe/bundles"


@pytest.fixture
def stand_ins(monkeypatch) -> list[str]:
    """In place of the compiler, the wheel and the libraries; their calls are the result."""
    calls = []

    def compile_target(directory: Path, target: str, *options: str, file: str) -> Path:
        calls.append(f"compile {target}")
        directory.mkdir()
        (directory / file).write_text("program")
        return directory / file

    def unpack_wheel(release: str, scratch: Path) -> Path:
        calls.append(f"unpack {release}")
        return scratch / "executorch"

    monkeypatch.setattr(bundle, "compile_target", compile_target)
    monkeypatch.setattr(bundle, "unpack_wheel", unpack_wheel)
    monkeypatch.setattr(bundle, "find_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(bundle, "copy_libraries", lambda _, __, place: (place / LOADER).write_text("loader"))
    return calls


def test_it_is_built_once_and_again_when_damaged(cache: Path, stand_ins: list[str], monkeypatch, caplog):
    monkeypatch.setattr(bundle, "version", lambda _: "1.5.1+cpu")
    built = build_bundle()
    assert built.parent == cache and stand_ins == ["unpack 1.5.1", f"compile {RUNNER}"]
    assert [path.name for path in cache.iterdir()] == [built.name]
    assert {path.name: path.stat().st_mode & 0o777 for path in built.iterdir()} == {LOADER: 0o755, RUNNER: 0o755}
    assert build_bundle() == built and len(stand_ins) == 2
    (built / RUNNER).write_text("pr0gram")
    with caplog.at_level(logging.WARNING):
        assert build_bundle() == built
    assert f"{built} is damaged and is built again" in caplog.text and len(stand_ins) == 4
    assert (built / RUNNER).read_text() == "program"
    # Of another executorch.
    monkeypatch.setattr(bundle, "version", lambda _: "1.5.2")
    assert build_bundle() != built and stand_ins[4] == "unpack 1.5.2"


def test_a_failure_leaves_nothing(cache: Path, stand_ins: list[str], monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("no library")

    monkeypatch.setattr(bundle, "copy_libraries", fail)
    with pytest.raises(ValueError, match="no library"):
        build_bundle()
    assert list(cache.iterdir()) == []


def test_a_directory_for_a_board(cache: Path, stand_ins: list[str], tmp_path: Path, capsys):
    main(["bench", "--build-runner", str(tmp_path / "board")])
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == [LOADER, RUNNER]
    assert f"in it, start: ./{LOADER} --library-path . ./{RUNNER}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="board exists and is not empty. Give a new directory"):
        main(["bench", "--build-runner", str(tmp_path / "board")])
    with pytest.raises(SystemExit, match="--model is needed"):
        main(["bench"])


def test_what_is_missing_is_named_with_the_line_that_installs_it(cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="Install it .Debian, Ubuntu: apt install g..-aarch64-linux-gnu., or give"):
        build_bundle()
    for tool in ("g++", "readelf"):
        # A compiler without libraries says the name again, and this program needs one.
        script = (
            'echo "${1#-print-file-name=}"' if tool == "g++" else 'echo " 0x1 (NEEDED) Shared library: [libx.so.6]"'
        )
        (tmp_path / f"aarch64-linux-gnu-{tool}").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / f"aarch64-linux-gnu-{tool}").chmod(0o755)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"was not downloaded: .*No matching distribution.*PIP_FIND_LINKS"):
        build_bundle()
    assert list(cache.iterdir()) == []
    compiler = bundle.find_compiler()
    (tmp_path / RUNNER).touch()
    with pytest.raises(ValueError, match=r"needs libx.so.6, which .* apt install libc6-arm64-cross libstdc"):
        bundle.copy_libraries(compiler, tmp_path / "wheel/executorch/lib", tmp_path)


@pytest.mark.slow
def test_the_bundle_is_complete(arm_bundle: Path):
    names = {path.name for path in arm_bundle.iterdir()}
    assert {RUNNER, LOADER, "libexecutorch.so", "libc.so.6", "libstdc++.so.6"} <= names
    for path in arm_bundle.iterdir():
        assert set(bundle.needed_libraries(path)) <= names
        headers = subprocess.run([f"{bundle.TOOLS}readelf", "-lW", path], capture_output=True, text=True, check=True)
        alignments = [int(word, 16) for word in re.findall(r"^  LOAD.* (0x[0-9a-f]+)$", headers.stdout, re.MULTILINE)]
        # Newer phones have pages of 16 KB.
        assert alignments and min(alignments) >= 2**14, path.name
    dynamic = subprocess.run([f"{bundle.TOOLS}readelf", "-d", arm_bundle / RUNNER], capture_output=True, text=True)
    assert "RPATH" not in dynamic.stdout and "RUNPATH" not in dynamic.stdout
    assert sum(path.stat().st_size for path in arm_bundle.iterdir()) < 40e6
