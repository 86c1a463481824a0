"""`mobilemoe chat --device adb`: the answers are those of this machine; cache and computation are on the device."""

import io
import math
import os
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from device_daemon import Device, connect

from mobilemoe.cli import main
from mobilemoe.device.model import DeviceModel
from mobilemoe.runtime import PteModel


PLACE = "data/local/tmp/mobilemoe"


@pytest.fixture
def model(phone: Device, chat_pte: Path, stub_bundle: Path):
    model = DeviceModel(chat_pte, "adb")
    yield model
    model._finish()


@pytest.fixture
def chat(chat_pte: Path, capsys, monkeypatch):
    def run(*arguments: str, turns: list[str]) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{turn}\n" for turn in turns)))
        main(["chat", "--model", str(chat_pte), "--max-new-tokens", "20", *arguments])
        return capsys.readouterr()

    return run


def left_behind(phone: Device) -> list[str]:
    root = phone.root / PLACE
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) if root.exists() else []


def test_three_turns_are_those_of_this_machine(phone: Device, stub_bundle: Path, chat):
    turns = ["What is a walk?", "And a parser?", "/reset", "What is a walk?", "/stats"]
    here, there = chat(turns=turns), chat("--device", "adb", turns=turns)
    assert here.out == there.out and len(here.out.splitlines()) >= 3
    (start,) = (line for line in phone.commands if " --serve " in line)
    assert start.endswith("--cores 0,1")
    # Tokens in the cache, of the last answer: nothing is new but the last token.
    assert [line.split() for line in here.err.splitlines() if "cached" in line] == [
        line.split() for line in there.err.splitlines() if "cached" in line
    ]
    assert not (phone.root / PLACE).exists()


@pytest.mark.slow
def test_a_conversation_in_arm_code(phone: Device, arm_bundle: Path, emulator: list[str], chat):
    phone.emulator = emulator
    turns = ["What is a walk?", "And a parser?", "What is a walk?"]
    assert chat("--device", "adb", turns=turns).out == chat(turns=turns).out
    assert not (phone.root / PLACE).exists()


@pytest.mark.parametrize("lookup", [None, False])
def test_every_token_and_the_cache(model: DeviceModel, chat_pte: Path, lookup: bool | None):
    here = PteModel(chat_pte)
    prompt = here.encode("import os\nimport sys\nimport os\n")
    for new_tokens in (1, 30, 90):
        expected = list(here.generate(prompt, new_tokens, prompt_lookup=lookup))
        assert list(model.generate(prompt, new_tokens, prompt_lookup=lookup)) == expected
        read = len(prompt) + len(expected)
        prompt = [*prompt, *expected, *here.encode("import")]
        assert model.num_cached(prompt) == here.num_cached(prompt) >= read - 1
    # Up to the end of the context, and with another beginning.
    long = (here.encode("def f(x):\n    return x\n") * 40)[: here.max_seq_len - 3]
    assert model.num_cached(long) == here.num_cached(long) <= 1
    expected = list(here.generate(long, 50))
    assert list(model.generate(long, 50)) == expected and len(expected) <= 4
    assert list(model.generate(long[:-1], 0)) == []


def test_an_answer_that_is_not_wanted_to_its_end(model: DeviceModel, chat_pte: Path):
    here = PteModel(chat_pte)
    prompt = here.encode("import os")
    whole = list(here.generate(prompt, 100))
    answer = model.generate(prompt, 100)
    assert [next(answer) for _ in range(3)] == whole[:3]
    answer.close()
    # The runner may have been ahead.
    assert len(prompt) + 2 <= model.num_cached([*prompt, *whole]) < len(prompt) + len(whole)
    assert list(model.generate(prompt, 100)) == whole


def test_sampled_tokens_follow_the_probabilities(model: DeviceModel, chat_pte: Path):
    prompt = model.encode("import os\n")
    probabilities = (PteModel(chat_pte).forward(prompt, 0).double() / 1.5).softmax(dim=-1)
    draws = 600

    def drawn(count: int, **options: float) -> Counter:
        """`None` is the end of the text."""
        answers = (model.generate(prompt, 1, temperature=1.5, seed=seed, **options) for seed in range(count))
        return Counter(next(answer, None) for answer in answers)

    counts = drawn(draws)
    for token in set(probabilities.topk(5).indices.tolist()) - set(model.eos_ids):
        share = probabilities[token].item()
        assert abs(counts[token] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)
    assert drawn(20) == drawn(20)
    # Of the smallest set that has this probability.
    ranked, order = probabilities.sort(descending=True)
    kept = order[ranked.cumsum(dim=-1) - ranked < 0.5].tolist()
    assert 1 < len(kept) < 100 and set(drawn(50, top_p=0.5)) - {None} <= set(kept)
    assert set(drawn(10, top_p=1e-6)) == {kept[0]}
    assert len({tuple(model.generate(prompt, 8, temperature=1.5)) for _ in range(5)}) > 1


