"""
Every command and Python block of the documentation runs as it is written, in the order in which it is written.

Read are the documents of `DOCUMENTS`: each line of a ```bash block, each line that begins with `$ ` in another block,
each line of an indented block and each `code` in running text or a table that begins with one of `PROGRAMS`, and each
```python block. Every document has a directory of its own, a clone of the repository in which `examples/demo.py` has
run for a few steps; only the data of the benchmarks are stand-ins. `SKIP` says what does not run there, and why.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from device_daemon import LOADER, Device
from eval_stand_ins import write_stand_ins
from hub_server import HubServer
from markdown_it import MarkdownIt
from test_bench_phone import MINIBENCH, OBSERVER, fake_runner, install_app

from mobilemoe import cli
from mobilemoe.costs import read_device


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "modeling_mobilemoe/kernels/README.md",
]
PROGRAMS = "python mobilemoe curl make accelerate optimum-cli pip hf source cmake ruff adb git pytest".split()
# `code` in running text that names a command and does not call it.
NAMES = r"(mobilemoe|optimum-cli|accelerate|make)( [a-z]+){0,2}"
HOURS = "takes hours, or minutes on an idle machine; tests/test_examples.py runs it on less"
WEIGHTS = "needs Meta's gated weights"
# Patterns of commands and blocks, each with the reason.
SKIP = {
    r"facebook/MobileMoE|from_pretrained\(\"out/mobilemoe|--model out/mobilemoe-": WEIGHTS,
    r"recipes/(pretrain|midtrain|sft|qat)\.yaml|recipes/mobilemoe-": "needs data sets of the Hub; "
    "tests/test_recipe_files.py reads its files on rows of their schemas",
    r"^python benchmarks/(?!ablation|install_sizes)\w+\.py": HOURS,
    r"^python benchmarks/ablation\.py": "takes hours; tests/test_ablation.py runs it on less",
    r"^python benchmarks/ablation_report\.py": "reads what takes hours; tests/test_ablation_report.py",
    r"^python examples/record\.py": "records the commands that stand beside it",
    r"^python examples/notebooks\.py": "tests/test_notebooks.py runs each notebook",
    r"^make (setup|demo|test|test-slow|fuzz|docs|lint)": "makes or needs an environment of its own",
    r"^source \.venv/bin/activate": "enters the environment that the tests run in",
    r"^mobilemoe bench --model S ": "exports two full-size programs; tests/test_bench.py runs small ones",
    r"^mobilemoe eval prepare ": "needs the network; tests/test_evaluation.py runs it against a Hub in memory",
    r"^gradle ": "needs the Android SDK",
    r"^(adb |mobilemoe (bench|chat) --device adb)": "needs a phone; test_commands_of_devices has one on loopback",
    r"^mobilemoe (bench|chat) --device ssh:": "needs a board; test_commands_of_devices has this machine",
    r"^mobilemoe bench --build-runner": "needs a cross compiler; test_commands_of_devices",
    r"^hf auth login": "needs an account of the Hub",
    r"^pip ": "needs the package index; tests/test_wheel.py installs the wheel",
    r"^cmake ": "needs a cross compiler or Android's NDK; tests/test_runner.py and test_kernels.py build its targets",
}


def logical_lines(text: str) -> list[str]:
    """Lines without comments, with continued ones joined."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def read_document(text: str) -> list[tuple[str, str]]:
    """`("bash", command)` and `("python", block)` of a Markdown document, in its order."""
    found = []
    begins = tuple(f"{program} " for program in PROGRAMS)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        language = token.info.strip()
        if token.type == "fence" and language == "python":
            found.append(("python", token.content))
            continue
        commands = []
        if token.type == "fence" and language in ("bash", "sh", "console"):
            commands = [line.removeprefix("$ ") for line in logical_lines(token.content)]
        elif token.type == "fence":
            commands = [line.removeprefix("$ ") for line in logical_lines(token.content) if line.startswith("$ ")]
        elif token.type == "code_block":
            commands = [line for line in logical_lines(token.content) if line.startswith(begins)]
        elif token.type == "inline":
            spans = [child.content for child in token.children if child.type == "code_inline"]
            commands = [span for span in spans if span.startswith(begins) and not re.fullmatch(NAMES, span)]
        found += [("bash", command) for command in commands]
    return found


def skipped(text: str) -> str | None:
    return next((reason for pattern, reason in SKIP.items() if re.search(pattern, text)), None)


ALL = [(document, *item) for document in DOCUMENTS for item in read_document(document.read_text())]
EVERY_COMMAND = list(dict.fromkeys(text for _, language, text in ALL if language == "bash"))


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_command_is_understood(command: str):
    """Without running it: the options of `mobilemoe`, the files, modules and make targets that it names."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "mobilemoe":
        cli.make_parser().parse_args(arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for file in (word for word in arguments if re.fullmatch(r"(recipes|examples|benchmarks|tests)/\S+", word)):
        assert (ROOT / file).exists(), f"there is no {file}"


def test_every_reason_is_needed():
    texts = [text for _, _, text in ALL]
    assert [pattern for pattern in SKIP if not any(re.search(pattern, text) for text in texts)] == [], "Remove these"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files of the repository, after the demo; data of the benchmarks are stand-ins."""
    clone = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    run([sys.executable, "examples/demo.py", "--max-steps", "12"], clone)
    write_stand_ins(clone / "data", "foundation")
    return clone


def environment_of(directory: Path) -> dict[str, str]:
    # The programs of the environment, and none of the repository but that of the clone.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    values = {"PATH": path, "PYTHONPATH": str(directory), "HF_HOME": str(directory / "hf")}
    return os.environ | values | {"NO_PROXY": "127.0.0.1,localhost"}


