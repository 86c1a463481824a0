"""The comparison with llama.cpp: its files hold our numbers, and its ratios are those of the measured times."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import bench_llama_cpp
import pytest
import torch
from bench_llama_cpp import Condition, Options, Trial, Turn
from comparison_report import draw, tables
from random_gguf import dense_weights, grouped_by_input, moe_weights, write_random_gguf
from transformers import LlamaConfig

from mobilemoe.costs import decode_bytes
from mobilemoe.display import show
from mobilemoe.export.random_program import random_packed_model
from mobilemoe.export.relayout import Weight
from mobilemoe.results import BenchmarkMachine, RuntimeComparison, Spread
from mobilemoe.shapes import program_config
from modeling_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.kernels import memory_read_rate


OPTIONS = Options(
    shapes=["S"],
    prompt_lengths=[16, 2000],
    busy=[0, 1],
    busy_prompt_length=128,
    busy_new_tokens=4,
    new_tokens=2,
    repeats=2,
    invocations=3,
    threads=2,
)


@pytest.fixture
def dense_config() -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize("dense", [False, True])
def test_gguf_holds_the_numbers_of_the_program(tiny_config, dense_config, tmp_path: Path, dense: bool):
    gguf = pytest.importorskip("gguf", reason="needs the `gguf` extra")
    from gguf.quants import dequantize

    config = dense_config if dense else copy.deepcopy(tiny_config)
    write_random_gguf(config, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == ("llama" if dense else "exaone-moe")
    stored = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    # As random_program.py makes the weights of a program.
    model = random_packed_model(program_config(dense_config if dense else copy.deepcopy(tiny_config)))
    expected = dict((dense_weights if dense else moe_weights)(model))
    # The head beside the embedding, and the factors of the rotary frequencies.
    assert len(stored) == len(expected) + 2
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "model.embed_tokens.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    }
    if dense:
        pairs |= {f"blk.0.ffn_{name}.weight": f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "down")}
    else:
        pairs["blk.0.ffn_gate_inp.weight"] = "model.layers.0.mlp.gate.weight"
        for name in ("gate", "up", "down"):
            pairs[f"blk.1.ffn_{name}_exps.weight"] = f"model.layers.1.mlp.experts.{name}_proj.weight"
            pairs[f"blk.1.ffn_{name}_shexp.weight"] = f"model.layers.1.mlp.shared_experts.{name}_proj.weight"
    for theirs, ours in pairs.items():
        assert torch.equal(stored[theirs], expected[ours].float()), theirs
    quantised = {tensor.name for tensor in reader.tensors if tensor.tensor_type.name == "Q4_0"}
    assert quantised >= {name for name in pairs if "inp" not in name}


def test_scales_that_q4_0_cannot_hold_are_refused():
    weight = Weight(torch.ones(2, 64, 32, dtype=torch.int8), torch.ones(2, 2, 32).half(), -2)
    regrouped = grouped_by_input(weight)
    assert regrouped.scale.shape == (2, 64, 1) and torch.equal(regrouped.float(), weight.float())
    weight.scale[1, 1, 5] = 2
    with pytest.raises(ValueError, match="differ between neighbouring inputs"):
        grouped_by_input(weight)


def turn(prefill: float | None, token: float, predicted: tuple[int, ...] = (1, 2, 3), memory: int = 100) -> Turn:
    return Turn(prefill, [token, token], list(predicted), memory)


def invocation(factor: float) -> dict[Trial, list[Turn]]:
    """Ours prefills twice and decodes four times as fast as llama.cpp; `factor` slows the whole machine."""
    turns = {}
    for condition in OPTIONS.conditions:
        long = condition.prompt_length > bench_llama_cpp.LONG_PROMPT
        for runtime, slower in (("executorch", 1.0), ("runner", 1.0), ("llama.cpp", 2.0)):
            again = None if long else slower * factor
            rounds = [turn(slower * factor, slower**2 * factor / 100), turn(again, slower**2 * factor / 100)]
            if long:
                rounds[1].predicted = [2, 3]
            turns[Trial("S", runtime, condition)] = rounds[:1] if long and runtime == "runner" else rounds
    return turns


@pytest.fixture
def comparison() -> RuntimeComparison:
    rates = [[2e10, 4e10, 9e10]] * 3
    return RuntimeComparison(
        machine=BenchmarkMachine(cpu="a processor", cores=2, threads=2),
        versions={},
        context=2002,
        new_tokens=2,
        invocations=3,
        repeats=2,
        read_gb_per_s=Spread(median=40.0, p10=20.0, p90=90.0, min=20.0, max=90.0, repeats=9),
        file_bytes={"S": {"pte": 1, "gguf": 2}},
        trials=bench_llama_cpp.summarise([invocation(factor) for factor in (1, 2, 4)], rates, {"S": 8}),
    )


def test_ratios_are_of_one_invocation(comparison: RuntimeComparison):
    trials = {(row.runtime, row.prompt_length, row.busy_processes): row for row in comparison.trials}
    assert len(trials) == 12
    for length, busy in ((16, 0), (128, 0), (128, 1), (2000, 0)):
        ours, runner, theirs = (trials[runtime, length, busy] for runtime in ("executorch", "runner", "llama.cpp"))
        # The machine slowed by 4 between the invocations. No ratio did.
        assert (ours.decode_tokens_per_s.min, ours.decode_tokens_per_s.max) == (25, 100)
        assert ours.prefill_tokens_per_s.median == length / 2
        for row in (ours, runner):
            for ratio, value in ((row.decode_over_llama_cpp, 4), (row.prefill_over_llama_cpp, 2)):
                assert ratio.min == ratio.max == value
            assert row.top1_agreement == 1
        assert theirs.decode_over_llama_cpp is None and theirs.top1_agreement is None
        assert ours.token_ms.max == 40 and ours.token_ms.repeats == 12
        assert (ours.decode_of_memory_limit is None) == (busy == 1)
    row = trials["executorch", 16, 0]
    assert row.bytes_per_token == int(decode_bytes(MobileMoEConfig(), 17, 8))
    assert row.decode_of_memory_limit.max == pytest.approx(100 * row.bytes_per_token / 4e10, rel=1e-3)
    # Its cache has 16 bits.
    assert trials["llama.cpp", 2000, 0].bytes_per_token > trials["executorch", 2000, 0].bytes_per_token


def test_agreement_counts_equal_predictions():
    assert (
        bench_llama_cpp.agreement([turn(1, 1, (1, 2, 3))] * 2, [turn(1, 1, (1, 2, 4)), turn(1, 1, (0, 0, 0))]) == 2 / 6
    )


def test_another_function_in_llama_cpp_is_refused():
    options = replace(OPTIONS, prompt_lengths=[4])
    models = {("S", "executorch"): lambda *_: turn(1, 1), ("S", "llama.cpp"): lambda *_: turn(1, 1, (7, 8, 9))}
    with pytest.raises(ValueError, match="same token as our program at 0% of positions"):
        bench_llama_cpp.warm_up(models, options)


def test_long_prompts_run_once_per_process():
    requests = []

    class Recorder:
        def ask(self, request: dict) -> dict:
            requests.append((len(request["tokens"]), request["start"], request["one_by_one"]))
            calls = len(request["tokens"]) if request["one_by_one"] else 1
            return {"seconds": [1.0] * calls, "predicted": [5] * calls, "peak_memory_bytes": 9}

    model = bench_llama_cpp.process_model(Recorder())
    assert model([0] * 6, 4, True) == Turn(1.0, [1.0, 1.0], [5, 5, 5], 9)
    assert model([0] * 2002, 2000, False).prefill == 1.0
    assert model([0] * 2002, 2000, True) == Turn(None, [1.0, 1.0], [5, 5], 9)
    assert requests == [(4, 0, False), (2, 4, True), (2000, 0, False), (2, 2000, True), (2, 2000, True)]


def test_conditions_are_by_length_and_include_the_busy_machine():
    assert OPTIONS.conditions == [Condition(16, 0), Condition(128, 0), Condition(128, 1), Condition(2000, 0)]
    assert [OPTIONS.num_new_tokens(condition) for condition in OPTIONS.conditions] == [2, 4, 4, 2]
    assert OPTIONS.context == 2002
    assert replace(OPTIONS, busy_new_tokens=4000).context == 4128
    assert replace(OPTIONS, prompt_lengths=[4], busy=[]).context == 4 + bench_llama_cpp.WARM_UP


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"invocations": 0}, "invocations=0 leaves nothing to measure"),
        ({"prompt_lengths": [0]}, "must name lengths of 1 or more tokens"),
        ({"busy": [-1]}, "numbers of processes. Set 0 or more"),
    ],
)
def test_impossible_options_are_refused(changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changed)


def test_computing_processes_end():
    before = set(children())
    with bench_llama_cpp.computing(2):
        started = set(children()) - before
        assert len(started) == 2
    assert not started & set(children())


def children() -> list[str]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    if not tasks.exists():
        pytest.skip("needs /proc")
    return [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def test_report_shows_ratios_and_limit(comparison: RuntimeComparison, tmp_path: Path, capsys):
    show(*tables(comparison))
    printed = capsys.readouterr().out
    assert "4 (4-4)" in printed and "2 (2-2)" in printed and "40 (20-90) GB/s" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100
    draw(comparison, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    comparison.save(tmp_path / "speed.json")
    assert RuntimeComparison.load(tmp_path / "speed.json") == comparison
    assert json.loads((tmp_path / "speed.json").read_text()) == comparison.as_dict()


def test_memory_is_read_by_at_least_one_thread():
    assert memory_read_rate(2) > 0
    with pytest.raises(ValueError, match="num_threads=0"):
        memory_read_rate(0)
