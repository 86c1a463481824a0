"""Running a `.pte` and a checkpoint from Python."""

import json
import shutil
import sys

import pytest
import torch

from mobilemoe.cli import main
from mobilemoe.runtime import CheckpointModel, PteModel, check_operators, nucleus


@pytest.fixture(scope="module")
def pte(pte_directory):
    return PteModel(pte_directory)


@pytest.fixture(scope="module")
def checkpoint(text_checkpoint):
    return CheckpointModel(text_checkpoint, dtype=torch.float32)


def test_last_logits_continue_behind_cached_tokens(pte):
    tokens = pte.encode("def walk(steps):\n    return steps")
    expected = pte.all_logits(tokens)
    pte.forward(tokens[:4], 0)
    torch.testing.assert_close(pte.last_logits(tokens[4:], 4, 3), expected[-3:], rtol=1e-4, atol=1e-4)
    # Other tokens overwrite what the cache held behind them.
    pte.last_logits([tokens[0]] * 6, 2, 1)
    torch.testing.assert_close(pte.last_logits(tokens[2:], 2, 2), expected[-2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["pte", "checkpoint"])
def test_context_ends_in_a_clear_error(model, request):
    model = request.getfixturevalue(model)
    tokens = [3] * model.max_seq_len
    model.forward(tokens, 0)
    with pytest.raises(ValueError, match=f"exceed the context of {model.max_seq_len} tokens"):
        model.forward([3], model.max_seq_len)
    with pytest.raises(ValueError, match="no tokens to run"):
        model.forward([], 0)
    # The token after the last position can be read, none after that.
    assert len(list(model.generate(tokens, 5))) <= 1


def test_greedy_generation_stops_at_end_ids(pte):
    tokens = pte.encode("import os")
    produced = list(pte.generate(tokens, 20))
    assert produced == list(pte.generate(tokens, 20))
    pte.eos_ids, eos_ids = [produced[3]], pte.eos_ids
    stopped = list(pte.generate(tokens, 20))
    pte.eos_ids = eos_ids
    assert stopped == produced[: produced.index(produced[3])]


def test_sampling_follows_the_seed(checkpoint):
    tokens = checkpoint.encode("import os")
    first = list(checkpoint.generate(tokens, 12, temperature=1.0, seed=1))
    assert first == list(checkpoint.generate(tokens, 12, temperature=1.0, seed=1))
    assert first != list(checkpoint.generate(tokens, 12, temperature=1.0, seed=2))


def test_run_command_streams_text(pte_directory, text_checkpoint, capsys):
    for directory in (pte_directory, text_checkpoint):
        main(["run", "--model", str(directory), "--prompt", "import os", "--max-new-tokens", "8", "--chat"])
        captured = capsys.readouterr()
        assert captured.out.strip()
        assert "tokens/s]" in captured.err


def test_a_character_of_several_tokens_is_yielded_whole(checkpoint):
    text = "caf\u00e9 \U0001f600."
    pieces = list(checkpoint.stream(checkpoint.encode(text)))
    assert "".join(pieces) == text and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_missing_extra_is_named(monkeypatch, pte_directory):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(SystemExit, match=r"executorch\.runtime is not installed\. pip install 'mobilemoe\[export\]'"):
        main(["run", "--model", str(pte_directory), "--prompt", "x"])


def test_chat_needs_a_template(checkpoint):
    template, checkpoint.tokenizer.chat_template = checkpoint.tokenizer.chat_template, None
    with pytest.raises(ValueError, match="no chat template"):
        checkpoint.encode("hello", chat=True)
    checkpoint.tokenizer.chat_template = template


def test_directory_without_a_program_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no model.pte"):
        PteModel(tmp_path)


def test_program_that_was_cut_off_is_named(pte_directory, tmp_path):
    broken = tmp_path / "pte"
    shutil.copytree(pte_directory, broken)
    (broken / "model.pte").write_bytes((broken / "model.pte").read_bytes()[:-1])
    with pytest.raises(ValueError, match="it is truncated or belongs to another export"):
        PteModel(broken)


def test_missing_operators_are_named(pte_directory, tmp_path):
    with pytest.raises(ValueError, match="needs mobilemoe::moe_ffn.out, which this ExecuTorch runtime lacks"):
        check_operators(["aten::add.out", "mobilemoe::moe_ffn.out"], {"aten::add.out"})
    broken = tmp_path / "pte"
    shutil.copytree(pte_directory, broken)
    report = json.loads((broken / "export.json").read_text())
    report["operators"].append("somewhere::else.out")
    (broken / "export.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="somewhere::else.out"):
        PteModel(broken)
    (broken / "export.json").unlink()
    with pytest.raises(ValueError, match="holds no export.json"):
        PteModel(broken)


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_sum():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    assert nucleus(probabilities, 1.0).tolist() == probabilities.tolist()
    for top_p, kept in ((0.5, [1]), (0.51, [1, 3]), (0.84, [1, 3]), (0.9, [1, 3, 0]), (1e-6, [1])):
        assert sorted(nucleus(probabilities, top_p).nonzero().flatten().tolist()) == sorted(kept)


def test_narrow_nucleus_is_greedy(pte):
    tokens = pte.encode("import os")
    assert list(pte.generate(tokens, 8, temperature=1.0, top_p=1e-6, seed=3)) == list(pte.generate(tokens, 8))


@pytest.mark.parametrize("sampling", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_draws_that_are_none_are_refused(pte, sampling):
    with pytest.raises(ValueError, match="cannot be sampled with"):
        next(pte.generate([3], 4, **sampling))
