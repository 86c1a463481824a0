"""The command itself: how little it imports, help, version, completion, exit codes, what it logs."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest

import mobilemoe
from mobilemoe import cli
from mobilemoe.machine import without_lines
from mobilemoe.runtime import load_language_model


VERBS = ("plan", "export", "run", "chat", "serve", "bench", "eval", "card")
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "rich", "huggingface_hub", "yaml", "shtab")


def imported_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of the command in a process of its own, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "mobilemoe.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    modules = [
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    ]
    assert "mobilemoe" in modules
    return result.returncode, {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["plan", "--help"], 0),
        (["eval", "compare", "--help"], 0),
        (["plan", "--no-such-option"], 2),
        (["no-such-verb"], 2),
        ([], 2),
    ],
)
def test_answers_without_a_run_import_nothing_heavy(arguments, code):
    # The editable install finds the package by a module that is imported at every start: it counts too.
    returned, packages = imported_by(*arguments)
    assert returned == code
    assert not packages & set(HEAVY)


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS), ("eval", "check"), ("eval", "prepare")])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {' '.join(['mobilemoe', *verb])} ")
    if not verb:
        assert all(f"\n    {verb} " in printed for verb in VERBS)


def test_version_has_one_owner(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mobilemoe {mobilemoe.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_script(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS) and "--memory-gb" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path):
    (tmp_path / "phone.json").touch()
    script = """
eval "$("$1" -m mobilemoe.cli --print-completion bash)"
complete() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_mobilemoe; echo "${COMPREPLY[@]}"; }
complete mobilemoe ex
complete mobilemoe plan --inf
complete mobilemoe export --moe-op l
complete mobilemoe plan --device pho
"""
    command = ["bash", "-c", script, "bash", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.splitlines() == ["export", "--inference-gflops", "llama", "phone.json"], result.stderr


def run_in_a_process(model) -> tuple[list[str], list[str]]:
    """Lines of stdout and of stderr of `mobilemoe run`; a progress bar that is drawn anew is a line each time."""
    command = ["run", "--model", model, "--prompt", "import os", "--max-new-tokens", "8"]
    result = subprocess.run([sys.executable, "-m", "mobilemoe.cli", *map(str, command)], capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode().split("\n"), [line for line in re.split("[\r\n]", result.stderr.decode()) if line]


@pytest.mark.parametrize("fixture", ["text_checkpoint", "base_checkpoint", "pte_directory", "kernel_pte"])
def test_run_prints_the_answer_and_one_line_of_speed(fixture, request):
    path = request.getfixturevalue(fixture)
    model = load_language_model(path)
    answer = model.decode(list(model.generate(model.encode("import os"), 8)))
    printed, said = run_in_a_process(path)
    assert "\n".join(printed) == f"{answer}\n"
    assert len(said) <= 1 and all("prompt tokens, first token after" in line for line in said), said


@pytest.mark.slow
def test_the_first_use_of_the_kernels_says_that_they_are_compiled(kernel_pte, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, said = run_in_a_process(kernel_pte)
    assert len(said) == 2 and said[0].startswith(
        "[run] Compiling mobilemoe_executorch for this machine, once: up to a"
    )
    _, said = run_in_a_process(kernel_pte)
    assert len(said) == 1


def test_of_native_code_only_the_given_lines_are_dropped(capfd):
    with pytest.raises(ValueError), without_lines("cpuinfo"):
        os.write(2, b"I cpuinfo.cpp:1] no file\nE program.cpp:2] damaged\n")
        raise ValueError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "E program.cpp:2] damaged\nafter\n"


def test_what_the_package_logs_goes_to_stderr_while_a_verb_runs(monkeypatch, capsys):
    def run(arguments):
        logging.getLogger("mobilemoe.export.exporter").info("lower ...")
        raise ValueError("x=1 cannot work. Set 2.")

    monkeypatch.setattr(cli, "run_plan", run)
    for _ in range(2):
        with pytest.raises(SystemExit, match="mobilemoe plan: x=1 cannot work. Set 2.") as stop:
            cli.main(["plan", "--memory-gb", "1"])
        # A message, which Python prints to stderr before it exits with 1.
        assert isinstance(stop.value.code, str)
        # Once, also after main has run before.
        assert capsys.readouterr().err == "[plan] lower ...\n"
    logging.getLogger("mobilemoe.export.exporter").info("lower ...")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["--json", "--picture"])
def test_a_result_that_could_not_be_written_is_not_measured(option, tmp_path, monkeypatch):
    monkeypatch.setattr("mobilemoe.bench.host.bench", lambda *_: pytest.fail("it is measured"))
    with pytest.raises(SystemExit, match=f"mobilemoe bench: {tmp_path} is a directory and cannot be replaced"):
        cli.main(["bench", "--model", "S", option, str(tmp_path)])


def test_a_result_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys):
    def fill(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mobilemoe.artifacts.write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        cli.write_result({"speed": 1.5}, str(tmp_path / "result.json"))
    assert json.loads(capsys.readouterr().out) == {"speed": 1.5}
