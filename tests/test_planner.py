"""Plans under the paper's limits and others, what they refuse, and that a planned configuration trains and exports."""

import dataclasses
import json
import math
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilemoe import cli
from mobilemoe.costs import Device, inference_flops, int4_bytes, memory_bytes, read_device, training_flops
from mobilemoe.display import show
from mobilemoe.plan import search
from mobilemoe.plan.fit import fit_law
from mobilemoe.plan.law import PAPER_LAW
from mobilemoe.plan.planner import plan
from mobilemoe.plan.report import expansions, frontier, plan_report, plot_plan
from mobilemoe.plan.search import Request, shape_config
from mobilemoe.train.recipe import load_model
from modeling_mobilemoe import MobileMoEConfig, quantize


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {
    "s": MobileMoEConfig(),
    "m": MobileMoEConfig.from_pretrained(RECIPES / "mobilemoe-m"),
    "l": MobileMoEConfig.from_pretrained(RECIPES / "mobilemoe-l"),
}
# The paper's: DRAM of an app, the longest context, INT8 cache entries.
PAPER_LIMITS = {"memory": 5e9, "context": 8192, "kv_bits": 8}
ARCHITECTURE = (
    "hidden_size num_hidden_layers intermediate_size intermediate_size_mlp num_attention_heads num_key_value_heads "
    "head_dim num_local_experts num_experts_per_tok vocab_size"
).split()


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_the_family_are_the_released_ones(size):
    released = SIZES[size]
    config = shape_config(released.hidden_size, released.num_hidden_layers, 8)
    assert attrgetter(*ARCHITECTURE)(config) == attrgetter(*ARCHITECTURE)(released)


@pytest.mark.parametrize("tokens", [100e9, 300e9, 500e9])
@pytest.mark.parametrize("size", SIZES)
def test_limits_of_the_paper_give_its_models(size, tokens):
    released = SIZES[size]
    # The inference budget as one would quote it: the cards' 272M, 528M and 922M active parameters.
    quoted = {"s": 272.5e6, "m": 528.5e6, "l": 922e6}[size]
    result = plan(Request(tokens=tokens, inference_flops=2 * quoted, **PAPER_LIMITS))
    config = result.best.config
    assert result.best.expansion == 8
    # Granularity 8 with a shared expert of four units.
    assert config.intermediate_size * 8 == 4 * config.hidden_size
    assert (config.num_local_experts, config.num_experts_per_tok) == (60, 4)
    assert config.intermediate_size_mlp == 4 * config.intermediate_size
    assert config.num_active_parameters == pytest.approx(released.num_active_parameters, rel=0.05)
    assert config.num_total_parameters == pytest.approx(released.num_total_parameters, rel=0.05)


@pytest.mark.parametrize("tokens", [100e9, 300e9, 500e9])
@pytest.mark.parametrize("size", SIZES)
def test_memory_and_either_compute_limit_of_a_released_model_give_that_model(size, tokens):
    released = SIZES[size]
    memory = memory_bytes(released, 8192)
    speed = read_device("galaxy-s25").decode_tokens_per_second(released, 8192)
    for limit in ({"inference_flops": inference_flops(released)}, {"tokens_per_second": speed}):
        config = plan(Request(memory, tokens=tokens, **limit)).best.config
        assert attrgetter(*ARCHITECTURE)(config) == attrgetter(*ARCHITECTURE)(released)
    # The missing limit when only memory is given: the law then buys active parameters instead of experts.
    if size != "l":
        assert plan(Request(memory, tokens=tokens)).best.expansion < 4


def test_memory_and_training_flops_alone_contradict_the_paper():
    # docs/scaling.md says so: E = 8 is only best with the limit of FLOPs per token.
    memory, flops = memory_bytes(SIZES["s"], 8192), training_flops(SIZES["s"], 500e9)
    result = plan(Request(memory, flops=flops, tokens_per_second=1e-3, extrapolate=True))
    losses = {shape.expansion: shape.loss for shape in result.per_expansion}
    assert [losses[expansion] for expansion in (1, 2, 8)] == pytest.approx([2.331, 2.311, 2.353], abs=6e-4)


