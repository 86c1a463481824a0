"""The benchmark of this machine: what it measures, what it refuses. Times are never asserted."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import bench_result
from transformers import AutoModelForCausalLM, LlamaConfig

from mobilemoe.bench import host as bench
from mobilemoe.bench import worker as bench_worker
from mobilemoe.bench.report import draw, tables
from mobilemoe.cli import main
from mobilemoe.costs import read_device
from mobilemoe.display import show
from mobilemoe.export import random_program as bench_programs
from mobilemoe.results import Benchmark
from modeling_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.packed_mobilemoe import Int4Module


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", ["S", "M", "L"])
def test_built_in_shapes_are_those_of_the_recipes(name: str):
    config = MobileMoEConfig(**json.loads((RECIPES / f"mobilemoe-{name.lower()}" / "config.json").read_text()))
    config.architectures = None
    assert bench_worker.shapes()[name].to_dict() == config.to_dict()


def test_dense_shape_has_the_published_size():
    config = bench_worker.shapes()["MobileLLM-Pro"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # "1.084B", https://arxiv.org/abs/2511.06719
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == 1.084


@torch.no_grad()
def test_random_model_is_packed_and_computes(tiny_config: MobileMoEConfig, input_ids: torch.Tensor, tmp_path):
    model = bench_worker.random_packed_model(copy.deepcopy(tiny_config))
    assert sum(isinstance(module, Int4Module) for module in model.modules()) == 2 * 8 + 1
    logits = model(input_ids).logits
    assert logits.isfinite().all() and logits.std() > 0
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(loaded(input_ids).logits, logits)
    # A token reads half of this model's 8 experts and all else, the embedding as the head.
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    experts = [layer.feed_forward.experts.state_dict().values() for layer in model.model.layers]
    unread = sum(tensor.numel() * tensor.element_size() for tensors in experts for tensor in tensors) // 2
    frequencies = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    # Packed weights lie in tiles by now.
    packed = [module for module in model.modules() if isinstance(module, Int4Module)]
    assert bench_worker.weight_bytes_per_token(model) == size - unread + frequencies and packed[0].is_tiled


@torch.no_grad()
def test_random_model_routes_tokens_to_most_experts(wide_model):
    """Or prefill would be timed on a few experts, and predictions of different tokens would agree by themselves."""
    model = wide_model(4)
    for layer in model.model.layers:
        layer.feed_forward.expert_bias.zero_()
    tokens = torch.randint(1024, (1, 256), generator=torch.Generator().manual_seed(0))
    output = model(tokens, output_router_logits=True)
    for logits in output.router_logits:
        load = torch.bincount(logits.topk(4).indices.flatten(), minlength=60) / 256
        assert load.count_nonzero() > 50 and load.max() < 0.5
    assert output.logits[0].argmax(-1).unique().numel() > 200


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_random_program_runs_and_is_profiled(tiny_config: MobileMoEConfig, tmp_path, dense: bool):
    pytest.importorskip("executorch", reason="needs the `export` extra")
    config = copy.deepcopy(tiny_config)
    if dense:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    bench_programs.write_random_program(config, tmp_path / "program", 40)
    model, loaded = bench_worker.load(str(tmp_path / "program"))
    tokens = list(range(5, 17))
    whole = model.forward(tokens, 0)
    for position, token in enumerate(tokens):
        stepped = model.forward([token], position)
    assert whole.isfinite().all() and whole.std() > 0
    assert torch.equal(stepped, whole)
    # The table once, as embedding and head; half of the experts, or none.
    size = (tmp_path / "program" / "model.pte").stat().st_size
    assert 0 < bench_worker.program_bytes_per_token(str(tmp_path / "program"), loaded) < size
    times = bench_worker.profile(str(tmp_path / "program"), tokens, 9)
    for phase in ("prefill", "decode"):
        assert times[phase]["mobilemoe::decoder_layer.out"] > times[phase]["mobilemoe::int4_linear.out"] > 0


@pytest.fixture(scope="module")
def result(int4_checkpoint: Path, tiny_checkpoint: Path, pte_directory: Path, tmp_path_factory) -> tuple[str, Path]:
    """Three models through the command: packed, full precision, exported."""
    directory = tmp_path_factory.mktemp("bench")
    models = ["--model", str(int4_checkpoint), str(tiny_checkpoint), str(pte_directory), "--threads", "1"]
    sizes = ["--prompt-lengths", "8", "24", "--new-tokens", "3", "--repeats", "2"]
    files = ["--json", str(directory / "bench.json"), "--picture", str(directory / "bench.png")]
    command = [sys.executable, "-m", "mobilemoe.cli", "bench", *models, *sizes, *files]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return completed.stdout, directory


@pytest.mark.slow
def test_result_has_every_number_with_its_spread(
    result, int4_checkpoint: Path, tiny_checkpoint: Path, pte_directory: Path
):
    stdout, directory = result
    measured = json.loads((directory / "bench.json").read_text())
    assert "{" not in stdout
    assert measured["machine"]["threads"] == 1
    assert list(measured["models"]) == [str(int4_checkpoint), str(tiny_checkpoint), str(pte_directory)]
    for path, model in measured["models"].items():
        is_pte = path == str(pte_directory)
        assert model["runtime"] == ("executorch" if is_pte else "pytorch")
        assert model["file_bytes"] == (Path(path) / ("model.pte" if is_pte else "model.safetensors")).stat().st_size
        assert "warm" in model["start_seconds"] and ("cold" in model["start_seconds"]) == (sys.platform == "linux")
        # More than the interpreter with PyTorch, less than all of a small machine.
        assert 1e8 < model["peak_memory_bytes"] < 4e9
        assert list(model["lengths"]) == ["8", "24"]
        for length, row in model["lengths"].items():
            for spread in (row["prefill_tokens_per_s"], row["first_token_ms"], row["decode_tokens_per_s"]):
                assert spread["repeats"] == 2
                assert 0 < spread["min"] <= spread["p10"] <= spread["median"] <= spread["p90"] <= spread["max"]
            fastest, slowest = row["prefill_tokens_per_s"]["max"], row["first_token_ms"]["min"]
            assert fastest == pytest.approx(int(length) / slowest * 1e3, rel=1e-2)
            assert is_pte or 0 < row["decode_of_memory_limit"] < 1
    packed, full, _ = measured["models"].values()
    assert packed["weight_bytes_per_token"] < full["weight_bytes_per_token"]


@pytest.mark.slow
def test_planner_reads_the_result(result):
    _, directory = result
    measured = json.loads((directory / "bench.json").read_text())
    packed, _, program = measured["models"].values()
    assert (packed["kv_bits"], program["kv_bits"]) == (16, 8)
    device = read_device(directory / "bench.json")
    assert device.name == f"{measured['machine']['cpu']}, 1 threads" and device.kv_bits == 16
    assert device.bandwidth > 0 and device.rate > 0
    dense = packed | {"config": {"model_type": "llama"}}
    (directory / "dense.json").write_text(json.dumps(measured | {"models": {"dense": dense}}))
    with pytest.raises(ValueError, match="has no MobileMoE model with packed weights"):
        read_device(directory / "dense.json")


@pytest.mark.slow
def test_table_and_picture_show_the_models(result, int4_checkpoint: Path):
    stdout, directory = result
    tables = stdout.splitlines()
    assert max(map(len, tables)) <= 80 and "prefill tok/s" in stdout
    # A long path takes several lines of its column.
    assert int4_checkpoint.name in "".join(line[:14].split("  ")[0].strip() for line in tables)
    assert (directory / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_tables_fit_80_columns_and_say_all(capsys, tmp_path):
    configs = {"S": MobileMoEConfig(), "out/a/checkpoint/of/a/long/name": MobileMoEConfig()}
    result = bench_result(**configs)
    for model in result["models"].values():
        model["start_seconds"] = {"cold": {"load": 1.25}, "warm": {"load": 0.25}}
        model["lengths"]["512"]["decode_of_memory_limit"] = 0.5
    result["models"]["S"]["operator_ms"] = {"512": {"decode": {"mobilemoe::moe_ffn.out": 12.3456}}}
    result = Benchmark.model_validate(result)
    show(*tables(result, paper=True))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed = " ".join(" ".join(lines).split())
    assert "S 128 100 (90-120) 1600 21.5 (20.2-22) 512 100 (90-120) 1600 21.5 (20.2-22) 50%" in printed
    assert "S 1.25 0.25 1,000" in printed and "mobilemoe::moe_ffn.out 12.346" in printed
    # What published.yaml has of the paper.
    assert "S 256 138" in printed and "MobileLLM-Pro 8192 10.6" in printed
    draw(result, tmp_path / "bench.png", paper=True)
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_tokens_of_a_text_are_a_stretch_of_it(text_checkpoint: Path):
    model, config = bench_worker.load(str(text_checkpoint))
    text = " ".join(map(str, range(200)))
    whole = model.encode(text)
    stretches = [bench_worker.choose_tokens(model, config.vocab_size, 20, seed, text) for seed in range(4)]
    for stretch in stretches:
        assert any(stretch == whole[start : start + 20] for start in range(len(whole) - 19))
    assert len({tuple(stretch) for stretch in stretches}) > 1
    with pytest.raises(ValueError, match=f"has {len(whole)} tokens and {len(whole) + 1} are needed"):
        bench_worker.choose_tokens(model, config.vocab_size, len(whole) + 1, 0, text)
    first, second = (bench_worker.choose_tokens(model, config.vocab_size, 20, seed, None) for seed in (0, 1))
    assert first != second and max(first + second) < config.vocab_size


def test_worker_measures_the_prompt_and_every_token(text_checkpoint: Path):
    model, _ = bench_worker.load(str(text_checkpoint))
    calls = []
    forward = model.forward
    model.forward = lambda tokens, start: calls.append((tokens, start)) or forward(tokens, start)
    answer = bench_worker.measure(model, list(range(10, 22)), 9)
    assert calls == [(list(range(10, 19)), 0), ([19], 9), ([20], 10), ([21], 11)]
    assert answer["first_token"] > 0 and len(answer["decode"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "S", "--repeats", "0"], "repeats=0 leaves nothing to measure. Set 1 or more."),
        (["--model", "S", "--new-tokens", "0"], "new_tokens=0 leaves nothing"),
        (
            ["--model", "MobileLLM-Pro", "--prompt-lengths", "0"],
            r"prompt_lengths=\[0\] must name lengths of 1 or more",
        ),
        (["--model", "S", "S"], "names one twice"),
        (["--model", "S", "--prompt-file", "README.md"], "no tokenizer, so it cannot use a prompt file"),
        (["--model", "no/such"], "no/such"),
    ],
)
def test_bad_requests_say_what_to_set(arguments: list[str], message: str, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=message):
        main(["bench", *arguments])


def test_context_and_lost_process_are_errors(int4_checkpoint: Path):
    with pytest.raises(SystemExit, match="has a context of 256 tokens and 260 are needed. Give shorter prompt"):
        main(["bench", "--model", str(int4_checkpoint), "--prompt-lengths", "250", "--new-tokens", "10"])
    with pytest.raises(ChildProcessError, match="ended with status 7"):
        bench.Worker([sys.executable, "-c", "raise SystemExit(7)"], 1)


def test_evicting_reads_from_the_disk_again(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"x" * 2**20)
    assert bench.model_files(tmp_path) == [path]
    assert bench.evict([path]) == (sys.platform == "linux")
    assert path.read_bytes() == b"x" * 2**20
    assert not bench.evict([])
