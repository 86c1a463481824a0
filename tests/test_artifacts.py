"""The JSON files that we write: read as they were written, refused with the key and the value that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import bench_result

from mobilemoe.artifacts import (
    Artifact,
    Export,
    check_model_files,
    check_writable,
    describe_model,
    is_checkpoint,
    is_pte,
    is_shape,
    load_tokenizer,
    local_checkpoint,
    read_export,
    write_json,
)
from mobilemoe.results import Benchmark, read_result
from mobilemoe.runtime import CheckpointModel
from modeling_mobilemoe import MobileMoEConfig


ROOT = Path(__file__).parents[1]


def test_a_file_is_written_as_it_was_read(tmp_path):
    path = ROOT / "model_cards/results/s-bench.json"
    benchmark = read_result(path)
    assert isinstance(benchmark, Benchmark) and benchmark.models["S"].lengths["16"].decode_tokens_per_s.median == 218.9
    # Older than the key, so that it is not written either.
    assert benchmark.command is None
    benchmark.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-3], "does not hold a benchmark of models: it is not JSON .* Measure again"),
        (lambda text: "[]", r"its content is \[\], expected an object"),
        (lambda text: text.replace('"kv_bits"', '"bits"'), "the key models.S.kv_bits is missing"),
        (lambda text: text.replace('"p10": 20.25', '"p10": NaN'),
         "models.S.lengths.128.decode_tokens_per_s.p10 is nan, expected a finite number"),
        (lambda text: text.replace('"p10": 20.25', '"p10": "20.25"'),
         "models.S.lengths.128.decode_tokens_per_s.p10 is '20.25', expected a valid number"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_key_and_value(change, message, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(change(json.dumps(bench_result(S=MobileMoEConfig()))))
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        Benchmark.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "null", "the configuration of a model: its content is None, expected an object"),
        ("config.json", '{"model_type": "mobi', "the configuration of a model: it is not JSON"),
        ("config.json", '{"model_type": 3}', "model_type is 3, expected a valid string"),
        ("config.json", "{}", "the key model_type is missing"),
        ("config.json", b"\xff\xfe", "it is not JSON"),
        ("generation_config.json", '{"eos_token_id": "1"}', "how a model generates: eos_token_id"),
        ("generation_config.json", "[]", r"its content is \[\], expected an object"),
        ("tokenizer.json", '{"model": null}', "a tokenizer: model is None, expected an object"),
        ("tokenizer.json", "", "a tokenizer: it is not JSON"),
        ("tokenizer_config.json", '{"bos_token": 5}', "the settings of a tokenizer: bos_token"),
    ],
)
def test_a_damaged_file_of_a_model_is_named(name, content, message, text_checkpoint, tmp_path):
    path = shutil.copytree(text_checkpoint, tmp_path / "model")
    check_model_files(path)
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (check_model_files, describe_model, CheckpointModel):
        with pytest.raises(ValueError, match=f"{path / name} does not hold .*{message}.*fetch it again, or save"):
            read(path)


def test_unknown_keys_are_ignored_and_unset_ones_not_written(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(bench_result(S=MobileMoEConfig()) | {"newer": 1}))
    read = Benchmark.load(tmp_path / "bench.json").as_dict()
    assert "newer" not in read and "phone" not in read and "operator_ms" not in read["models"]["S"]


def test_only_these_say_what_a_path_is(tiny_checkpoint, tmp_path, monkeypatch):
    assert is_checkpoint(tiny_checkpoint) and not is_pte(tiny_checkpoint) and not is_shape(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert is_shape("S") and is_shape("MobileLLM-Pro") and not is_shape("XL")
    Path("S").mkdir()
    assert not is_shape("S")
    with pytest.raises(ValueError, match="S holds no model.pte. Make one: mobilemoe export"):
        read_export("S")
    Path("S/model.pte").write_bytes(b"")
    assert is_pte("S")
    with pytest.raises(ValueError, match="S holds no export.json"):
        read_export("S")
    Path("S/export.json").write_text("{}")
    with pytest.raises(ValueError, match="S/export.json does not hold the report of an export: the key model is mis"):
        read_export("S")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("S", "S is a shape without trained weights, which only `mobilemoe bench` takes"),
        *(
            (name, f"There is no directory {name}. Name a")
            for name in ("typo", "./a/b", "../a", "/a/b", "a/b/c", "~/a")
        ),
    ],
)
def test_what_can_only_be_a_path_is_not_looked_up(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=message):
        local_checkpoint(name)


def test_without_network_a_hub_id_is_tried_once(tmp_path):
    code = """
import time
def again(seconds): raise AssertionError("waits to try again")
time.sleep = again
from mobilemoe.runtime import load_language_model
try:
    load_language_model("user/model")
except ValueError as error:
    print(error)
"""
    # Nothing listens there.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.stdout.startswith("There is no directory user/model, and it cannot be downloaded from the Hub: ")
    assert result.stdout.count("\n") == 1


def test_every_result_records_its_command():
    others = ("DeviceMeasurements", "ModelFile", "Prepared", "Run", "Settings", "Transcript", "Verified")
    kinds = [kind for kind in Artifact.__subclasses__() if kind.__name__ not in others]
    assert Export in kinds and all("command" in kind.model_fields for kind in kinds)


def test_importing_is_light():
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy'}"
    code = f"import sys, mobilemoe.results; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("directory", "directory is a directory and cannot be replaced"),
        ("pipe", "pipe is no regular file and cannot be replaced"),
        ("file/out.json", "out.json cannot be made: .*file is no directory one can write to. Name another one."),
    ],
)
def test_what_is_no_file_is_not_replaced(name, message, tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted((path, path.stat().st_mode) for path in tmp_path.iterdir())
    for write in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(OSError, match=message):
            write(tmp_path / name)
    assert sorted((path, path.stat().st_mode) for path in tmp_path.iterdir()) == before
    check_writable(tmp_path / "new/out.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content["model"].update(merges=[["no", "tokens"]]), "out of vocabulary"),
        (lambda content: content["model"]["vocab"].update({"x": -1}), "invalid value"),
    ],
)
def test_a_tokenizer_that_its_library_refuses_is_named(damage, message, text_checkpoint, tmp_path):
    path = shutil.copytree(text_checkpoint, tmp_path / "model")
    content = json.loads((path / "tokenizer.json").read_text())
    damage(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"The tokenizer of {path} cannot be read: .*{message}"):
        load_tokenizer(path)
