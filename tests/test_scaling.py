"""The law against published values, and its fit against data whose law is known."""

import json
import sys

import numpy as np
import pytest

from mobilemoe.plan.fit import fit_law, heldout_error
from mobilemoe.plan.law import (
    COEFFICIENTS,
    COLUMNS,
    PAPER_GRID,
    PAPER_LAW,
    ScalingLaw,
    effective_experts,
)
from mobilemoe.plan.report import describe_fit, plot_fit
from mobilemoe.plan.table import read_table


EXPANSIONS = np.array(PAPER_GRID["expansion"])
TRUTH = {name: PAPER_LAW.__dict__[name] for name in COEFFICIENTS}


@pytest.fixture
def synthetic_table():
    import bench_law

    return bench_law.synthetic_table


# Values of the formula with Table A.2, worked out by hand from the same secondary source.
def test_effective_experts_of_the_paper():
    assert effective_experts(EXPANSIONS) == pytest.approx([1.000, 1.911, 3.581, 6.421, 10.681, 16.008], abs=5e-4)
    with pytest.raises(ValueError, match="expansion=0.5 is below that of a dense model"):
        effective_experts(0.5)


@pytest.mark.parametrize(
    ("size", "losses"),
    [
        (0.3e9, (2.391, 2.356, 2.345, 2.346, 2.350, 2.355)),
        (0.5e9, (2.346, 2.313, 2.305, 2.309, 2.315, 2.323)),
        (0.9e9, (2.301, 2.270, 2.265, 2.270, 2.279, 2.289)),
    ],
)
def test_losses_of_the_paper_at_500_billion_tokens(size, losses):
    # Half a unit of the last digit given, and as much for a 5 that rounds either way.
    assert PAPER_LAW.loss(size, 500e9, EXPANSIONS) == pytest.approx(losses, abs=6e-4)


def test_the_best_expansion_and_its_move_with_fewer_tokens():
    for size in PAPER_GRID["active_parameters"]:
        many = PAPER_LAW.loss(size, 500e9, EXPANSIONS)
        few = PAPER_LAW.loss(size, 100e9, EXPANSIONS)
        assert EXPANSIONS[many.argmin()] in (4, 8)
        assert EXPANSIONS[few.argmin()] > EXPANSIONS[many.argmin()]
        assert few[list(EXPANSIONS).index(16)] - few.min() < 0.002
        # "E = 32 regresses": above 4 and 8 at the most tokens.
        assert many[-1] > max(many[2:4])


def test_dense_is_chinchilla():
    # Equation 3 at E = 1, where ln Ê is zero.
    n, d = 0.7, 250
    expected = 0.2388 * n**-0.2833 + 0.6019 * d**-0.3210 + 1.9730
    assert PAPER_LAW.loss(n * 1e9, d * 1e9, 1) == pytest.approx(expected, rel=1e-12)


def test_law_refuses_what_has_no_loss_and_names_what_it_extrapolates():
    for arguments in ((-1, 1e9, 1), (1e9, 0, 1)):
        with pytest.raises(ValueError, match="has no loss. Set a positive count"):
            PAPER_LAW.loss(*arguments)
    assert PAPER_LAW.outside(272e6, 500e9, 8) == []
    assert [text.split()[0] for text in PAPER_LAW.outside(3e9, 6e12, 8)] == ["active_parameters", "tokens"]


def test_fit_without_noise_is_exact(synthetic_table):
    fit = fit_law(synthetic_table(0.0, 0), bootstrap=0)
    for name, value in TRUTH.items():
        assert fit.law.__dict__[name] == pytest.approx(value, abs=2e-3)
    assert fit.law.rmse < 1e-5


