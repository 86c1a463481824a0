"""`optimum-cli export executorch`: MobileMoE goes to our exporter, everything else takes the stock path."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig


pytest.importorskip("optimum.exporters.executorch", reason="optimum-executorch is not installed: make setup")

from optimum.commands.export.executorch import ExecuTorchExportCommand, parse_args_executorch  # noqa: E402
from optimum.commands.register import register_mobilemoe  # noqa: E402


def stock_arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parse_args_executorch(parser)
    return parser.parse_args(["--model", "m", "--task", "text-generation", "--recipe", "xnnpack", *given])


def test_flags_with_a_meaning_are_honoured():
    translate = register_mobilemoe.export_arguments
    plain = ["--model", "m", "--output", "o", "--moe-op", "llama"]
    assert translate(stock_arguments("--output_dir", "o")) == plain
    same = "--qlinear 8da4w --qlinear_group_size 32 --qembedding 4w --qembedding_group_size 32 --dtype float32"
    same += " --device cpu --use_custom_sdpa --use_custom_kv_cache"
    assert translate(stock_arguments("--output_dir", "o", *same.split())) == plain
    more = translate(stock_arguments("--output_dir", "o", "--max_seq_len", "128", "--qembedding", "8w"))
    assert more == [*plain, "--max-seq-len", "128", "--embedding-bits", "8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--qlinear 4w", "--qlinear 4w cannot be honoured .* INT8 activations. Set it to 8da4w"),
        ("--qlinear_group_size 64", "groups of 32"),
        ("--qembedding_group_size 64", "groups of 32"),
        ("--qlinear_packing_format tile_packed_to_4d", "for CUDA"),
        ("--qlinear_encoder 8da4w", "no encoder. Leave it out"),
        ("--qlinear_encoder_group_size 32", "no encoder"),
        ("--qembedding_encoder 4w", "no encoder"),
        ("--disable_dynamic_shapes", "token by token"),
        ("--dtype bfloat16", "compute in FP32"),
        ("--device cuda", "on CPUs"),
        ("--recipe coreml_fp32", "XNNPACK"),
        ("--task fill-mask", "language model"),
    ],
)
def test_other_flags_are_refused_with_the_reason(flags, message):
    with pytest.raises(SystemExit, match=message):
        register_mobilemoe.export_arguments(stock_arguments("--output_dir", "o", *flags.split()))


def test_output_directory_is_needed():
    with pytest.raises(SystemExit, match="--output_dir is missing"):
        register_mobilemoe.export_arguments(stock_arguments())


@pytest.mark.parametrize("present", [True, False])
def test_other_models_take_the_stock_path(present, tmp_path, monkeypatch):
    if present:
        LlamaConfig().save_pretrained(tmp_path / "llama")
    calls = []
    monkeypatch.setattr("optimum.exporters.executorch.main_export", lambda **arguments: calls.append(arguments))
    command = ExecuTorchExportCommand.__new__(ExecuTorchExportCommand)
    command.args = stock_arguments("--output_dir", "o", "--qlinear", "4w", "--qembedding", "8w")
    command.args.model = str(tmp_path / "llama")
    command.run()
    expected = {"task": "text-generation", "recipe": "xnnpack", "output_dir": Path("o"), "qlinear": "4w"}
    expected |= {"qembedding": "8w", "model_name_or_path": str(tmp_path / "llama")}
    assert calls == [expected]


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "executorch", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line_ends_in_our_words(text_checkpoint, tmp_path):
    arguments = ("--model", str(text_checkpoint), "--task", "text-generation", "--recipe", "xnnpack")
    result = optimum_cli(*arguments, "--output_dir", str(tmp_path / "out"), "--max_seq_len", "1000")
    assert result.returncode != 0
    assert "max_seq_len=1000 is outside the model's context of 256 tokens" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stock_command_writes_the_program_of_the_other_door(text_checkpoint, pte_directory, tmp_path):
    arguments = ("--model", str(text_checkpoint), "--task", "text-generation", "--recipe", "xnnpack")
    result = optimum_cli(*arguments, "--output_dir", str(tmp_path / "out"), "--max_seq_len", "64")
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = (json.loads((path / "export.json").read_text()) for path in (pte_directory, tmp_path / "out"))
    for name in ("weights_sha256", "expert_bits", "max_seq_len", "operators", "pte_bytes"):
        assert ours[name] == theirs[name]
    # Not to the last digit: PyTorch and XNNPACK sum in another order on another number of threads.
    for name in ("pte_to_checkpoint", "pte_to_pytorch_with_the_same_roundings"):
        cosines = [report["parity"][name]["cosine_mean"] for report in (ours, theirs)]
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)