def test_document_lists_other_phones():
    document = (RECIPES.parent / "docs/scaling.md").read_text()
    for memory in (1, 2, 4):
        for speed, choice in plan(Request(memory * 1e9, tokens=5e11)).speeds.items():
            config = choice.best.config
            assert (
                f"| {memory} GB | {speed:g} | {expansions(choice)} | {', '.join(map(str, choice.equivalent))} | "
                f"{choice.best.expansion}, {config.hidden_size} x {config.num_hidden_layers}, " in document
            )


def test_shapes_that_are_searched_can_be_packed_and_exported():
    for shape in plan(Request(5e9, tokens=5e11, extrapolate=True)).candidates:
        config = shape.config
        int4_bytes(config)
        assert config.head_dim == 64 == config.hidden_size // config.num_attention_heads
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert config.intermediate_size % 32 == 0


def test_speed_is_a_limit_unasked():
    for memory in (1e9, 2e9, 4e9, 8e9):
        result = plan(Request(memory, tokens=5e11))
        assert result.best.decode_speed >= 8 and "Galaxy S25" in result.request.device.name
        assert result.best.config.num_active_parameters < 1e9
    # Less memory, or a higher speed, never gives a lower loss, beyond the preference for E = 8.
    losses = [plan(Request(memory, tokens=5e11)).best.loss for memory in (1e9, 2e9, 4e9)]
    assert losses[0] > losses[1] > losses[2] - PAPER_LAW.rmse
    speeds = {speed: choice.best for speed, choice in plan(Request(1e9, tokens=5e11)).speeds.items()}
    assert list(speeds) == [8, 16, 24]
    assert all(best.decode_speed >= speed for speed, best in speeds.items())
    assert [best.expansion for best in speeds.values()] == [2, 4, 6]


def test_intervals_reach_the_answer():
    # The S shape: by the law, 6 and 8 hardly differ, and 1 and 2 are worse beyond its uncertainty.
    result = plan(Request(tokens=500e9, inference_flops=2 * 272.5e6, **PAPER_LIMITS))
    low, high = result.choice.expansion_interval
    assert 3 <= low < 6 <= high <= 12
    assert result.choice.equivalent == [3, 4, 6, 8]
    excess = dict(zip((shape.expansion for shape in result.per_expansion), result.choice.excess, strict=True))
    assert excess[8] == (0, 0, 0)
    for expansion, (difference, one, two) in excess.items():
        assert one <= difference <= two
        assert (one > 0) == (expansion in (1, 2))
    # Of the difference, not of two losses: those are known three times worse.
    assert excess[6][2] - excess[6][1] < (result.loss_interval[1] - result.loss_interval[0]) / 3
    # Narrower with a law that is known better.
    import bench_law

    sharp = plan(result.request, fit_law(bench_law.synthetic_table(1e-4, 0), bootstrap=50))
    one, two = sharp.choice.excess[0][1:]
    assert two - one < 0.1 * (excess[1][2] - excess[1][1])


def test_a_law_without_uncertainty_is_refused():
    import bench_law

    with pytest.raises(ValueError, match="bootstrap=0, so it has no uncertainty to use. Set 200"):
        plan(Request(1e9, tokens=5e11), fit_law(bench_law.synthetic_table(0.0, 0), bootstrap=0))


