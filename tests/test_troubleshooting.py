"""The messages that docs/troubleshooting.md quotes are those that are printed."""

import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from huggingface_hub.errors import GatedRepoError
from transformers import AutoModelForCausalLM

from mobilemoe import artifacts, cli
from mobilemoe.export import exporter
from modeling_mobilemoe import kernels


QUOTED = re.findall(r"^```\n(.+?)\n```$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE | re.DOTALL)


def failure(*arguments) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, arguments)))
    return str(stop.value)


@pytest.fixture
def messages(text_checkpoint, base_checkpoint, tmp_path, monkeypatch):
    """Functions that produce the messages, in the order of the document."""
    monkeypatch.chdir(tmp_path)

    def missing_package():
        monkeypatch.setitem(sys.modules, "gguf", None)
        return failure("export", "--to", "gguf", "--model", text_checkpoint, "--output", "gguf")

    def unknown_architecture():
        code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(text_checkpoint)!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return re.search(r"^ValueError: (.*)$", result.stderr, re.MULTILINE)[1]

    def no_directory():
        return failure("run", "--model", "nowhere", "--prompt", "x").removeprefix("mobilemoe run: ")

    def no_network():
        # The tests are offline.
        return failure("run", "--model", "user/model", "--prompt", "x").removeprefix("mobilemoe run: ")

    def gated():
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        error = GatedRepoError("restricted", response=response)
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
            with pytest.raises(ValueError) as caught:
                artifacts.local_checkpoint("user/model")
        return str(caught.value)

    def no_compiler():
        def without_cmake():
            with monkeypatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
                patch.setattr("shutil.which", lambda *_, **__: None)
                return kernels.available.__wrapped__()

        return warning(without_cmake)

    def another_dtype():
        return warning(lambda: AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32))

    def short_context():
        options = ["--prompt-lengths", "250", "--new-tokens", "10"]
        return failure("bench", "--model", text_checkpoint, *options).removeprefix("mobilemoe bench: ")

    def no_template():
        return failure("run", "--model", base_checkpoint, "--chat", "--prompt", "x").removeprefix("mobilemoe run: ")

    def existing_output():
        command = ["export", "--model", text_checkpoint, "--output", tmp_path]
        return failure(*command).removeprefix("mobilemoe export: ")

    def little_memory():
        with monkeypatch.context() as patch:
            patch.setattr(exporter, "available_memory", lambda: 1e6)
            return failure("export", "--model", text_checkpoint, "--output", "pte").removeprefix("mobilemoe export: ")

    return [
        missing_package,
        unknown_architecture,
        no_directory,
        no_network,
        gated,
        no_compiler,
        another_dtype,
        short_context,
        no_template,
        existing_output,
        little_memory,
    ]


def warning(function) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    (one,) = [str(one.message) for one in caught if one.category is UserWarning]
    return one


@pytest.mark.parametrize("index", range(len(QUOTED)), ids=[quoted[:40] for quoted in QUOTED])
def test_message_is_printed_so(index, messages):
    assert len(messages) == len(QUOTED)
    pattern = re.escape(QUOTED[index]).replace(re.escape("..."), ".+")
    printed = messages[index]()
    assert re.fullmatch(pattern, printed), printed
