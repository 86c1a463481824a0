"""A GGUF file behind the interface of the other models, in llama.cpp itself."""

import io
import json
import re
import sys

import pytest
import torch

from mobilemoe.artifacts import find_gguf
from mobilemoe.cli import main
from mobilemoe.runtime import CheckpointModel, load_language_model


def test_a_missing_llama_cpp_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for model in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(SystemExit, match="which is not installed. pip install llama-cpp-python"):
            main(["run", "--model", str(model), "--prompt", "x"])


def test_gguf_files_are_recognised(tmp_path):
    assert find_gguf(tmp_path) is None
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    assert find_gguf(tmp_path / "other.gguf") == tmp_path / "other.gguf"


@pytest.fixture(scope="module")
def directory(float_text_checkpoint, tmp_path_factory):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    gguf = pytest.importorskip("mobilemoe.export.gguf", reason="needs gguf: pip install 'mobilemoe[gguf]'")
    return gguf.export_gguf(float_text_checkpoint, tmp_path_factory.mktemp("gguf") / "out")


@pytest.fixture(scope="module")
def model(directory):
    return load_language_model(directory)


@pytest.fixture(scope="module")
def checkpoint(float_text_checkpoint):
    return CheckpointModel(float_text_checkpoint, dtype=torch.float32)


def test_it_is_the_checkpoint(model, checkpoint):
    assert model.max_seq_len == checkpoint.max_seq_len and set(checkpoint.eos_ids) <= set(model.eos_ids)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is that café é \U0001f600 <|eot|>?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for options in ((messages,), (messages, tools)):
        assert model.encode_messages(*options) == checkpoint.encode_messages(*options)
    text = "def walk(steps):\n    return '\U0001f600 é , .'"
    tokens = model.encode(text)
    assert tokens == checkpoint.encode(text)
    assert model.decode([*tokens, *checkpoint.eos_ids]) == checkpoint.decode(tokens) == text
    assert "".join(model.stream(tokens)) == text
    # An FP16 cache.
    difference = (model.last_logits(tokens, 0, 3) - checkpoint.last_logits(tokens, 0, 3)).abs().max()
    assert difference < 1e-2 * checkpoint.all_logits(tokens).abs().max()


def test_the_next_turn_runs_what_is_new(model, monkeypatch):
    model.reset()
    prompt = model.encode("import os\n")
    answer = list(model.generate(prompt, 10))
    longer = [*prompt, *answer, *model.encode("def")]
    run, forward = [], model._forward
    monkeypatch.setattr(model, "_forward", lambda tokens, *rest: run.append(len(tokens)) or forward(tokens, *rest))
    continued = list(model.generate(longer, 6))
    assert run[0] == len(longer) - len(prompt) - len(answer) + 1
    model.reset()
    assert list(model.generate(longer, 6)) == continued


def test_structured_output(model):
    grammar = model.grammars.regex("[a-c]{2}-[0-9]{3}")
    answer = model.decode(list(model.generate(model.encode("import"), 20, temperature=1.0, seed=0, grammar=grammar)))
    assert grammar.is_matched and re.fullmatch("[a-c]{2}-[0-9]{3}", answer)


def test_run_and_chat_take_the_file(directory, monkeypatch, capsys, tmp_path):
    main(["run", "--model", str(directory / "model.gguf"), "--prompt", "import os", "--max-new-tokens", "6"])
    assert capsys.readouterr().out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"What is a walk?\n/save {tmp_path}/chat.json\n"))
    main(["chat", "--model", str(directory), "--max-new-tokens", "6"])
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert capsys.readouterr().out == messages[1]["content"] + "\n"


def test_files_that_llama_cpp_does_not_load_are_named(tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="does not load .*model.gguf. Install a llama-cpp-python that knows"):
        load_language_model(tmp_path)
    with pytest.raises(ValueError, match="There is no file .*none.gguf. Make one: mobilemoe export --to gguf"):
        load_language_model(tmp_path / "none.gguf")