def test_a_plan_keeps_its_limits_and_says_why_each_other_shape_lost():
    device = Device(25e9, 270e9, 15e9, name="phone")
    request = Request(1.5e9, 4096, tokens=300e9, tokens_per_second=30, device=device)
    result = plan(request)
    best = result.best
    assert best.memory <= 1.5e9 and best.decode_speed >= 30
    assert best.memory == memory_bytes(best.config, 4096)
    assert best.decode_speed == device.decode_tokens_per_second(best.config, 4096)
    assert best.loss - PAPER_LAW.rmse < result.loss_interval[0] < best.loss < result.loss_interval[1]
    chosen = [shape for shape in result.candidates if shape.verdict.startswith("chosen")]
    assert [shape.config for shape in chosen] == [best.config]
    for shape in result.candidates:
        assert shape.verdict
        over = shape.memory > 1.5e9
        assert over == any("GB of 1.5" in reason for reason in shape.broken)
        slow = shape.decode_speed < 30
        assert slow == any("tokens/s of 30" in reason for reason in shape.broken)
        if not shape.broken:
            # Nothing within the limits is better by more than the law can tell.
            assert shape.loss > best.loss - PAPER_LAW.rmse
    assert [shape.expansion for shape in result.per_expansion] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert all(shape.expansion == best.expansion and not shape.broken for shape in result.runners_up)
    # A slower demand never gives a higher loss.
    assert plan(dataclasses.replace(request, tokens_per_second=15)).best.loss <= best.loss + PAPER_LAW.rmse


def test_a_training_budget_in_flops_makes_larger_models_see_fewer_tokens():
    result = plan(Request(1e9, 4096, flops=1e21, kv_bits=8))
    for shape in result.candidates[::50]:
        assert training_flops(shape.config, shape.tokens) == pytest.approx(1e21)
    # Finding 1 of the paper: at the same memory and training FLOPs, experts beat a dense model, here by more than the
    # error of the law.
    by_expansion = {shape.expansion: shape.loss for shape in result.per_expansion}
    assert min(by_expansion[2], by_expansion[4]) < by_expansion[1] - PAPER_LAW.rmse
    assert result.best.expansion > 1


def test_granularity_keeps_parameters_and_shows_both_sides():
    result = plan(Request(tokens=500e9, inference_flops=2 * 272.5e6, **PAPER_LIMITS))
    config = result.best.config
    weights = {
        (row["num_local_experts"] + row["num_experts_per_tok"]) * row["intermediate_size"]
        for row in result.granularities
    }
    assert weights == {64 * config.intermediate_size}
    reached = [row["experts_reached"] for row in result.granularities]
    assert reached == sorted(reached) and reached[-1] > 1.9 * reached[-2]


def test_extrapolation_is_refused_or_said():
    import bench_law

    assert plan(Request(tokens=300e9, inference_flops=2 * 528.5e6, **PAPER_LIMITS)).warnings == []
    request = {"inference_flops": 2 * 272.5e6, **PAPER_LIMITS}
    for budget in ({"tokens": 6e12}, {"tokens": 1e10}, {"flops": 1e23}, {"flops": 1e19}):
        with pytest.raises(
            ValueError, match="fitted to, so it cannot rank shapes there. Set .*, or --extrapolate"
        ) as error:
            plan(Request(**budget, **request))
        # What the error offers is accepted.
        ((name, _),) = budget.items()
        offered = {name: float(str(error.value).split("Set ")[1].split(",")[0])}
        assert plan(Request(1e9, **offered)).best.tokens <= 1.1 * 500e9
    tiny = fit_law(bench_law.synthetic_table(PAPER_LAW.rmse, 0), bootstrap=5)
    ranges = PAPER_LAW.ranges | {"active_parameters": (3e4, 9e4)}
    tiny = dataclasses.replace(tiny, law=dataclasses.replace(tiny.law, ranges=ranges))
    with pytest.raises(ValueError, match=r"fitted to 0.03M to 0.09M active .* nearest has 8.34M. Give a law of such"):
        plan(Request(1e9, tokens=3e11), tiny)
    warnings = plan(Request(tokens=6e12, extrapolate=True, **request)).warnings
    assert len(warnings) == 1 and warnings[0].startswith("tokens 6e+12 is outside the fitted 1e+11 to 5e+11")
    # The range of the law, instead of a limit.
    assert "sizes end at the 900M active parameters" in plan(Request(8e9, tokens=5e11)).warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 1e6}, r"memory=0.001 GB holds no model: the smallest one .* needs 0.2\d+ GB.*or --extrapolate"),
        (
            {"memory": 1e6, "extrapolate": True},
            r"memory=0.001 GB holds no model: .* needs 0.0\d+ GB.*Give more memory.*vocabulary.$",
        ),
        ({"inference_flops": 1e6}, "inference_flops=1e.06 per token is less than the smallest model needs"),
        (
            {"device": Device(20e9, name="tablet"), "tokens_per_second": 1e5},
            r"tokens_per_second=1e\+05 is above what tablet can read: at 20 GB/s .* decodes \S+ tokens per second",
        ),
        ({"tokens_per_second": math.nan}, "tokens_per_second=nan cannot be met"),
        ({"memory": -1}, "memory=-1 cannot be met by any model. Set a positive number"),
        ({"tokens": -5e9}, "tokens=-5000000000.0 cannot be met"),
        ({"tokens": None, "flops": -1.0}, "flops=-1.0 cannot be met"),
        ({"memory": math.nan}, "memory=nan cannot be met"),
        ({"context": 0}, "context=0 cannot be met"),
        ({"flops": 1e21}, "the training budget is one of the two.*Set exactly one"),
        ({"tokens": None}, "the training budget is one of the two.*Set exactly one"),
    ],
)
def test_impossible_requests_say_what_would_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(Request(**({"memory": 1e9, "tokens": 1e11} | changes)))


