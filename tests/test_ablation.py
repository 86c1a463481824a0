"""The ablation: that its runs are pairs, what a point is, and that it resumes after its last run."""

import argparse
import inspect
import json
import math
import sys

import ablation
import ablation_data
import numpy as np
import pytest
import torch
from ablation_data import Text


# Text that counts upwards, so that a model can learn it.
ROWS = ablation_data.sequences((np.arange(140_000) % 500).astype(np.uint16))
TEXT = Text(ROWS, ROWS[:10], 2.5, "abc")
BUDGET = {
    "size": (32, 1), "tokens": (1024, 2048), "seeds": 3, "sizes": ((32, 1),), "tokens_per_parameter": (0.05, 0.1),
    "law_seeds": 1, "batch": 2, "train": 1, "heldout": 1, "device": "cpu",
}  # fmt: skip


def arm(expansion: int = 8, granularity: int = 2, shared: bool = False, **changes) -> dict:
    run = {"width": 32, "layers": 2, "expansion": expansion, "granularity": granularity, "shared": shared}
    return run | {"tokens": (1024, 2048), "seed": 0, "rate": 1.0} | changes


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the script on that text, and returns its last line and its points."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(ablation, "load_text", lambda *arguments: TEXT)
    monkeypatch.setattr(ablation, "BUDGETS", {"cpu": BUDGET})
    monkeypatch.setattr(ablation, "ARMS", ((1, 2, False), (8, 8, True)))
    monkeypatch.setattr(ablation, "EXPANSIONS", (1,))

    def run(*arguments: str) -> tuple[dict, list[dict]]:
        file = tmp_path / "points.jsonl"
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", str(file), *arguments])
        ablation.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1]), list(map(json.loads, file.open()))

    return run


def test_arms_start_from_the_same_values_and_have_the_same_active_parameters():
    models = {name: ablation.build_model(arm(*name)) for name in ablation.ARMS}
    dense = models[1, 2, False]
    # 3 H^2 of attention in each layer, a dense feed-forward network of 4 H, and the embedding.
    expected = 512 * 32 + 2 * (3 * 32 * 32 + 3 * 32 * 128)
    for name, model in models.items():
        counts = ablation.count_parameters(arm(*name))
        routers = counts["router_parameters"]
        biases = sum(layer.feed_forward.expert_bias.numel() for layer in model.model.layers)
        assert counts["total_parameters"] == sum(weight.numel() for weight in model.parameters()) + biases
        assert routers == sum(layer.feed_forward.router.weight.numel() for layer in model.model.layers)
        assert counts["active_parameters"] - routers == expected
        assert counts["embedding_parameters"] == 512 * 32
        torch.testing.assert_close(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
        for layer, other in zip(model.model.layers, dense.model.layers, strict=True):
            torch.testing.assert_close(layer.self_attn.k_proj.weight, other.self_attn.k_proj.weight)
            router, same = layer.feed_forward.router.weight, other.feed_forward.router.weight
            torch.testing.assert_close(router[: len(same)], same)
            # The wide network, from the shared expert on, has the dense one as its first rows.
            feed_forward = layer.feed_forward
            wide = feed_forward.experts.gate_up_proj.transpose(1, 2).unflatten(1, (2, -1))[:, 0].flatten(0, 1)
            down = feed_forward.experts.down_proj.flatten(0, 1)
            if name[2]:
                wide = torch.cat([feed_forward.shared_expert.gate_proj.weight, wide])
                down = torch.cat([feed_forward.shared_expert.down_proj.weight.T, down])
            experts = other.feed_forward.experts
            first = experts.gate_up_proj.transpose(1, 2).unflatten(1, (2, -1))[:, 0].flatten(0, 1)
            torch.testing.assert_close(wide[: len(first)], first)
            torch.testing.assert_close(down[: len(first)], experts.down_proj.flatten(0, 1))
    other = ablation.build_model(arm(seed=1))
    assert not torch.equal(other.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_the_plan_is_the_one_of_the_document():
    runs = ablation.plan_runs(ablation.BUDGETS["cpu"])
    ids = [ablation.point_id(run, tokens) for run in runs for tokens in run["tokens"]]
    # An arm of the findings is in the grid of the law too, at other numbers of tokens.
    assert len(set(ids)) == len(ids)
    assert len(runs) == 7 * 24 + 4 * 6 * 2 + 4 * 2 * 2
    # Any beginning has whole pairs: all arms of a seed follow each other.
    assert [run["seed"] for run in runs[:14]] == [0] * 7 + [1] * 7
    ratios = {
        tokens / ablation.count_parameters(arm(1, width=64))["active_parameters"] for tokens in runs[56 + 23]["tokens"]
    }
    assert [round(ratio) for ratio in sorted(ratios)] == [20, 40, 80, 160]
    # No token twice.
    for name, budget in ablation.BUDGETS.items():
        assert max(max(run["tokens"]) for run in ablation.plan_runs(budget)) < budget["train"], name


def test_a_point_is_a_decayed_branch_of_the_trunk(monkeypatch):
    monkeypatch.setattr(ablation, "WARMUP", 10)
    run = arm(layers=1, expansion=2, tokens=(8192, 16384))
    first, second = ablation.train(run, TEXT, 2, "cpu")
    assert (first["tokens"], second["tokens"]) == (8192, 16384) and first["seconds"] < second["seconds"]
    assert second["loss"] < first["loss"] < math.log(512)
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2) / 2.5)
    # The branch leaves no trace: the run has the loss of one without it, to the last bit.
    (alone,) = ablation.train(run | {"tokens": (16384,)}, TEXT, 2, "cpu")
    assert alone["loss"] == second["loss"]
    # The rate falls to one step's share of the last fifth, and the trunk's is constant after the warm-up.
    training = ablation.Training(run, TEXT, 2, "cpu")
    training.step = 500
    training.train_to(505)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1.6e-2)
    training.train_to(515, 505)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1.6e-3)