def run(command: list[str], directory: Path, text: str = "", **environment: str) -> str:
    """What the command prints, with a text as its input."""
    environment = environment_of(directory) | environment
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, input=text)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout[-1000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document(document: Path, clone: Path, tmp_path: Path):
    directory = shutil.copytree(clone, tmp_path / "clone")
    ran = 0
    with ExitStack() as servers:
        for language, text in read_document(document.read_text()):
            if skipped(text):
                continue
            print(text, flush=True)
            ran += 1
            if "mobilemoe serve " in text:
                servers.enter_context(serving(text, directory))
            elif language == "bash":
                run(["bash", "-ec", text], directory)
            elif "push_to_hub" in text:
                run_with_hub(text, directory)
            else:
                run([sys.executable, "-c", text], directory)
    if not ran:
        pytest.skip("all of its commands are in SKIP")


# What needs a phone, a board, or the runner for them.
OF_DEVICES = r"^(adb |mobilemoe (bench|chat) --(device (adb|ssh:)|build-runner))"


@pytest.fixture
def board(tmp_path: Path, emulator: list[str], monkeypatch) -> Path:
    """Where a login on a board begins: this machine, with QEMU as its processor, in place of what ssh reaches."""
    home, here, there = (tmp_path / name for name in ("board", "bin", "board-bin"))
    for path in (home, here, there):
        path.mkdir()
    start = f"../bundle/{LOADER} --library"
    emulated = f"{' '.join(emulator)} {start}"
    scripts = {
        there / "uname": "echo aarch64",
        here / "ssh": f"cd {home}; for last; do :; done; export PATH={there}:$PATH\n"
        f'exec sh -c "$(printf %s "$last" | sed "s#{start}#{emulated}#")"',
    }
    for path, script in scripts.items():
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    return home


@pytest.mark.slow
def test_commands_of_devices(
    clone: Path, phone: Device, board: Path, arm_bundle: Path, emulator: list[str], tmp_path: Path
):
    """
    Those of docs/phone.md, on a phone on loopback and a board that is this machine, both with Arm code in QEMU.
    ExecuTorch's runners are stand-ins. What exports two full-size programs is left out.
    """
    directory = shutil.copytree(clone, tmp_path / "clone")
    phone.emulator = emulator
    # Any program: neither stand-in reads it.
    shutil.copytree(directory / "out/demo/pte", directory / "out/pte-llama")
    runner = directory / "cmake-out-android/examples/models/llama/llama_main"
    runner.parent.mkdir(parents=True)
    fake_runner(runner, f"echo '{OBSERVER}'")
    results = phone.root / "app/files/benchmark_results.json"
    install_app(phone, f"[ $1 = start ] && cat > {results} <<'END'\n{MINIBENCH}\nEND\necho Status: ok")
    ran = []
    for _, text in read_document((ROOT / "docs/phone.md").read_text()):
        if not re.search(OF_DEVICES, text) or "--model S " in text or text == "adb connect ADDRESS":
            continue
        print(text, flush=True)
        chat = text.startswith("mobilemoe chat ")
        printed = run(["bash", "-ec", text], directory, "Write a loop.\nShorter.\n/reset\nThanks.\n" if chat else "")
        assert not chat or len(printed.strip()) > 10
        ran.append(text)
    counts = [sum(words in text for text in ran) for words in ("--device adb", "--device ssh:", "--build-runner")]
    assert counts == [4, 2, 1]
    left = [path for place in ("data/local/tmp", "app/files") for path in (phone.root / place).iterdir()]
    assert left == [results] and not any((board / ".cache").iterdir())
    for name in ("phone.json", "board.json"):
        result = read_device(directory / "out" / name)
        assert result.bandwidth > 0
    assert (directory / "out/phone.png").is_file() and (directory / "out/arm-runner" / LOADER).is_file()


@contextmanager
def serving(command: str, directory: Path) -> Iterator[None]:
    """A server that is there for the rest of its document."""
    log = directory / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            ["bash", "-ec", command], cwd=directory, env=environment_of(directory), stdout=file, stderr=file
        )
    try:
        while " at http://" not in log.read_text():
            assert server.poll() is None, f"{command}\n{log.read_text()}"
            time.sleep(0.1)
        yield
        server.terminate()
        assert server.wait(60) == 0, f"{command}\n{log.read_text()}"
    finally:
        server.kill()
        server.wait()


def run_with_hub(block: str, directory: Path) -> None:
    """With a Hub in memory that takes what is pushed. Its settings are read when `huggingface_hub` is imported."""
    with HubServer() as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_writer"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        run([sys.executable, "-c", block], directory, **settings)
        assert hub.repositories


def test_documents_are_read_as_their_readers_read_them():
    text = """
Run `mobilemoe plan --memory-gb 1` or `make demo`, see `mobilemoe plan`.

```bash
python one.py \\
  --two 3   # a comment
# nothing
```

```
$ mobilemoe run --model DIR
its output
mobilemoe is no command here
```

    python -m indented

| a | b |
|---|---|
| in a table | `python recipes/sft.py` |

```python
print("block")
```
"""
    assert read_document(text) == [
        ("bash", "mobilemoe plan --memory-gb 1"),
        ("bash", "python one.py --two 3"),
        ("bash", "mobilemoe run --model DIR"),
        ("bash", "python -m indented"),
        ("bash", "python recipes/sft.py"),
        ("python", 'print("block")\n'),
    ]