def test_what_an_error_offers_is_accepted():
    device = Device(20e9)
    with pytest.raises(ValueError) as error:
        plan(Request(1e9, tokens=1e11, device=device, tokens_per_second=1e5))
    offered = float(str(error.value).split("decodes ")[1].split()[0])
    assert plan(Request(1e9, tokens=1e11, device=device, tokens_per_second=0.99 * offered)).best.decode_speed


def test_limits_that_only_contradict_each_other():
    shapes = plan(Request(1e9, tokens=1e11)).candidates[:2]
    broken = [
        dataclasses.replace(shapes[0], broken=("too large", "too slow")),
        dataclasses.replace(shapes[1], broken=("too slow",)),
    ]
    message = search.explain_nothing_fits(broken, Request(1e9, tokens=1e11))
    assert search.describe(shapes[1]) in message and "too slow. Loosen that limit." in message


def test_a_law_of_ones_own_brings_its_interval():
    import bench_law

    fit = fit_law(bench_law.synthetic_table(PAPER_LAW.rmse, 0), bootstrap=20)
    result = plan(Request(tokens=300e9, inference_flops=2 * 528.5e6, **PAPER_LIMITS), fit)
    best = result.best
    low, high = fit.loss_interval(best.config.num_active_parameters, best.tokens, best.expansion)
    assert result.loss_interval == (low, high) and low < best.loss < high
    assert best.loss == float(fit.law.loss(best.config.num_active_parameters, best.tokens, best.expansion))


def run_cli(*arguments) -> None:
    cli.main(list(map(str, arguments)))


def test_command_line_prints_tables_or_json(capsys, tmp_path):
    limits = ["--memory-gb", 5, "--tokens", 5e11, "--inference-gflops", 0.545, "--kv-bits", 8]
    run_cli("plan", *limits, "--bandwidth", 25, "--rate", 270, "--plot", tmp_path / "plan.png")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for text in (
        # What and how certain, one table, what its columns are.
        "Width 768, 20 layers, E = 8, 272M of 1,263M parameters active; 2.3533 nats per token, 95 % interval 2.34",
        "Of the 6 of 470 shapes within the limits, the law gives the lowest loss to E = 6, 95 % interval 4 to 8. "
        "E = 3 to 8 are within its error of 0.0076, and of these 8 is the paper's choice. "
        "E = 3 needs the least memory, 0.405 GB.",
        "4 768 20 272M 697M 0.485",
        "equivalent 8 768 20 272M 1,263M 0.805",
        "chosen GB: weights",
        "tok/s: decoding at that context on device. Loss: over that of the chosen one, 95 % interval. ",
        "First token of a 512-token prompt after",
    ):
        assert text in " ".join(printed.split())
    assert "extrapolates" not in printed and "What speed costs" not in printed
    assert (tmp_path / "plan.png").stat().st_size > 20_000
    run_cli("plan", *limits, "--json", "--output", tmp_path / "s")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "s/plan.json").read_text())
    best = printed["best"]
    assert best["total_parameters"] == SIZES["s"].num_total_parameters
    # What the table leaves out.
    assert best["bytes"]["experts"] == pytest.approx(0.597e9, rel=1e-3)
    assert sum(best["bytes"].values()) == best["memory_bytes"]
    assert best["training_flops"] == pytest.approx(8.17e20, rel=1e-3) and best["loss_interval"][0] < best["loss"]
    assert [row["finding"] for row in printed["granularities"]][1] == "the paper's choice"
    assert printed["runners_up"] == [] and all(row["verdict"] for row in printed["candidates"])
    config = MobileMoEConfig.from_pretrained(tmp_path / "s")
    assert [getattr(config, name) for name in ARCHITECTURE] == [getattr(SIZES["s"], name) for name in ARCHITECTURE]


