"""A writer that is killed before any of its file operations leaves the old state or the new one, and no remnants.


crash_points.cpp, which is preloaded, counts the operations of Python, safetensors and the C library alike.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from crash_worker import SCENARIOS

from mobilemoe.artifacts import replace_file, write_text
from modeling_mobilemoe import saving_mobilemoe as saving
from modeling_mobilemoe.saving_mobilemoe import finish_save, remove_remnants, replace_when_complete


TESTS = Path(__file__).parent
# The others load a model in every state, a minute or more each.
FAST = {"files: one over shards", "files: shards over one", "JSON"}


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if platform.system() != "Linux":
        pytest.skip("LD_PRELOAD and /proc are of Linux")
    path = tmp_path_factory.mktemp("shim") / "crash_points.so"
    command = ["c++", "-O1", "-shared", "-fPIC", "-o", path, TESTS / "crash_points.cpp", "-ldl"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return path


def scenario(name: str):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [scenario(name) for name in SCENARIOS])
def test_every_state_is_the_old_or_the_new_one(name: str, shim: Path, tmp_path: Path):
    if name == "pte":
        pytest.importorskip("executorch", reason="needs the `export` extra")
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS.parent / "examples")))
    environment = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "crash_worker.py"), name, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["problems"] == []
    # The first operation makes a temporary file, and the last one is not the first that is seen.
    assert found["count"] >= 4 and found["old"] >= 1 and found["old"] + found["new"] == found["count"]


def test_a_model_that_was_replaced_halfway_is_whole_for_every_reader(tmp_path, monkeypatch):
    """As after a kill between the renames, seen without a model."""

    def save(tag: str) -> None:
        with replace_when_complete(tmp_path / "out") as partial:
            for name in ("model.safetensors", "generation_config.json"):
                (partial / name).write_text(tag)
            (partial / "config.json").write_text(json.dumps({"tag": tag}))

    class Killed(BaseException):
        pass

    save("old")
    with monkeypatch.context() as patch:
        # What a killed process does not do any more.
        patch.setattr(saving, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save("new")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tag"] == "new" and (tmp_path / "out" / config["transformers_weights"]).read_text() == "new"
    assert (tmp_path / "out/model.safetensors").read_text() == "old"
    # It is no remnant, but the model.
    remove_remnants(tmp_path / "out")
    finish_save(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"tag": "new"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert (tmp_path / "out/model.safetensors").read_text() == "new"


def test_what_others_are_writing_is_left_alone(tmp_path):
    with replace_when_complete(tmp_path / "out") as theirs, replace_file(tmp_path / "text.json") as their_file:
        (theirs / "file").write_text("theirs")
        their_file.write_text("theirs")
        with replace_when_complete(tmp_path / "out") as ours:
            (ours / "other").write_text("ours")
        write_text(tmp_path / "text.json", "ours")
        assert (theirs / "file").is_file() and (tmp_path / "text.json").read_text() == "ours"
    assert (tmp_path / "text.json").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"file", "other"}


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    script = """
import os, sys
from pathlib import Path
from mobilemoe.artifacts import replace_file
with replace_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "text.json"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert [file.name.startswith(".text.partial-") for file in tmp_path.iterdir()] == [True]
    write_text(path, "whole")
    assert list(tmp_path.iterdir()) == [path]
