"""The ablation: what its runs have in common, that it goes on where it stopped, and what it concludes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mobilemoe.plan.law import PAPER_LAW


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ablation  # noqa: E402


SETTINGS = ["--sizes", "32x1", "--tokens", "2048", "--batch", "2", "--seeds", "0"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script on text that counts upwards, so that a model can learn it, and returns the last line as JSON."""
    text = {part: torch.arange(count) % 500 for part, count in (("train", 9000), ("heldout", 600))}
    monkeypatch.setattr(ablation, "load_tokens", lambda directory: text)
    monkeypatch.setattr(ablation, "EXPANSIONS", (1, 8))
    monkeypatch.setattr(ablation, "GRANULARITIES", (2, 8))

    def run(capsys, *arguments: str) -> dict:
        files = ["--output", str(tmp_path / "table.jsonl")]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *SETTINGS, *files, *arguments])
        ablation.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_arms_differ_in_their_axis_only():
    runs = ablation.plan_runs([(32, 2), (64, 2), (96, 2)], [1000, 2000], [0, 1])
    assert len({tuple(run.values()) for run in runs}) == len(runs)
    middle = [run for run in runs if run["width"] == 64 and run["tokens"] == 2000]
    assert len(middle) == 2 * 10 and len(runs) == 20 + 5 * 6
    for run in middle:
        model, counts = ablation.build_model(run)
        router = sum(layer.feed_forward.router.weight.numel() for layer in model.model.layers)
        total = sum(parameter.numel() for parameter in model.parameters())
        bias = sum(layer.feed_forward.expert_bias.numel() for layer in model.model.layers)
        assert counts["total_parameters"] == total + bias
        # 4 layers' worth of attention, a dense feed-forward of 4 x width, the embedding; the rest is the router's.
        dense = 512 * 64 + 2 * (3 * 64 * 64 + 3 * 64 * 256)
        assert counts["active_parameters"] - router == dense
        experts = 2 * 3 * 64 * 256 * run["expansion"]
        assert total - router == dense - 2 * 3 * 64 * 256 + experts + (2 * 2 + 1) * 64


def test_it_goes_on_where_it_stopped(run, capsys, tmp_path, monkeypatch):
    table = tmp_path / "table.jsonl"
    train, trained = ablation.train, []

    def train_two(arm, *arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arm)
        return train(arm, *arguments)

    monkeypatch.setattr(ablation, "train", train_two)
    with pytest.raises(KeyboardInterrupt):
        run(capsys)
    first = table.read_text()
    assert len(first.splitlines()) == 2
    # Killed while it wrote.
    table.write_text(first + '{"width": 3')
    monkeypatch.setattr(ablation, "train", train)
    result = run(capsys)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert table.read_text().startswith(first) and result["runs"] == len(rows) == 4
    assert [(row["expansion"], row["granularity"], row["shared"]) for row in rows] == [
        (1, 2, False),
        (8, 2, False),
        (8, 8, False),
        (8, 8, True),
    ]
    # They learned something, and not the same.
    assert all(row["loss"] < 6 for row in rows) and len({row["loss"] for row in rows}) == 4
    assert run(capsys, "--report")["runs"] == 4 and len(table.read_text().splitlines()) == 4


def test_a_repeated_run_gives_the_same_loss(run, capsys, tmp_path):
    run(capsys)
    first = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    (tmp_path / "table.jsonl").unlink()
    run(capsys)
    second = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    # Threads may sum in another order.
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], abs=1e-4)
    (tmp_path / "table.jsonl").unlink()
    run(capsys, "--seeds", "1")
    other = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert all(abs(one["loss"] - two["loss"]) > 1e-3 for one, two in zip(first, other, strict=True))


def row(expansion: int, seed: int, loss: float) -> dict:
    return {"expansion": expansion, "granularity": 2, "shared": False, "seed": seed, "loss": loss}


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        # Dense, then E = 8, by seed. Three pairs: the half width is 4.303 * sd / sqrt(3).
        (((3.0, 3.1, 3.2), (2.8, 2.9, 3.01)), "holds"),
        (((3.0, 3.1, 3.2), (3.2, 3.3, 3.41)), "does not hold"),
        (((3.0, 3.1, 3.2), (2.9, 3.3, 3.1)), "not resolved"),
        (((3.0,), (2.0,)), "not measured: fewer than two seeds"),
    ],
)
def test_verdicts(losses, verdict):
    rows = [
        row(expansion, seed, loss)
        for expansion, values in zip((1, 8), losses, strict=True)
        for seed, loss in enumerate(values)
    ]
    # Of another seed, and alone: it is in no pair.
    rows.append(row(1, 9, 99.0))
    measured = ablation.contrast(rows, ablation.FINDINGS[0][1])
    assert ablation.judge(measured) == verdict
    if verdict == "holds":
        assert measured == pytest.approx((-0.19666667, 4.303 * 0.0057735 / 3**0.5), rel=1e-3)


def test_committed_report_is_that_of_the_committed_table(capsys, tmp_path, monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    (tmp_path / "ablation.jsonl").write_text((docs / "ablation.jsonl").read_text())
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--report", "--output", str(tmp_path / "ablation.jsonl")])
    ablation.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["findings"]) == len(ablation.FINDINGS)
    committed, made = ((directory / "ablation.md").read_text() for directory in (docs, tmp_path))
    # Up to the law, whose fit may differ in a last digit between machines.
    assert committed.split("## The law")[0] == made.split("## The law")[0]


def test_a_full_grid_gives_a_law(tmp_path):
    law = PAPER_LAW
    rows = [
        {"width": width, "layers": 2, "expansion": expansion, "granularity": 2, "shared": False, "tokens": tokens}
        | {"seed": 0, "active_parameters": size, "total_parameters": size * expansion, "seconds": 1.0}
        | {"loss": float(law.loss(size, tokens, expansion))}
        for width, size in ((32, 3e8), (48, 5e8), (64, 9e8))
        for tokens in (1e11, 2e11, 5e11)
        for expansion in ablation.EXPANSIONS
    ]
    markdown, result = ablation.report(rows, 60, tmp_path / "table.jsonl")
    assert "54 of 60 runs" in markdown and (tmp_path / "table.png").stat().st_size > 20_000
    # In millions.
    assert result["law"]["c"][0] == pytest.approx(law.c, abs=0.01) and result["heldout_rmse"] < 1e-3
    assert result["law"]["A"][0] == pytest.approx(law.A * 1000**-law.alpha, rel=0.05)


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no complete run"):
        ablation.report([], 3, tmp_path / "table.jsonl")