def test_command_line_reads_a_device_and_a_table(capsys, tmp_path):
    measured = {"device": "S25", "config": SIZES["s"].to_dict(), "kv_bits": 8}
    measured["decode"] = [{"context": 256, "tokens_per_second": 138.1}, {"context": 8192, "tokens_per_second": 25.8}]
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    import bench_law

    table = bench_law.synthetic_table(PAPER_LAW.rmse, 0)
    rows = [dict(zip(table, map(float, row), strict=True)) for row in zip(*table.values(), strict=True)]
    rows.append(rows[0] | {"loss": 99.0, "kind": "other"})
    lines = [json.dumps({"kind": "sweep"} | row) for row in rows]
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["plan", "--memory-gb", 5, "--tokens", 3e11, "--device", tmp_path / "bench.json"]
    arguments += ["--tokens-per-second", 15, "--law", tmp_path / "table.jsonl", "--where", "kind=sweep", "--json"]
    run_cli(*arguments)
    result = json.loads(capsys.readouterr().out)
    assert result["request"]["device"]["name"] == "S25"
    assert result["best"]["decode_tokens_per_second"] >= 15
    assert result["law"]["rmse"] != PAPER_LAW.rmse and result["law"]["c"] < 2.2
    low, high = result["law"]["intervals"]["beta"]
    assert low < result["law"]["beta"] < high
    run_cli(*arguments[:-1])
    printed = capsys.readouterr().out
    printed = " ".join(printed.split())
    assert "fitted to 90 runs" in printed and f"beta {result['law']['beta']:.4g} {low:.4g} to {high:.4g}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-gb", -1, "--tokens", 1e9], "mobilemoe plan: memory=-1000000000.0 cannot be met"),
        (["--memory-gb", 1, "--tokens", 1e9, "--rate", 3], "--rate alone says nothing about decoding"),
        (["--memory-gb", 1, "--tokens", 1e9, "--device", "x", "--bandwidth", 3], "Give one of them"),
        (["--memory-gb", 1, "--tokens", 1e9, "--device", "/nowhere.json"], "No such file"),
        (["--memory-gb", 1, "--tokens", 1e9, "--device", "galaxy"], "or one of: galaxy-s25."),
    ],
)
def test_command_line_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as error:
        run_cli("plan", *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_document_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(RECIPES.parent)
    document = Path("docs/scaling.md").read_text()
    _, block = document.split("```\n$ mobilemoe plan ")
    command, _, shown = block.split("```")[0].partition("\n")
    run_cli("plan", *command.split())
    assert capsys.readouterr().out.split() == shown.split()
    _, error = document.split("```\nmobilemoe plan: ")
    impossible = "--memory-gb 1 --tokens 6e12"
    with pytest.raises(SystemExit) as raised:
        run_cli("plan", *impossible.split())
    assert str(raised.value).split() == ["mobilemoe", "plan:", *error.split("```")[0].split()]


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tokenizer) -> Path:
    """A plan at toy scale, with `planned/config.json`, and the packed model that eight steps made of it."""
    directory = tmp_path_factory.mktemp("plan")
    # Between a dense model and E = 8: two layers of width 64 have 0.33 MFLOPs per token.
    arguments = ["--memory-gb", "0.002", "--context", "64", "--tokens", "1e11", "--inference-gflops", "0.00034"]
    cli.main(["plan", *arguments, "--extrapolate", "--vocab-size", "512", "--output", str(directory / "planned")])
    torch.manual_seed(0)
    model = load_model(str(directory / "planned")).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = torch.randint(3, 512, (2, 24))
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    (directory / "losses.json").write_text(json.dumps(losses))
    quantize(model.eval()).save_pretrained(directory / "packed")
    tokenizer.save_pretrained(directory / "packed")
    return directory


