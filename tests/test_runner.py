"""The C++ runner measures what the Python runtime computes, on this machine and as Arm code under emulation."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from modeling_mobilemoe.kernels import build_runner


pytest.importorskip("executorch.runtime", reason="executorch is not installed: make setup")
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    path.write_text(" ".join(str(3 + 7 * i % 480) for i in range(48)))
    return path


def run(command: list, *arguments: str) -> list[dict]:
    result = subprocess.run([*command, *arguments], capture_output=True, text=True)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == (events[-1]["event"] == "error"), result.stderr[-2000:]
    return events


def check_report(events: list[dict], directory: Path, tokens: Path) -> None:
    from mobilemoe.runtime import PteModel

    ids = list(map(int, tokens.read_text().split()))
    loaded, *measured, done = events
    assert (loaded["event"], loaded["context"], done["event"]) == ("loaded", 64, "done")
    assert loaded["load_s"] > 0 and loaded["rss_bytes"] > 1e5 and loaded["pss_bytes"] > 1e5
    rounds = [(row["repeat"], row["prompt_length"]) for row in measured if row["event"] == "measure"]
    assert rounds == [(repeat, length) for repeat in (-1, 0, 1) for length in (5, 20)]
    model = PteModel(directory)
    for row in measured[: len(rounds)]:
        length, given = row["prompt_length"], ids[row["offset"] :]
        expected = [model.forward(given[:length], 0).argmax().item()]
        expected += [model.forward([given[i]], i).argmax().item() for i in range(length, length + 3)]
        assert row["tokens"] == expected
        assert row["first_token_s"] > 0 and len(row["decode_s"]) == 3
    layers = model_layers(directory)
    assert done["operators"]["mobilemoe::decoder_layer.out"] % (layers * 4) == 0
    assert not any(name.startswith("llama::") for name in done["operators"])
    assert done["peak_rss_bytes"] >= loaded["rss_bytes"]


def model_layers(directory: Path) -> int:
    return json.loads((directory / "config.json").read_text())["num_hidden_layers"]


def request(directory: Path, tokens: Path) -> list[str]:
    return ["--model", str(directory / "model.pte"), "--tokens", str(tokens), "--prompt-lengths", "5,20",
            "--new-tokens", "3", "--repeats", "2", "--threads", "2"]  # fmt: skip


def test_runner_computes_what_python_does(kernel_pte: Path, tokens: Path):
    events = run([build_runner()], *request(kernel_pte, tokens), "--sustained", "1", "--cold")
    assert events[0]["threads"] == 2 and events[0]["isa"] in ("portable", "avx2", "avx512", "neon", "i8mm")
    assert [row for row in events if row["event"] == "sustained"]
    check_report(events, kernel_pte, tokens)


def test_generation_writes_what_python_does(kernel_pte: Path, tokens: Path):
    from mobilemoe.runtime import PteModel

    events = run([build_runner()], *request(kernel_pte, tokens), "--generate", "40")
    made = [row for row in events if row["event"] == "generate"]
    order = [(row["repeat"], row["prompt_length"], row["prompt_lookup"]) for row in made]
    assert order == [(repeat, length, lookup) for repeat in (0, 1) for length in (5, 20) for lookup in (False, True)]
    model, ids = PteModel(kernel_pte), list(map(int, tokens.read_text().split()))
    model.eos_ids = []
    for row in made:
        expected = list(model.generate(ids[: row["prompt_length"]], 40, prompt_lookup=row["prompt_lookup"]))
        assert row["tokens"] == expected and row["seconds"] > 0
        assert row["calls"] == 39 if not row["prompt_lookup"] else row["calls"] <= 39
    # A model of random weights soon repeats itself.
    assert min(row["calls"] for row in made) < 39


def test_bad_requests_are_one_line(kernel_pte: Path, pte_directory: Path, tokens: Path, tmp_path: Path):
    runner, good = [build_runner()], request(kernel_pte, tokens)

    def message(*arguments: str) -> str:
        (event,) = run(runner, *arguments)
        return event["message"]

    assert message() == "--model, --tokens and --prompt-lengths are needed"
    assert "--speed is no option" in message("--speed", "1")
    assert "--threads 0 is no whole number from 1 on" in message(*good, "--threads", "0")
    assert "--generate -1 is no whole number" in message(*good, "--generate", "-1")
    assert "a context of 64 tokens and 70 are needed" in message(*good, "--generate", "50")
    assert "tokens.txt has 48 tokens and 63 are needed" in message(*good, "--prompt-lengths", "60")
    many = tmp_path / "many.txt"
    many.write_text("5 " * 80)
    assert "a context of 64 tokens and 73 are needed" in message(
        *good, "--tokens", str(many), "--prompt-lengths", "70"
    )
    many.write_text("5 six 7")
    assert "holds something that is no token id" in message(*good, "--tokens", str(many))
    assert "no-such.pte" in message(*good, "--model", "no-such.pte")
    # Of the stock runtime's own operators those that need libtorch are not in the runner.
    assert "an operator of the program is not in this binary" in message(
        *good, "--model", str(pte_directory / "model.pte")
    )


def talk(runner: list, directory: Path, lines: list[str], new_tokens: int) -> str:
    """What the runner prints as answers to lines, in a conversation of its own."""
    files = ["--model", directory / "model.pte", "--tokenizer", directory / "tokenizer.json"]
    options = ["--chat", "--new-tokens", str(new_tokens), "--threads", "2"]
    text = "".join(f"{line}\n" for line in lines).encode()
    result = subprocess.run([*runner, *files, *options], input=text, capture_output=True)
    assert result.returncode == 0, result.stdout
    return result.stdout.decode(errors="replace")


def answers(directory: Path, lines: list[str], new_tokens: int) -> str:
    """The same in Python: each answer to the tokens of the whole conversation, with those that the model chose."""
    from mobilemoe.runtime import PteModel

    model, text = PteModel(directory), ""
    tokens = [model.tokenizer.bos_token_id]
    for line in lines:
        turn = f"<|header_start|>user<|header_end|>\n\n{line}<|eot|><|header_start|>assistant<|header_end|>\n\n"
        tokens += model.tokenizer(turn, add_special_tokens=False).input_ids
        chosen = list(model.generate(tokens, new_tokens))
        assert chosen
        tokens += [*chosen, *model.tokenizer("<|eot|>", add_special_tokens=False).input_ids]
        text += f"{model.decode(chosen)}\n"
    assert len(tokens) <= model.max_seq_len
    return text


def test_a_conversation_in_text(kernel_pte: Path, tmp_path: Path):
    lines = ["Hi", "\u4f60!"]
    assert talk([build_runner()], kernel_pte, lines, 8) == answers(kernel_pte, lines, 8)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    (event,) = run([build_runner(), "--model", kernel_pte / "model.pte"], "--tokenizer", str(broken), "--chat")
    assert event["message"] == f"{broken}: no JSON at byte 1"


@pytest.mark.slow
def test_a_conversation_in_text_in_arm_code(arm_runner: list[str], chat_pte: Path):
    """Three turns with an empty root: tokenizer, cache and computation are the runner's."""
    lines = ["What is a walk?", "And 1234 pars\u00e9rs?", "\U0001f44d\u4f60"]
    assert talk(arm_runner, chat_pte, lines, 20) == answers(chat_pte, lines, 20)


@pytest.mark.slow
def test_arm_runner_computes_the_same_under_emulation(arm_runner: list[str], kernel_pte: Path, tokens: Path):
    events = run(arm_runner, *request(kernel_pte, tokens))
    assert events[0]["isa"] in ("neon", "i8mm")
    check_report(events, kernel_pte, tokens)