def test_runs_of_a_seed_see_the_same_sequences():
    one, two = (ablation.Training(arm(*name, layers=1), TEXT, 2, "cpu") for name in ((1, 2, False), (8, 8, True)))
    other = ablation.Training(arm(layers=1, seed=1), TEXT, 2, "cpu")
    assert (one.order == two.order).all() and (one.order != other.order).any()
    assert sorted(one.order) == list(range(len(one.rows)))
    # Rows overlap by the one token that is a target in one and an input in the next.
    assert (one.rows[0] == np.arange(129)).all() and (one.rows[1] == np.arange(128, 257)).all()


def test_it_resumes_after_its_last_run(run, tmp_path, monkeypatch):
    train, trained = ablation.train, []

    def train_two(*arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arguments[0])
        return train(*arguments)

    file = tmp_path / "points.jsonl"
    monkeypatch.setattr(ablation, "train", train_two)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = file.read_text()
    assert len(first.splitlines()) == 4
    # Killed while it wrote.
    file.write_text(first + '{"width": 3')
    monkeypatch.setattr(ablation, "train", train)
    # Two parts have all runs between them.
    done, points = run("--part", "1/2")
    assert file.read_text().startswith(first) and done["runs_left"] == 0
    done, points = run("--part", "0/2")
    runs = ablation.plan_runs(BUDGET)
    assert {point["id"] for point in points} == {
        ablation.point_id(one, tokens) for one in runs for tokens in one["tokens"]
    }
    assert len(points) == done["points"] == 3 * 2 * 2 + 2 + 4
    before = file.read_text()
    assert run()[0]["runs_left"] == 0 and file.read_text() == before
    # A line that is missing is trained again, alone, with the same loss.
    file.write_text("".join(before.splitlines(keepends=True)[1:]))
    again = run()[1]
    assert len(again) == len(points) and again[-1]["id"] == points[0]["id"]
    assert again[-1]["loss"] == pytest.approx(points[0]["loss"], abs=1e-4)


def test_time_ends_the_runs(run):
    done, points = run("--hours", "1e-9")
    assert points == [] and done["runs_left"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "2/2"], "--part 2/2 is no share of the runs. Set 0/2 and 1/2"),
        (["--part", "half"], "--part half is no share"),
        (["--hours", "nan"], "--hours nan leaves no time"),
    ],
)
def test_bad_options_are_refused(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)


def test_other_text_is_refused(run, tmp_path):
    (tmp_path / "points.jsonl").write_text('{"text": "xyz"}\n')
    with pytest.raises(ValueError, match="runs on text xyz, and this machine's is abc.*Set another --output"):
        run()


def test_text_is_split_by_file_and_counts_its_bytes(tmp_path, monkeypatch):
    # 120 pieces of the standard library in place of a hundred megabytes.
    source = "".join(map(inspect.getsource, (argparse, inspect, json)))
    files = [tmp_path / f"piece{number}.py" for number in range(120)]
    for number, file in enumerate(files):
        file.write_text(source[2000 * (number % 100) :][:2000] + f"# {number % 110}")
    monkeypatch.setattr(ablation_data, "standard_library_files", lambda: [("copy.py", files[0].read_text())])
    monkeypatch.setattr(ablation_data, "package_files", lambda: [(path.name, path) for path in files])
    text = ablation_data.load_text(tmp_path, 50_000, 1024)
    assert text.train.shape == (50_000 // 128, 129) and text.heldout.shape == (8, 129)
    # The held-out rows are spread over the held-out tokens, from the first to the last.
    rows = ablation_data.sequences(np.load(tmp_path / "heldout-50000.npy"))
    assert (text.heldout[0] == rows[0]).all() and (text.heldout[-1] == rows[-1]).all() and len(rows) > 16
    assert 1.5 < text.bytes_per_token < 4
    parts = ablation_data.sources(1e9)
    assert len(parts["train"]) + len(parts["heldout"]) == len({path.read_text() for path in files})
    again = ablation_data.load_text(tmp_path, 50_000, 1024)
    assert again.digest == text.digest and (again.heldout == text.heldout).all()
    with pytest.raises(ValueError, match="held-out tokens of Python source, but the runs need 50,000 and 10,000,000"):
        ablation_data.load_text(tmp_path, 50_000, 10_000_000)