def test_fit_recovers_coefficients_inside_its_intervals(synthetic_table):
    # 100 trials are benchmarks/bench_law.py; a trial misses the joint intervals about once in twenty.
    hits, widths = 0, []
    for trial in range(4):
        fit = fit_law(synthetic_table(PAPER_LAW.rmse, trial), bootstrap=60, seed=trial)
        intervals = fit.intervals(joint=True)
        hits += all(intervals[name][0] <= value <= intervals[name][1] for name, value in TRUTH.items())
        own = fit.intervals()
        assert all(intervals[name][0] <= own[name][0] < own[name][1] <= intervals[name][1] for name in own)
        widths.append(own["B"][1] / own["B"][0])
        assert fit.law.rmse == pytest.approx(PAPER_LAW.rmse, rel=0.35)
        # Where there are runs the loss is known better than one run tells it.
        low, high = fit.loss_interval(0.5e9, 300e9, 8)
        assert high - low < 2 * PAPER_LAW.rmse
        assert abs(fit.law.loss(0.5e9, 300e9, 8) - PAPER_LAW.loss(0.5e9, 300e9, 8)) < PAPER_LAW.rmse
    assert hits >= 3
    # An interval that holds anything would hold the truth as well.
    assert max(widths) < 20


def test_intervals_shrink_with_the_noise(synthetic_table):
    wide = fit_law(synthetic_table(4e-3, 5), bootstrap=60).intervals()
    narrow = fit_law(synthetic_table(4e-4, 5), bootstrap=60).intervals()
    for name in COEFFICIENTS:
        assert narrow[name][1] - narrow[name][0] < 0.3 * (wide[name][1] - wide[name][0])
        assert narrow[name][0] - 2e-2 < TRUTH[name] < narrow[name][1] + 2e-2


def test_one_broken_run_does_not_move_the_fit(synthetic_table):
    table = synthetic_table(1e-3, 0)
    table["loss"][17] += 1.0
    fit = fit_law(table, bootstrap=0)
    grid = [table[name] for name in COLUMNS[:3]]
    assert np.abs(fit.law.loss(*grid) - PAPER_LAW.loss(*grid)).max() < 3e-3


def test_the_minimum_is_that_of_scipy(synthetic_table):
    optimize = pytest.importorskip("scipy.optimize")
    table = synthetic_table(PAPER_LAW.rmse, 1)
    fit = fit_law(table, bootstrap=0)
    delta = 1.345 * 1.4826 * np.median(np.abs(fit.residuals))
    log_e = np.log(effective_experts(table["expansion"]))
    n, d = np.log(table["active_parameters"] / 1e9), np.log(table["tokens"] / 1e9)

    def residuals(theta):
        a, delta_, alpha, gamma, b, omega, beta, zeta, c = theta
        loss = np.exp(a + delta_ * log_e + (alpha + gamma * log_e) * n)
        loss = loss + np.exp(b + omega * log_e + (beta + zeta * log_e) * d) + np.exp(c)
        return np.log(loss) - np.log(table["loss"])

    start = [np.log(value) if name in "ABc" else value for name, value in TRUTH.items()]
    found = optimize.least_squares(residuals, start, loss="huber", f_scale=delta, x_scale="jac", max_nfev=2000)

    def cost(values):
        size = np.abs(values)
        return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum()

    assert cost(fit.residuals) <= cost(residuals(found.x)) * (1 + 1e-3)


def test_units_change_the_coefficients_and_nothing_else(synthetic_table):
    table = synthetic_table(PAPER_LAW.rmse, 2)
    billions, millions = (fit_law(table, bootstrap=20, unit=unit) for unit in (1e9, 1e6))
    points = (np.array([0.3e9, 0.9e9]), 400e9, 8)
    assert millions.law.loss(*points) == pytest.approx(billions.law.loss(*points), abs=1e-9)
    assert millions.law.alpha == billions.law.alpha and millions.law.A > billions.law.A
    for first, second in zip(millions.loss_interval(*points), billions.loss_interval(*points), strict=True):
        assert first == pytest.approx(second, abs=1e-9)


def test_heldout_error_is_that_of_the_noise_and_grows_when_the_rest_misleads(synthetic_table):
    table = synthetic_table(2e-3, 3)
    assert heldout_error(table) < 5e-3
    table["loss"] = np.where(table["tokens"] == 500e9, table["loss"] + 0.1, table["loss"])
    assert heldout_error(table) == pytest.approx(0.1, abs=0.01)


