"""The report of the ablation on points whose law and effects are known."""

import json
import math
import sys
from pathlib import Path

import ablation
import ablation_laws
import ablation_report
import numpy as np
import pytest
from scipy import stats

from mobilemoe.plan.law import ScalingLaw


LAW = ScalingLaw(
    A=0.5, delta=-0.1, alpha=-0.3, gamma=0.02, B=0.8, omega=0.05, beta=-0.35, zeta=-0.02, c=1.2, rmse=0.0, unit=1e6
)
# Of granularity 8 against 2, and of a shared expert.
FINE, SHARED = -0.02, 0.001


def points_of(noise: float, seeds: int = 24, seed: int = 0) -> list[dict]:
    """What the runs of the plan would be if the law held, with a loss common to a seed and one of each run."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.05, 24)
    points = []
    for run in ablation.plan_runs(ablation.BUDGETS["cpu"]):
        for tokens in run["tokens"]:
            counts = ablation.count_parameters(run)
            loss = float(LAW.loss(counts["active_parameters"], tokens, run["expansion"]))
            loss += FINE * math.log(run["granularity"] / 2) / math.log(4) + SHARED * run["shared"]
            if run["tokens"] == (2**20, 2**21):
                loss += common[run["seed"]]
            loss += generator.normal(0, noise) + 0.01 * abs(math.log2(run["rate"]))
            points.append(
                {"id": ablation.point_id(run, tokens)}
                | run
                | counts
                | {"tokens": tokens, "text": "abc", "loss": loss, "bits_per_byte": loss / math.log(2) / 2.2}
            )
    return [point for point in points if point["seed"] < seeds]


@pytest.fixture(scope="module")
def grid() -> list[dict]:
    points = points_of(0.003)
    return [point for point in points if point["tokens"] not in (2**20, 2**21) and point["rate"] == 1]


def test_intervals_are_of_pairs():
    points = ablation_report.findings_cell(points_of(0.004))
    assert {(point["width"], point["tokens"]) for point in points} == {(32, 2**21)}
    weights = {(8, 8, False): 1, (8, 2, False): -1}
    sums = ablation_report.paired(points, weights)
    assert len(sums) == 24
    # The loss of a seed, ten times the noise of a run, is in both arms.
    assert np.std(sums) == pytest.approx(0.004 * math.sqrt(2), rel=0.4)
    mean, half = ablation_report.interval(sums)
    expected = stats.t.interval(0.95, 23, np.mean(sums), stats.sem(sums))
    assert (mean - half, mean + half) == pytest.approx(expected)
    # A seed without one of the arms is in no pair.
    points = [p for p in points if not (p["seed"] == 3 and p["granularity"] == 8)]
    assert len(ablation_report.paired(points, weights)) == 23
    assert ablation_report.interval([0.1]) == (0.1, math.inf)


def test_part_of_a_difference_is_due_to_the_routers():
    points = ablation_report.findings_cell(points_of(0.0))
    weights = {(8, 16, False): 1, (8, 8, False): -1}
    (difference,) = {round(value, 9) for value in ablation_report.paired(points, weights)}
    # Here the rest is the effect of granularity, one of two equal steps of its logarithm.
    part = ablation_report.router_part(points, weights, LAW)
    assert part < -0.01 and difference - part == pytest.approx(FINE / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("mean", "half", "sign", "verdict"),
    [(-2, 1, -1, "holds"), (2, 1, -1, "does not hold"), (2, 1, 1, "holds"), (0.5, 1, -1, "not resolved")],
)
def test_verdicts(mean, half, sign, verdict):
    assert ablation_report.judge(mean, half, sign) == verdict


def test_report_has_every_finding_and_its_pictures(tmp_path, monkeypatch, capsys):
    points = points_of(0.004)
    # The number of starts and of refits decides the time, not the content.
    monkeypatch.setattr(
        ablation_laws,
        "FORMS",
        {"Chinchilla on active parameters": ablation_laws.FORMS["Chinchilla on active parameters"]},
    )
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for number, file in enumerate(files):
        file.write_text("".join(json.dumps(point) + "\n" for point in points[number::2]))
    # Reported once.
    files[1].write_text(files[1].read_text() + json.dumps(points[0]) + "\n")
    arguments = ["ablation_report.py", *map(str, files), "--output", str(tmp_path / "r.md"), "--bootstrap", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    ablation_report.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = (tmp_path / "r.md").read_text()
    assert result["points"] == len(points) == len({point["id"] for point in points})
    verdicts = {claim[0]: [] for claim in result["findings"]}
    for claim, values in result["findings"].items():
        verdicts[claim[0]].append(values["verdict"])
        assert f"{values['mean']:+.4f} ± {values['half_width']:.4f}" in text
    assert verdicts["3"] == ["not resolved"] and verdicts["2"][0] == "holds" and verdicts["1"][0] == "holds"
    # The other learning rates were made worse by 0.01.
    assert "| 24 | 1 | 592,896 | 0.5 | +0.0" in text
    for name in ("findings", "compute"):
        assert f"(r_{name}.png)" in text and (tmp_path / f"r_{name}.png").stat().st_size > 15_000


@pytest.mark.slow
def test_the_form_of_the_truth_predicts_the_largest_width(grid):
    results = {(one.name, one.embeddings): one for one in ablation_laws.compare_forms(grid, bootstrap=2)}
    paper = results["paper (E_start 1, E_max 32)", True]
    assert paper.rmse == pytest.approx(0.003, rel=0.15) and paper.heldout < 0.006
    assert paper.heldout_interval[0] <= paper.heldout_interval[1] < 0.02
    # More parameters of the same form lose little, and forms without E lose much.
    assert results["Joint MoE, arXiv 2502.05172 (E_start, E_max fitted)", True].heldout < 0.01
    assert results["Chinchilla on active parameters", True].heldout > 10 * paper.heldout
    # Without the embedding, N is another variable.
    assert results["paper (E_start 1, E_max 32)", False].rmse > paper.rmse


def test_fit_of_a_form_without_noise_is_exact():
    columns = ablation_laws.columns_of(points_of(0.0, seeds=1), embeddings=True)
    form = ablation_laws.FORMS["Chinchilla on total parameters"]
    truth = np.array([0.3, -0.2, -0.5, -0.4, 0.4])
    columns["L"] = form.loss(truth, columns)
    assert ablation_laws.fit_form(form, columns) == pytest.approx(truth, abs=1e-3)


def test_runs_are_resampled_whole(grid):
    sample = ablation_laws.resampled(grid, np.random.default_rng(0))
    counts: dict[tuple, dict[int, int]] = {}
    for point in sample:
        run = counts.setdefault(ablation_laws.run_of(point), {})
        run[point["tokens"]] = run.get(point["tokens"], 0) + 1
    assert all(len(set(run.values())) == 1 for run in counts.values())
    assert any(min(run.values()) > 1 for run in counts.values())
    assert len(counts) < len({ablation_laws.run_of(point) for point in grid})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": math.nan}, "has the loss nan: it diverged.*Delete the line and run"),
        ({"text": "xyz"}, "The runs are on 2 texts .abc, xyz., whose losses do not compare. Give the runs of one."),
    ],
)
def test_bad_points_are_refused(change, message, tmp_path):
    points = points_of(0.004, seeds=2)
    points[5] |= change
    with pytest.raises(ValueError, match=message):
        ablation_report.report(points, tmp_path / "r.md")


def test_committed_report_is_that_of_the_committed_runs(tmp_path, monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    name = "Chinchilla on total parameters"
    # The laws take a minute.
    monkeypatch.setattr(ablation_laws, "FORMS", {name: ablation_laws.FORMS[name]})
    made, _ = ablation_report.report(ablation.read_points(docs / "ablation.jsonl"), tmp_path / "ablation.md", 1)
    committed = (docs / "ablation.md").read_text()
    assert committed.split("## Laws")[0] == made.split("## Laws")[0]
    (row,) = (line for line in made.splitlines() if line.startswith(f"| {name} | yes"))
    # Up to the interval, which has fewer refits.
    assert row.split("(")[0] in committed


def test_few_points_have_findings_and_no_law(tmp_path):
    with pytest.raises(ValueError, match="There is no complete run to report. Run"):
        ablation_report.report([], tmp_path / "r.md")
    points = [point for point in points_of(0.004, seeds=2) if point["width"] == 32 and point["rate"] == 1]
    text, result = ablation_report.report(points, tmp_path / "r.md")
    assert "None yet." in text and "at 1 widths" in text and "Add runs: 3 widths" in text
    assert len(result["findings"]) == 7
    text, result = ablation_report.report([p for p in points if p["seed"] == 0], tmp_path / "r.md")
    assert "not measured: fewer than two seeds" in text and result["findings"] == {}
