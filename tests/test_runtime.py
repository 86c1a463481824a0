"""Running a `.pte` and a checkpoint from Python."""

import json
import shutil
import sys

import pytest
import torch

from mobilemoe import lookup
from mobilemoe.cli import main
from mobilemoe.lookup import VerificationTimes
from mobilemoe.runtime import CheckpointModel, PteModel, check_operators


@pytest.fixture(scope="module")
def pte(pte_directory):
    return PteModel(pte_directory)


@pytest.fixture(scope="module")
def kernels_pte(kernel_pte):
    return PteModel(kernel_pte)


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


def test_few_tokens_have_the_logits_of_single_ones(kernels_pte):
    tokens = kernels_pte.encode("def walk(steps):\n    return steps")
    expected = torch.stack([kernels_pte.forward([token], position) for position, token in enumerate(tokens)])
    for length in range(1, len(tokens) + 1):
        assert torch.equal(kernels_pte.last_logits(tokens[-length:], len(tokens) - length, length), expected[-length:])
    assert torch.equal(kernels_pte.forward(tokens, 0), expected[-1])


@pytest.fixture
def count_run(monkeypatch):
    """Tokens that a model ran since the last call."""

    def watch(model):
        run, forward = [], model._forward

        def counted(tokens, start, num_positions):
            run.append(len(tokens))
            return forward(tokens, start, num_positions)

        def taken() -> int:
            total = sum(run)
            run.clear()
            return total

        monkeypatch.setattr(model, "_forward", counted)
        model.reset()
        return taken

    return watch


@pytest.mark.parametrize("model", ["kernels_pte", "pte", "checkpoint"])
def test_the_next_turn_runs_what_is_new(model, request, count_run):
    model = request.getfixturevalue(model)
    taken = count_run(model)
    first = model.encode("import os\nimport sys\n")
    answer = list(model.generate(first, 12, prompt_lookup=False))
    # The last token of the answer has not run.
    assert taken() == len(first) + len(answer) - 1
    second = [*first, *answer, *model.encode("def")]
    continued = list(model.generate(second, 8, prompt_lookup=False))
    assert taken() == len(second) - (len(first) + len(answer) - 1) + len(continued) - 1
    # The cache holds all of a prompt: its last token runs again.
    assert list(model.generate(second, 1)) == continued[:1] and taken() == 1
    # A sequence that differs in the middle, and one that the cached one continues.
    changed = [*first, 300, *second[len(first) + 1 :]]
    other = list(model.generate(changed, 1))
    assert taken() == len(changed) - len(first)
    assert list(model.generate(first, 1)) == answer[:1] and taken() == 1
    for prompt, expected in ((second, continued), (changed, other)):
        model.reset()
        assert list(model.generate(prompt, len(expected), prompt_lookup=False)) == expected
        assert taken() == len(prompt) + len(expected) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_in_alternation_are_those_of_one_after_the_other(kernels_pte, temperature):
    prompts = [kernels_pte.encode(text) for text in ("import os\n" * 3, "import os\nreturn x\nreturn y\nreturn")]
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 1}
    expected = [list(kernels_pte.generate(prompt, **options)) for prompt in prompts]
    assert list(zip(*(kernels_pte.generate(prompt, **options) for prompt in prompts), strict=True)) == list(
        zip(*expected, strict=True)
    )


@pytest.mark.parametrize("model", ["kernels_pte", "checkpoint"])
def test_after_an_interrupted_call_all_runs_again(model, request, count_run, monkeypatch):
    model = request.getfixturevalue(model)
    taken = count_run(model)
    prompt = model.encode("import os\nimport sys\n")
    expected = list(model.generate(prompt, 12, prompt_lookup=False))
    longer = [*prompt, *expected, *[300] * 12]
    expected_longer = list(model.generate(longer, 4, prompt_lookup=False))
    taken()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        if isinstance(model, PteModel):
            # After the first of two calls.
            execute = model._execute
            broken.setattr(
                model, "_execute", lambda tokens, start: execute(tokens, start) if start == 0 else interrupt()
            )
            with pytest.raises(KeyboardInterrupt):
                model.last_logits(longer, 0, 4)
        else:
            # After the cache of the first layer has grown.
            hook = model.model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(model.generate([*prompt, *expected], 4))
            hook.remove()
    taken()
    with pytest.raises(ValueError, match="Position 5 cannot be run: the cache holds 0 tokens"):
        model.forward([3], 5)
    assert list(model.generate(longer, 4, prompt_lookup=False)) == expected_longer
    assert taken() == len(longer) + len(expected_longer) - 1
    # A call that is refused before it runs costs nothing.
    with pytest.raises(ValueError, match="exceed the context"):
        next(model.generate([*longer, *[3] * model.max_seq_len], 1))
    list(model.generate(longer, 1))
    assert taken() == 1