def test_tables(tmp_path, synthetic_table):
    rows = [
        dict(zip((*COLUMNS, "granularity"), (*values, granularity), strict=True))
        for granularity in (2, 8)
        for values in ((3e8, 1e11, 2, 2.4 + granularity), (5e8, 2e11, 4, 2.3 + granularity))
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    for name in ("table.jsonl", "table.csv"):
        table = read_table(tmp_path / name, granularity="8")
        assert list(table["loss"]) == [10.4, 10.3] and list(table["tokens"]) == [1e11, 2e11]
    (tmp_path / "table.csv").write_text("tokens,loss\n1,2\n")
    with pytest.raises(ValueError, match="has rows without 'active_parameters'. A table of runs needs"):
        read_table(tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text("active_parameters,tokens,expansion,loss\n1,2,x,4\n")
    with pytest.raises(ValueError, match="holds a value that is not a number: .*'x'"):
        read_table(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("rows", "needed"),
    [
        (np.arange(9), "10 different combinations"),
        (np.arange(0, 90, 6), "2 values of expansion"),
        (np.arange(30), "2 values of active_parameters"),
        (np.concatenate([np.arange(12), np.arange(30, 42)]), "3 values of active_parameters or of tokens"),
        (np.tile(np.arange(3), 10), "10 different combinations of the three .it has 3."),
    ],
)
def test_tables_with_too_few_points_say_what_is_missing(synthetic_table, rows, needed):
    table = {name: column[rows] for name, column in synthetic_table(0.0, 0).items()}
    with pytest.raises(ValueError, match=f"too few points .*{needed}"):
        fit_law(table)


@pytest.mark.parametrize("line", ["active_parameters: 3", "3", "[1, 2]", '{"loss": 3'])
def test_a_table_that_is_no_json_is_named(line, tmp_path):
    (tmp_path / "runs.jsonl").write_text(f'{{"loss": 3}}\n{line}\n')
    with pytest.raises(ValueError, match="in line 2, which is no JSON object. A table of runs is a .csv"):
        read_table(tmp_path / "runs.jsonl")


def test_tables_with_impossible_values_are_refused(synthetic_table):
    table = synthetic_table(0.0, 0)
    table["loss"][3] = np.nan
    with pytest.raises(ValueError, match="Row 3 of the table .* Give positive numbers"):
        fit_law(table)


def test_plot_and_description_of_a_fit(tmp_path, synthetic_table):
    table = synthetic_table(PAPER_LAW.rmse, 0)
    fit = fit_law(table, bootstrap=10)
    plot_fit(fit, table, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 20_000
    text = describe_fit(fit, table)
    low, high = fit.intervals()["beta"]
    assert f"| beta | {fit.law.beta:.4g} | {low:.4g} to {high:.4g} |" in text and "90 runs" in text
    assert text.endswith(f"fitted to the others, {heldout_error(table):.4f}")
    # Two token counts: without the larger one nothing tells a power of D from a constant.
    few = {name: column[np.isin(table["tokens"], [1e11, 5e11])] for name, column in table.items()}
    assert describe_fit(fit_law(few, bootstrap=10), few).endswith("not known: the others are too few")


def test_a_law_is_a_plain_record():
    law = ScalingLaw(1, 0, -1, 0, 1, 0, -1, 0, 1, rmse=0.1, unit=1)
    assert law.loss(2, 4, 1) == 1.75 and law.outside(1, 1, 1) == []


def test_recovery_benchmark_prints_json_last(monkeypatch, capsys):
    import bench_law

    monkeypatch.setattr(sys, "argv", ["bench_law.py", "--trials", "1", "--bootstrap", "20"])
    bench_law.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["trials"] == 1 and set(result["inside"]) == set(COEFFICIENTS)
    assert 0 < result["max_loss_error"] < 0.03
