"""
The apps of examples/android and examples/ios: their conversation, as ExecuTorch's LLM runner holds it on this machine.

Neither app is built here: no Android SDK, no Xcode.
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT


KOTLIN = ROOT / "examples/android/src/main/kotlin/mobilemoe/chat/Conversation.kt"
SWIFT = ROOT / "examples/ios/Conversation.swift"


def markers(path: Path) -> dict[str, str]:
    """The parts of the chat format in an app's source, by names without case and underscores."""
    found = re.findall(r'^private \w+(?: val)? (\w+) = "(<\|.+)"$', path.read_text(), re.MULTILINE)
    return {name.replace("_", "").lower(): text.replace(r"\n", "\n") for name, text in found}


def test_both_apps_write_the_released_format(chat_tokenizer):
    parts = markers(KOTLIN)
    assert len(parts) == 5 and parts == markers(SWIFT)
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join([prompt(parts, "One", True), "two", prompt(parts, "three", False)]) == rendered
    assert chat_tokenizer.convert_tokens_to_ids([parts["endoftext"], parts["endofturn"]]) == [497, 504]


def prompt(parts: dict[str, str], text: str, begins: bool) -> str:
    """As both apps send it to the runner."""
    start = parts["begin" if begins else "endofturn"]
    return start + parts["user"] + text + parts["endofturn"] + parts["assistant"]


def test_three_turns_in_the_stock_runner(pte_directory: Path):
    """What the apps send, in the runner that both wrap, gives the tokens of a program that reads the whole text."""
    pytest.importorskip("executorch.runtime", reason="executorch is not installed: make setup")
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    from mobilemoe.runtime import PteModel

    model, parts = PteModel(pte_directory), markers(KOTLIN)
    runner = TextLLMRunner(*(str(pte_directory / name) for name in ("model.pte", "tokenizer.json")))

    def answer(text: str, begins: bool, limit: int) -> tuple[str, int]:
        pieces, stats = [], []
        config = GenerationConfig(echo=False, temperature=0.0, max_new_tokens=limit)
        runner.generate(prompt(parts, text, begins), config, pieces.append, stats.append)
        return "".join(pieces), stats[0].num_prompt_tokens

    tokens: list[int] = []
    for turn, text in enumerate(("Hi", "Why", "So")):
        new = model.tokenizer(prompt(parts, text, turn == 0), add_special_tokens=False).input_ids
        tokens += new
        chosen = list(model.generate(tokens, 4))
        assert answer(text, turn == 0, 4) == (model.decode(chosen), len(new))
        # The runner has not run the last one.
        tokens += chosen[:-1]
    # The context is full, as the apps expect it: an error, and after a reset the conversation begins anew.
    with pytest.raises(RuntimeError):
        for _ in range(4):
            answer("And", False, -1)
    runner.reset()
    tokens = model.tokenizer(prompt(parts, "Hi", True), add_special_tokens=False).input_ids
    assert answer("Hi", True, 4)[0] == model.decode(list(model.generate(tokens, 4)))


def test_the_app_uses_the_release_that_exports():
    """A program is for one release of ExecuTorch, with its operators."""
    pytest.importorskip("executorch.runtime", reason="executorch is not installed: make setup")
    (release,) = re.findall(
        r"org\.pytorch:executorch-android:([\d.]+)", (ROOT / "examples/android/build.gradle.kts").read_text()
    )
    assert release == version("executorch").partition("+")[0]