def test_a_planned_configuration_trains_and_packs_to_its_bytes(planned):
    losses = json.loads((planned / "losses.json").read_text())
    assert losses[-1] < losses[0] - 0.1
    best = json.loads((planned / "planned/plan.json").read_text())["best"]
    assert best["expansion"] > 1 and best["memory_bytes"] <= 2e6
    weights = sum(int4_bytes(MobileMoEConfig.from_pretrained(planned / "planned")).values())
    # The rest of the file is its header.
    assert 0 < (planned / "packed/model.safetensors").stat().st_size - weights < 20_000


@pytest.mark.slow
def test_a_planned_configuration_goes_through_a_recipe_and_exports_to_its_bytes(planned, workspace, tmp_path):
    pytest.importorskip("executorch.exir", reason="needs mobilemoe[export]")
    from mobilemoe.export.exporter import export_checkpoint
    from mobilemoe.runtime import PteModel

    command = [sys.executable, RECIPES / "pretrain.py", "--config", RECIPES / "tiny/pretrain.yaml"]
    command += ["--model", planned / "planned", "--output_dir", tmp_path / "trained", "--max_steps", "2"]
    result = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    # From full precision, which the export quantises; and packed before, with a config that names no BOS.
    for checkpoint in (tmp_path / "trained", planned / "packed"):
        directory = export_checkpoint(checkpoint, tmp_path / checkpoint.name / "pte", max_seq_len=64)
        assert PteModel(directory).forward([5, 6, 7], 0).shape == (512,)
        best = json.loads((planned / "planned/plan.json").read_text())["best"]
        weights = sum(best["bytes"].values()) - best["bytes"]["kv_cache"]
        # The rest is the graph, some 30 KB per layer.
        assert 0 < (directory / "model.pte").stat().st_size - weights < 2 * 40_000 + 20_000


def test_printed_plan_names_a_device_without_a_prefill_rate(capsys):
    show(*plan_report(plan(Request(5e9, 4096, tokens=300e9, device=Device(25e9, name="bus")))))
    printed = " ".join(capsys.readouterr().out.split())
    assert "on bus." in printed and "First token" not in printed
    show(*plan_report(plan(Request(5e9, 4096, tokens=6e12, extrapolate=True))))
    printed = " ".join(capsys.readouterr().out.split())
    assert "The law extrapolates: " in printed and "tokens 6e+12 is outside the fitted 1e+11 to 5e+11" in printed


def test_plot_of_a_plan(tmp_path):
    result = plan(Request(2e9, 4096, flops=1e21))
    for name, change in (("memory", {"memory": 1.2e9}), ("decode_speed", {"tokens_per_second": 20})):
        # The line is what a plan with another limit would find, but for the preference for E = 8.
        values, lowest, (low, high) = frontier(result, name)
        other = min(shape.loss for shape in plan(dataclasses.replace(result.request, **change)).per_expansion)
        (limit,) = change.values()
        reached = values <= limit if name == "memory" else values >= limit
        assert lowest[reached][-1] == pytest.approx(other, abs=1e-9)
        assert (low < lowest).all() and (lowest < high).all() and (np.diff(lowest) <= 0).all()
    plot_plan(result, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 20_000