class Drafting:
    """A model that drafts wherever a single token has occurred before, however few drafts it accepts."""

    def __init__(self, model, monkeypatch):
        # Positions whose logits every call returns.
        self.rows: list[int] = []
        forward = model._forward

        def recorded(tokens, start, num_positions):
            self.rows.append(num_positions)
            return forward(tokens, start, num_positions)

        monkeypatch.setattr(model, "_forward", recorded)
        monkeypatch.setattr(lookup, "NGRAM_LENGTHS", (2, 1))
        monkeypatch.setattr(VerificationTimes, "best_length", lambda times, acceptance, longest: longest)

    def generate(self, model, *arguments, **options) -> list[int]:
        self.rows.clear()
        return list(model.generate(*arguments, **options))


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_prompt_lookup_writes_the_same(kernels_pte, temperature, monkeypatch):
    """With right drafts and wrong ones, up to the end of the context, of the tokens, or of the text."""
    assert kernels_pte.is_exact
    drafting = Drafting(kernels_pte, monkeypatch)
    for prompt in ("import os\n" * 3, "return x\nreturn y\nreturn", "def a(b):\n    return b\n"):
        ids = kernels_pte.encode(prompt)
        for seed, max_new_tokens in enumerate((1, 2, 9, 80)):
            options = {"temperature": temperature, "seed": seed}
            expected = drafting.generate(kernels_pte, ids, max_new_tokens, prompt_lookup=False, **options)
            assert set(drafting.rows) == {1}
            assert drafting.generate(kernels_pte, ids, max_new_tokens, **options) == expected
            assert max_new_tokens < 80 or max(drafting.rows) > 1
            # Greedy text of so small a model repeats itself.
            assert max_new_tokens < 80 or temperature > 0 or len(drafting.rows) < 0.7 * len(expected)
        with monkeypatch.context() as ending:
            # An end in the middle of drafts.
            ending.setattr(kernels_pte, "eos_ids", [expected[-2]])
            assert drafting.generate(kernels_pte, ids, 80, **options) == expected[: expected.index(expected[-2])]


def test_prompt_lookup_in_a_checkpoint_overwrites_what_it_did_not_accept(checkpoint, monkeypatch):
    assert not checkpoint.is_exact
    drafting = Drafting(checkpoint, monkeypatch)
    ids = checkpoint.encode("import os\n" * 3)
    for temperature in (0.0, 1.0):
        expected = drafting.generate(checkpoint, ids, 40, temperature, seed=3)
        assert set(drafting.rows) == {1}
        assert drafting.generate(checkpoint, ids, 40, temperature, seed=3, prompt_lookup=True) == expected
        assert max(drafting.rows) > 1


def test_prompt_lookup_needs_logits_of_several_positions(pte):
    with pytest.raises(ValueError, match="returns those of the last one. Export it again with --moe-op mobilemoe"):
        next(pte.generate([3], 4, prompt_lookup=True))


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
    assert len({tuple(checkpoint.generate(tokens, 12, temperature=1.0)) for _ in range(3)}) > 1


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


@pytest.mark.parametrize("model", ["pte", "kernels_pte", "checkpoint"])
def test_ids_outside_the_vocabulary_are_named(model, request):
    model = request.getfixturevalue(model)
    for token in (-1, 512, 2**40):
        with pytest.raises(ValueError, match=f"{token}.* vocabulary.* 0 to 511"):
            model.forward([3, token], 0)


def test_a_program_without_a_tokenizer_runs_ids_and_says_what_is_missing(pte_directory, tmp_path):
    path = shutil.copytree(pte_directory, tmp_path / "pte")
    (path / "tokenizer.json").unlink()
    model = PteModel(path)
    assert model.forward([3], 0).isfinite().all()
    with pytest.raises(ValueError, match="has no tokenizer.json, so it reads and writes token ids and no text"):
        model.encode("text")


def test_a_random_file_of_the_right_size_is_named(pte_directory, tmp_path):
    path = shutil.copytree(pte_directory, tmp_path / "pte")
    content = bytearray((path / "model.pte").read_bytes())
    for at in (len(content) - 9, 60):
        content[at] ^= 0xFF
        (path / "model.pte").write_bytes(content)
        with pytest.raises(ValueError, match="model.pte is not what was exported"):
            PteModel(path)
    (path / "model.pte").write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="is no program for ExecuTorch"):
        PteModel(path)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_end_the_generation(checkpoint, sampling, value, monkeypatch):
    rows = torch.zeros(1, 512)
    rows[0, 5:] = value
    rows[0, :5] = value if value < 0 else 0
    monkeypatch.setattr(checkpoint, "sequence_logits", lambda *_: rows)
    with pytest.raises(ValueError, match=f"largest logit is {value}, so no token can be chosen"):
        next(checkpoint.generate([3], 1, **sampling))


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


def test_a_temperature_near_0_is_greedy(pte):
    tokens = pte.encode("def walk(steps):")
    greedy = list(pte.generate(tokens, 8))
    for temperature in (1e-40, 1e-320):
        assert list(pte.generate(tokens, 8, temperature=temperature)) == greedy


def test_narrow_nucleus_is_greedy(pte):
    tokens = pte.encode("import os")
    assert list(pte.generate(tokens, 8, temperature=1.0, top_p=1e-6, seed=3)) == list(pte.generate(tokens, 8))


@pytest.mark.parametrize(
    "sampling", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_draws_that_are_none_are_refused(pte, sampling):
    with pytest.raises(ValueError, match="cannot be sampled with"):
        next(pte.generate([3], 4, **sampling))
