"""The demo and the benchmarks run from their command lines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mobilemoe.train.routing import read_routing
from modeling_mobilemoe import MobileMoEConfig


EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES.with_name("benchmarks")


def run_benchmark(name: str, *arguments: str, cwd: Path | None = None) -> dict:
    """Runs a benchmark and returns the JSON line that it prints last."""
    command = [sys.executable, BENCHMARKS / name, *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_forward_benchmark_prints_json_last():
    result = run_benchmark("bench_forward.py", "--tokens", "16", "--layers", "1", "--repeats", "3")
    for model in ("mobilemoe", "olmoe", "qwen3_moe"):
        assert 0 < result[model]["p10"] <= result[model]["ms_per_layer"] <= result[model]["p90"]


@pytest.mark.slow
def test_evaluation_benchmark_prints_json_last(base_checkpoint):
    arguments = ("--model", str(base_checkpoint), "--documents", "2", "--repeats", "1", "--batch-sizes", "4")
    tasks = run_benchmark("bench_eval.py", *arguments)["tasks"]
    for task in ("short context", "shared examples", "own examples"):
        assert set(tasks[task]["requests_per_s"]) == {"mobilemoe", "hf, batch size 4"}
        # In FP32 the two compute the same.
        assert tasks[task]["largest_difference"] < 1e-2


@pytest.mark.slow
def test_kernel_benchmark_prints_json_last():
    result = run_benchmark("bench_kernel.py", "--tokens", "1", "64", "--repeats", "3")
    for tokens in ("1", "64"):
        times = result["ms_per_layer"][tokens]
        assert 0 < times["min"] <= times["kernel"] <= times["p90"]


@pytest.mark.slow
def test_layer_benchmark_prints_json_last():
    result = run_benchmark("bench_layer.py", "--rounds", "1", "--contexts", "16", "--threads", "1")
    (row,) = result["layers"]
    assert row["context"] == 16 and 0 < row["min_ms"] <= row["ms"] <= row["max_ms"] and row["cpu_ms"] > 0


@pytest.mark.slow
def test_lookup_benchmark_prints_json_last(tmp_path):
    from mobilemoe.export.random_program import write_random_program

    write_random_program(MobileMoEConfig.from_pretrained("recipes/tiny"), tmp_path / "pte", 1024)
    arguments = ("--model", str(tmp_path / "pte"), "--repeats", "1", "--tokens", "16")
    result = run_benchmark("bench_lookup.py", *arguments)
    assert [row["text"] for row in result["texts"]] == ["edits", "repeats", "new code", "new prose"]
    for row in result["texts"]:
        assert 0 < row["speedup"]["min"] <= row["speedup"]["median"] and 1 <= row["tokens_per_call"] <= 8


@pytest.mark.slow
def test_granularity_benchmark_prints_json_last():
    times = run_benchmark("bench_granularity.py", "--tokens", "1", "--repeats", "3")["us_per_token"]["1"]
    assert set(times) == {"2", "4", "8", "16"}
    assert all(0 < low <= median <= high for median, low, high in times.values())


@pytest.mark.slow
def test_llama_cpp_benchmark_prints_json_last(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf")
    arguments = ["--shapes", "S", "--prompt-lengths", "4", "--new-tokens", "2", "--directory", str(tmp_path)]
    arguments += ["--busy", "1", "--busy-prompt-length", "8", "--busy-new-tokens", "3"]
    arguments += ["--repeats", "1", "--invocations", "1"]
    trials = run_benchmark("bench_llama_cpp.py", *arguments)["trials"]
    runtimes = ("executorch", "llama.cpp", "runner")
    places = [(name, length, busy) for length, busy in ((4, 0), (8, 1)) for name in runtimes]
    assert [(row["runtime"], row["prompt_length"], row["busy_processes"]) for row in trials] == places
    for row in trials:
        assert row["decode_tokens_per_s"]["median"] > 0
        assert row["runtime"] == "llama.cpp" or row["top1_agreement"] > 0.3


@pytest.mark.slow
def test_training_benchmark_prints_json_last():
    result = run_benchmark("bench_train.py", "--layers", "1", "--length", "32", "--repeats", "3")
    for model in ("mobilemoe", "mobilemoe-capacity", "olmoe", "qwen3_moe"):
        assert 0 < result[model]["p10"] <= result[model]["tokens_per_s"] <= result[model]["p90"]
        assert 0 < result[model]["mfu"] < 1


@pytest.mark.slow
def test_balance_compares_two_trainings(workspace):
    result = run_benchmark("balance.py", "--steps", "12", "--output", "balance.png", cwd=workspace)
    assert (workspace / "balance.png").read_bytes().startswith(b"\x89PNG")
    for run in ("with the bias", "without"):
        assert len(read_routing(workspace / "out/balance" / run.replace(" ", "-"))) == 12
        assert 1 <= result[run]["last"] <= 4
    assert result["with the bias"]["last"] != result["without"]["last"]


@pytest.mark.slow
def test_qat_table_measures_every_cell_once(workspace, base_checkpoint):
    sft = ["recipes/sft.py", "--config", "recipes/tiny/sft.yaml", "--model", str(base_checkpoint), "--max_steps", "2"]
    subprocess.run([sys.executable, *sft], cwd=workspace, check=True, capture_output=True)
    data = workspace / "out/demo/data"
    (data / "chat.heldout.jsonl").write_text((data / "chat.train.jsonl").read_text())
    arguments = ("--max-steps", "2", "--rows", "2", "--seeds", "1")
    result = run_benchmark("qat_table.py", *arguments, cwd=workspace)
    cells = workspace / "out/qat_table/seed-1"
    written = {path.name: (path / "cell.json").stat().st_mtime_ns for path in cells.iterdir()}
    assert len(written) == 5
    assert run_benchmark("qat_table.py", *arguments, cwd=workspace) == result
    assert {path.name: (path / "cell.json").stat().st_mtime_ns for path in cells.iterdir()} == written


@pytest.mark.slow
def test_qat_benchmark_compares_with_plain_training():
    result = run_benchmark("bench_qat.py", "--shape", "tiny", "--tokens", "64", "--repeats", "3")
    assert result["tiny"]["plain"]["of_plain"] == 1
    for row in result["tiny"].values():
        assert 0 < row["p10"] <= row["ms_per_step"] <= row["p90"]
        assert row["of_plain"] > 0 and row["peak_mb"] > 0


def test_qat_table_asks_for_the_demo(tmp_path, monkeypatch):
    import qat_table

    monkeypatch.setattr(sys, "argv", ["qat_table.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="is missing. Run `make demo` first."):
        qat_table.main()


@pytest.mark.slow
def test_law_benchmark_counts_what_the_intervals_hold():
    result = run_benchmark("bench_law.py", "--trials", "2", "--bootstrap", "10")
    assert result["trials"] == 2 and all(0 <= count <= 2 for count in result["inside"].values())


@pytest.mark.slow
def test_load_benchmark_keeps_int4_in_memory(tmp_path):
    result = run_benchmark("bench_load.py", "--directory", str(tmp_path / "s"), "--new-tokens", "1")
    # Published: the size of the released S-QAT file (facebook/MobileMoE-S-QAT, model.safetensors).
    assert result["file"] == 713_916_240
    assert result["packed"]["resident_over_file"] < 1.25 < result["expanded"]["resident_over_file"]


def test_demo_data_never_trains_on_heldout_files(tmp_path, monkeypatch):
    import stdlib_data

    library = {"kept.py": 'def f(a):\n    """Adds one to a number."""\n    return a + 1\n'}
    library["held.py"] = library["kept.py"].replace("one", "two")
    monkeypatch.setattr(stdlib_data, "standard_library_files", lambda: iter(library.items()))
    monkeypatch.setattr(stdlib_data, "is_heldout", lambda name: name == "held.py")
    stdlib_data.write_data(tmp_path)
    for kind in ("code", "docstrings", "chat"):
        train, heldout = ((tmp_path / f"{kind}.{part}.jsonl").read_text() for part in ("train", "heldout"))
        assert "Adds one" in train and "two" not in train
        assert "Adds two" in heldout and "one" not in heldout
    rows = [json.loads(line) for line in (tmp_path / "chat.train.jsonl").read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in rows] == ["Adds one to a number.", library["kept.py"].rstrip()]


def test_heldout_share_of_the_real_library(monkeypatch):
    import stdlib_data

    names = [name for name, _ in stdlib_data.standard_library_files()]
    share = sum(stdlib_data.is_heldout(name) for name in names) / len(names)
    assert len(names) > 100
    assert 0.02 < share < 0.1


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path):
    shutil.copytree(EXAMPLES.parent / "recipes", tmp_path / "recipes")
    command = [sys.executable, EXAMPLES / "demo.py", "--max-steps", "12"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "out/demo/report.json").read_text())
    pretraining = report["stages"]["1-pretrain"]
    assert pretraining["bits_per_byte_at_end"] < pretraining["bits_per_byte_at_start"]
    int4, pte = (report["models"][f"INT4 QAT, {name}"]["answers"] for name in ("PyTorch", ".pte"))
    assert pte == pytest.approx(int4, rel=0.02)
    assert (tmp_path / "out/demo/demo.png").read_bytes().startswith(b"\x89PNG")
    assert report["sample"] in result.stdout


@pytest.mark.slow
def test_export_benchmark_takes_both_exporters(tmp_path):
    pytest.importorskip("optimum.exporters.executorch", reason="optimum-executorch is not installed: make setup")
    result = run_benchmark("bench_export.py", "--sizes", "tiny", "--max-seq-len", "64", "--directory", str(tmp_path))
    default, optimum = result["exports"]
    assert (default["moe_op"], default["expert_bits"]) == ("mobilemoe::decoder_layer", 4)
    assert (optimum["moe_op"], optimum["expert_bits"]) == ("llama::quantized_moe_ffn", 8)
    for row in (default, optimum):
        assert row["seconds"] > row["stage_seconds"]["lower"] > 0
        assert row["peak_memory_bytes"] > row["pte_bytes"] > 0
        assert row["cosine"] > 0.999 and row["max_seq_len"] == 64
    assert not list(tmp_path.glob("tiny-*"))