def test_what_cannot_be_answered(model: DeviceModel):
    for tokens in ([], [3] * (model.max_seq_len + 1)):
        with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, and the context is 1 to {model.max_seq_len}"):
            next(model.generate(tokens, 1))
    with pytest.raises(ValueError, match="cannot be sampled with"):
        next(model.generate([3], 1, top_p=0.0))
    with pytest.raises(OSError, match="The runner failed on .*: token 99999 is not in the vocabulary"):
        next(model.generate([99999], 1))
    with pytest.raises(OSError, match="the conversation failed on .* with status 1"):
        next(model.generate([3], 1))


def test_the_cable_is_pulled(phone: Device, model: DeviceModel, chat_pte: Path):
    answer = model.generate(model.encode("import os"), 200)
    next(answer)
    answer.close()
    phone.pull_cable()
    with pytest.raises(OSError, match="is gone during the conversation. Connect it and run the same command again"):
        list(model.generate(model.encode("import os"), 200))
    model._finish()
    assert f"{chat_pte.name}/model.pte" in left_behind(phone)
    phone.plug_in()
    connect(phone)
    phone.pushed = []
    # The same command resumes, and leaves nothing.
    again = DeviceModel(chat_pte, "adb")
    assert phone.pushed == [] and next(again.generate(again.encode("import os"), 1)) is not None
    again._finish()
    assert left_behind(phone) == []


def test_kept_models_stay_and_the_rest_goes(phone: Device, chat_pte: Path, stub_bundle: Path, chat, monkeypatch):
    bench = ["bench", "--device", "adb", "--model", str(chat_pte), "--prompt-lengths", "8", "--repeats", "1", "--json"]
    main([*bench, "--keep"])
    kept = left_behind(phone)
    assert f"{chat_pte.name}/model.pte" in kept
    phone.pushed = []
    chat("--device", "adb", turns=["What is a walk?"])
    assert phone.pushed == [] and left_behind(phone) == kept
    main(bench)
    assert left_behind(phone) == []


def test_one_command_at_a_time(phone: Device, model: DeviceModel, chat_pte: Path):
    """A conversation holds the phone; what ended holds it no longer, whether or not it could say so."""
    bench = ["bench", "--device", "adb", "--model", str(chat_pte), "--prompt-lengths", "8", "--repeats", "1", "--json"]
    before, used = (
        left_behind(phone),
        rf"is in use by process {os.getpid()} on \S+, since 20\S+Z. Wait for its end, or",
    )
    with pytest.raises(SystemExit, match=used):
        main(bench)
    with pytest.raises(ValueError, match=used):
        DeviceModel(chat_pte, "adb")
    assert left_behind(phone) == before and next(model.generate(model.encode("import os"), 1)) is not None
    model._finish()
    lock = phone.root / f"{PLACE}.lock"
    assert not lock.is_symlink() and left_behind(phone) == []
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    for owner, why in (
        (f"elsewhere {ended.pid} 2026-01-01T00:00:00Z 0", f"process {ended.pid} on elsewhere, since 2026"),
        (f"{socket.gethostname()} {os.getppid()} 2026-01-01T00:00:00Z 0", f"process {os.getppid()} on"),
        ("something", "by something. Wait"),
    ):
        lock.symlink_to(owner)
        with pytest.raises(SystemExit, match=f"in use by .*{why}|in use {why}"):
            main(bench)
        assert os.readlink(lock) == owner
        lock.unlink()
    lock.symlink_to(f"{socket.gethostname()} {ended.pid} 2026-01-01T00:00:00Z 0")
    main(bench)
    assert not lock.is_symlink() and left_behind(phone) == []


def test_requests_that_need_no_device(text_checkpoint: Path, pte_directory: Path, chat_pte: Path, tmp_path: Path):
    def refused(model: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["run", "--prompt", "a", "--device", "adb", "--model", str(model), *arguments])
        return str(ended.value)

    assert "holds no program: a device runs a .pte. Export one: mobilemoe export" in refused(text_checkpoint)
    assert "which our runner lacks. Export it again with --moe-op mobilemoe" in refused(pte_directory)
    assert "need the probabilities of all tokens, which adb does not send" in refused(chat_pte, "--regex", "a+")
