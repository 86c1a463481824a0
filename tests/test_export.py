"""Checkpoints of every kind through the exporter, against PyTorch and in every runner; bad requests write nothing."""

import argparse
import inspect
import json
import keyword
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from mobilemoe.cli import main
from mobilemoe.costs import program_bytes
from mobilemoe.export import exporter as export_module
from mobilemoe.export.exporter import export_checkpoint
from mobilemoe.export.glm4_moe import export_glm4_moe
from mobilemoe.export.mlx import export_mlx
from mobilemoe.export.program import MOE_MODULES, ProgramOptions
from mobilemoe.export.roundings import rounded_as
from mobilemoe.integrity import PROGRAM_HEADER
from mobilemoe.runtime import CheckpointModel, PteModel
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels import BuildError
from modeling_mobilemoe.quantization_mobilemoe import INT4_BLOCK


EXPORT_FILES = {"model.pte", "export.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
TEXT = "def parse(text):\n    return text.split()\n"


@pytest.fixture(scope="module")
def pte(pte_directory):
    return PteModel(pte_directory)


@pytest.fixture(scope="module")
def qat_directory(qat_checkpoint, tmp_path_factory):
    """INT4 experts along the input, from training to the operator: nothing is rounded twice."""
    output = tmp_path_factory.mktemp("export") / "qat"
    main(["export", "--model", str(qat_checkpoint), "--output", str(output), "--expert-bits", "4"])
    return output


@pytest.fixture(scope="module")
def evaluation_directory(float_text_checkpoint, tmp_path_factory):
    """Full precision quantised at export, with every option that changes the program."""
    output = tmp_path_factory.mktemp("export") / "evaluation"
    options = ["--kv-cache", "int8", "--all-logits", "--experts-file", "--embedding-bits", "8", "--max-seq-len", "48"]
    options += ["--moe-op", "llama"]
    main(["export", "--model", str(float_text_checkpoint), "--output", str(output), *options])
    return output


@pytest.fixture(scope="module")
def kernel_directory(text_checkpoint, tmp_path_factory):
    """Packed as released, on the operator that reads it so: what an export does by itself."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler and CMake")
    output = tmp_path_factory.mktemp("export") / "kernel"
    main(["export", "--model", str(text_checkpoint), "--output", str(output), "--max-seq-len", "64"])
    return output


@pytest.fixture(scope="module")
def float_directory(float_text_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "float"
    return export_checkpoint(float_text_checkpoint, output, weights="fp32", max_seq_len=32)


@pytest.fixture(scope="module")
def bf16_directory(float_text_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "bf16"
    main(["export", "--model", str(float_text_checkpoint), "--output", str(output), "--weights", "bf16"])
    return output


def report_of(directory):
    return json.loads((directory / "export.json").read_text())


def test_directory_is_complete_and_describes_itself(pte_directory):
    assert EXPORT_FILES <= {path.name for path in pte_directory.iterdir()}
    report = report_of(pte_directory)
    assert report["moe_op"] == "llama::quantized_moe_ffn"
    assert report["max_seq_len"] == 64
    # The released grid groups along the output: INT8 by itself, and the loss is on record.
    assert report["expert_bits"] == 8 and report["experts_rounded_twice"]
    assert report["expert_rounding_sqnr_db"] > 40
    assert report["eos_ids"] == [497, 504]
    assert report["pte_bytes"] == (pte_directory / "model.pte").stat().st_size
    assert {"llama::quantized_moe_ffn.out", "llama::custom_sdpa.out", "llama::update_cache.out"} <= set(
        report["operators"]
    )
    assert report["seconds"]["total"] > report["seconds"]["lower"] > 0
    assert list(pte_directory.parent.iterdir()) == [pte_directory]


@pytest.mark.parametrize(
    ("fixture", "sources"),
    [
        ("pte_directory", {"expert grid", "BF16 scales", "INT8 activations"}),
        ("kernel_directory", {"INT8 activations", "INT8 expert activations", "INT8 KV cache"}),
        ("qat_directory", {"BF16 scales", "INT8 activations"}),
        ("evaluation_directory", {"INT4 weights", "BF16 scales", "INT8 activations", "INT8 KV cache"}),
        ("float_directory", set()),
        ("bf16_directory", {"BF16 arithmetic"}),
    ],
)
def test_program_is_pytorch_with_the_same_roundings(fixture, sources, request):
    parity = report_of(request.getfixturevalue(fixture))["parity"]
    # A KV cache of INT8 also rounds queries, which is not among what PyTorch imitates.
    at_least = 0.999 if fixture in ("evaluation_directory", "kernel_directory") else 0.9999
    assert parity["pte_to_pytorch_with_the_same_roundings"]["cosine_mean"] >= at_least
    assert parity["prefill_to_token_by_token"]["cosine_mean"] >= 0.9999
    if fixture == "kernel_directory":
        # No noise at all: our operators and their reference have the same bits, for any number of tokens.
        assert parity["pte_to_pytorch_with_the_same_roundings"]["sqnr_db"] > 300
        assert parity["prefill_to_token_by_token"]["sqnr_db"] > 300
    assert set(parity["sources"]) == sources


@pytest.mark.parametrize("fixture", ["pte_directory", "qat_directory"])
def test_program_is_the_checkpoint_on_its_grid(fixture, request):
    """INT8 experts, or INT4 experts along the input: little is lost against the packed model itself."""
    report = report_of(request.getfixturevalue(fixture))
    assert report["expert_bits"] == (8 if fixture == "pte_directory" else 4)
    assert report["experts_rounded_twice"] == (fixture == "pte_directory")
    assert report["parity"]["pte_to_checkpoint"]["cosine_median"] >= 0.9999


def test_kernel_program_holds_the_experts_of_the_checkpoint(kernel_directory, text_checkpoint):
    report = report_of(kernel_directory)
    assert report["moe_op"] == "mobilemoe::decoder_layer" and report["expert_axis"] == "output"
    assert report["expert_bits"] == 4 and not report["experts_rounded_twice"]
    assert "mobilemoe::decoder_layer.out" in report["operators"]
    assert not any("quantized_moe_ffn" in name for name in report["operators"])
    assert report["parity"]["pte_to_checkpoint"]["cosine_median"] >= 0.999
    # The bytes themselves, wherever the program put them.
    program = (kernel_directory / "model.pte").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint)
    for layer in model.model.layers:
        experts = layer.feed_forward.experts
        for tiles in experts.layouts:
            assert experts.tiles_of(tiles).numpy().tobytes() in program, tiles


def test_operator_follows_what_the_experts_need(qat_checkpoint, text_checkpoint, tmp_path, monkeypatch, caplog):
    assert [export_module.default_moe_op(axis, None)[0] for axis in ("output", None)] == ["mobilemoe", "mobilemoe"]
    assert export_module.default_moe_op("input", None) == (
        "llama",
        "because the experts are grouped along their input, which ours do not read",
    )
    assert export_module.default_moe_op("output", 8) == ("llama", "because of expert_bits=8")
    for checkpoint, options, message in (
        (qat_checkpoint, {}, "INT4 experts along their output, not experts along their input. Set moe_op='llama'"),
        (text_checkpoint, {"expert_bits": 8}, "not expert_bits=8. Set moe_op='llama'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(checkpoint, tmp_path / "out", moe_op="mobilemoe", **options)

    def fail():
        raise BuildError("CMake is missing: pip install cmake.")

    monkeypatch.setattr(export_module, "load_executorch", fail)
    assert export_module.default_moe_op("output", None) == (
        "llama",
        "many times slower, because ours does not compile here",
    )
    assert "the experts go to llama::quantized_moe_ffn: CMake is missing" in caplog.text
    with pytest.raises(ValueError, match="not available: CMake is missing: pip install cmake. Or set moe_op='llama'"):
        export_checkpoint(text_checkpoint, tmp_path / "out", moe_op="mobilemoe")


def test_full_precision_program_has_only_float_noise(float_directory, float_text_checkpoint):
    report = report_of(float_directory)
    assert report["moe_op"] is None
    assert report["parity"]["pte_to_checkpoint"]["cosine_min"] > 0.999999
    assert report["parity"]["greedy_tokens_equal"] == report["parity"]["greedy_tokens"]
    checkpoint = CheckpointModel(float_text_checkpoint, dtype=torch.float32)
    tokens = checkpoint.encode(TEXT)[:32]
    torch.testing.assert_close(
        PteModel(float_directory).all_logits(tokens), checkpoint.all_logits(tokens), rtol=1e-3, atol=1e-3
    )


def test_bf16_program_computes_as_pytorch_in_bf16(bf16_directory, float_text_checkpoint):
    report = report_of(bf16_directory)
    assert report["weights"] == "bf16" and report["moe_op"] is None
    assert report["parity"]["pte_to_checkpoint"]["cosine_median"] > 0.9999
    config = AutoModelForCausalLM.from_pretrained(float_text_checkpoint).config
    # Table and head are one tensor in the file.
    said = sum(program_bytes(config, 256, weights="bf16", moe_op=None).values())
    assert 0 < report["pte_bytes"] - said < 2 * config.vocab_size * config.hidden_size
    model = AutoModelForCausalLM.from_pretrained(float_text_checkpoint, dtype=torch.bfloat16)
    program = PteModel(bf16_directory)
    tokens = program.encode(TEXT)[:24]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].float()
    assert torch.cosine_similarity(program.all_logits(tokens), expected).median() > 0.9999


def test_program_agrees_with_the_checkpoint(pte, text_checkpoint):
    checkpoint = CheckpointModel(text_checkpoint, dtype=torch.float32)
    tokens = checkpoint.encode(TEXT)
    expected, actual = checkpoint.all_logits(tokens), pte.all_logits(tokens)
    similarity = torch.cosine_similarity(actual, expected, dim=1)
    # What is left is INT8 activations and XNNPACK's rounding of scales; in random weights, a token whose fourth and
    # fifth expert nearly tie may take the other one.
    assert similarity.median() > 0.999
    assert (similarity > 0.999).float().mean() >= 0.9


def test_quantising_at_export_is_quantising_before_it(evaluation_directory, float_text_checkpoint):
    report = report_of(evaluation_directory)
    # Groups along the operator's axis from the start: one rounding, in INT4.
    assert report["expert_bits"] == 4 and not report["experts_rounded_twice"]
    model = AutoModelForCausalLM.from_pretrained(float_text_checkpoint, dtype=torch.float32)
    quantize(model, Int4Format("input"))
    program = PteModel(evaluation_directory)
    tokens = program.encode(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    assert torch.cosine_similarity(program.all_logits(tokens), expected).median() > 0.999


def test_experts_lie_in_a_file_of_their_own(evaluation_directory, tmp_path):
    report = report_of(evaluation_directory)
    experts = evaluation_directory / "experts.ptd"
    assert report["ptd_bytes"] == experts.stat().st_size > 8 * 3 * 64 * 32 * 2 * 0.75
    copy = tmp_path / "pte"
    shutil.copytree(evaluation_directory, copy)
    (copy / "experts.ptd").unlink()
    with pytest.raises(ValueError, match="experts.ptd is missing: it holds the experts"):
        PteModel(copy)


def test_all_logits_in_one_call(evaluation_directory):
    program = PteModel(evaluation_directory)
    tokens = list(range(3, 40))
    together = program.all_logits(tokens)
    assert together.shape == (37, 512)
    stepped = torch.stack([program.forward([token], position) for position, token in enumerate(tokens)])
    assert torch.cosine_similarity(together, stepped).median() > 0.999
    with pytest.raises(ValueError, match="exceed the context of 48 tokens"):
        program.all_logits([3] * 49)


@pytest.mark.parametrize("fixture", ["pte_directory", "qat_directory", "kernel_directory"])
def test_prefill_in_one_call_in_chunks_and_token_by_token(fixture, request):
    program = PteModel(request.getfixturevalue(fixture))
    # To the last position of the context, and one past it.
    tokens = list(range(3, 3 + program.max_seq_len))
    whole = program.forward(tokens, 0)
    for chunk in (1, 7, 32):
        for start in range(0, len(tokens), chunk):
            logits = program.forward(tokens[start : start + chunk], start)
        if fixture == "kernel_directory":
            assert torch.equal(logits, whole)
        else:
            # XNNPACK sums in another order for one token, and an input beside a tie moves by a step of INT8.
            assert torch.nn.functional.cosine_similarity(logits, whole, dim=-1) > 0.9999
            assert (logits - whole).abs().max() < 0.02 * whole.abs().max()
    with pytest.raises(ValueError, match=f"exceed the context of {program.max_seq_len} tokens"):
        program.forward([3], program.max_seq_len)


def ascii_prompt(model: PteModel, num_tokens: int) -> tuple[str, list[int]]:
    """A prompt whose answer is made of whole characters: runners hand out text token by token."""
    answers = {prompt: list(model.generate(model.encode(prompt), num_tokens)) for prompt in keyword.kwlist}
    return next(
        (prompt, tokens)
        for prompt, tokens in answers.items()
        if len(tokens) == num_tokens and all(model.decode([token]).isascii() for token in tokens)
    )


@pytest.mark.parametrize("fixture", ["pte_directory", "qat_directory", "evaluation_directory", "kernel_directory"])
def test_stock_runner_writes_the_same_tokens(fixture, request):
    """ExecuTorch's own LLM runner reads the program, its metadata, the experts file and tokenizer.json."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    directory = request.getfixturevalue(fixture)
    model = PteModel(directory)
    prompt, tokens = ascii_prompt(model, 8)
    files = [directory / "model.pte", directory / "tokenizer.json"]
    if report_of(directory)["experts_file"]:
        files.append(directory / "experts.ptd")
    runner = TextLLMRunner(*map(str, files))
    pieces: list[str] = []
    options = GenerationConfig(echo=False, temperature=0.0, max_new_tokens=8, num_bos=1)
    runner.generate(prompt, options, token_callback=pieces.append)
    assert "".join(pieces) == model.decode(tokens)


def test_optimum_executorch_writes_the_same_tokens(pte, pte_directory, kernel_directory):
    """In a process that has only imported optimum: the stock operators have to be registered by that, ours by us."""
    pytest.importorskip("optimum.executorch", reason="optimum-executorch is not installed: make setup")
    prompt, tokens = ascii_prompt(pte, 8)
    encoded = pte.encode(prompt)
    of_kernels = list(PteModel(kernel_directory).generate(encoded, 8))
    script = f"""
import json
from optimum.executorch import ExecuTorchModelForCausalLM

model = ExecuTorchModelForCausalLM.from_pretrained({str(pte_directory)!r})
limit = {len(encoded) + len(tokens)}
generated = model.generate({encoded}, max_seq_len=limit)
# For the tokenizer only, which wants to know the architecture.
import modeling_mobilemoe
from modeling_mobilemoe.kernels import load_executorch
from transformers import AutoTokenizer

load_executorch()
kernels = ExecuTorchModelForCausalLM.from_pretrained({str(kernel_directory)!r})
print(json.dumps({{
    "tokens": generated,
    "text": model.text_generation(AutoTokenizer.from_pretrained({str(pte_directory)!r}), {prompt!r}, False, limit),
    "ids": [model.bos_token_id, *model.eos_token_ids],
    "sizes": [model.max_cache_size, model.vocab_size],
    "kernels": kernels.generate({encoded}, max_seq_len={len(encoded) + len(of_kernels)}),
}}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "tokens": tokens,
        "text": pte.decode(tokens),
        "ids": [496, 497, 504],
        "sizes": [64, 512],
        "kernels": of_kernels,
    }


@pytest.mark.slow
def test_options_go_with_the_kernels_too(kernel_directory, float_text_checkpoint, tmp_path):
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    options = {"kv_cache": "int8", "all_logits": True, "experts_file": True, "embedding_bits": 8, "max_seq_len": 48}
    directory = export_checkpoint(float_text_checkpoint, tmp_path / "out", **options)
    report = report_of(directory)
    assert report["moe_op"] == "mobilemoe::decoder_layer" and report["expert_axis"] == "output"
    assert report["parity"]["pte_to_pytorch_with_the_same_roundings"]["cosine_mean"] >= 0.999
    assert set(report["parity"]["sources"]) == {
        *("INT4 weights", "INT8 activations", "INT8 expert activations", "INT8 KV cache")
    }
    # All experts are in the file beside the program.
    assert report["ptd_bytes"] > 2 * 8 * 3 * 64 * 32 * 0.5 and report["ptd_bytes"] + report["pte_bytes"] < 400_000
    program = PteModel(directory)
    tokens = program.encode(TEXT)[:40]
    similarity = torch.cosine_similarity(
        program.all_logits(tokens)[-1], PteModel(kernel_directory).forward(tokens, 0), 0
    )
    assert similarity > 0.99
    prompt, produced = ascii_prompt(program, 8)
    runner = TextLLMRunner(*(str(directory / name) for name in ("model.pte", "tokenizer.json", "experts.ptd")))
    pieces: list[str] = []
    runner.generate(
        prompt,
        GenerationConfig(echo=False, temperature=0.0, max_new_tokens=8, num_bos=1),
        token_callback=pieces.append,
    )
    assert "".join(pieces) == program.decode(produced)


@pytest.mark.slow
def test_shortest_context(text_checkpoint, tmp_path):
    program = PteModel(export_checkpoint(text_checkpoint, tmp_path / "out", max_seq_len=export_module.TRACED_TOKENS))
    tokens = list(range(3, 3 + program.max_seq_len))
    logits = program.forward(tokens, 0)
    for position, token in enumerate(tokens):
        stepped = program.forward([token], position)
    assert torch.cosine_similarity(logits, stepped, 0) > 0.9999
    # The token after the last position can still be read.
    assert len(list(program.generate(tokens, 5))) <= 1
    with pytest.raises(ValueError, match="exceed the context of 8 tokens"):
        program.forward([3], 8)


def test_size_is_what_was_said_before(
    pte_directory, kernel_directory, float_directory, text_checkpoint, float_text_checkpoint
):
    for directory, checkpoint in (
        (pte_directory, text_checkpoint),
        (kernel_directory, text_checkpoint),
        (float_directory, float_text_checkpoint),
    ):
        report = report_of(directory)
        config = AutoModelForCausalLM.from_pretrained(checkpoint).config
        widths = {name: report[name] for name in ("weights", "expert_bits", "embedding_bits")}
        said = sum(program_bytes(config, report["max_seq_len"], **widths, moe_op=report["moe_op"]).values())
        assert said <= report["pte_bytes"] <= said + 2 * 40_000 + 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_bits": 3}, "expert_bits=3 has no kernel here. Set 4 or 8"),
        ({"kv_cache": "int4"}, "kv_cache='int4' has no kernel here. Set fp32 or bf16 or int8"),
        ({"kv_cache": "bf16", "moe_op": "llama"}, "kv_cache='bf16' needs the operators of this package"),
        ({"weights": "int3"}, "weights='int3'"),
        ({"moe_op": "other"}, "moe_op='other' has no kernel here. Set mobilemoe or llama"),
        ({"max_seq_len": 257}, "outside the model's context of 256 tokens"),
        ({"max_seq_len": 7}, "or too short to trace. Set 8 to 256"),
        ({"weights": "fp32", "experts_file": True}, "no packed experts"),
        ({"weights": "fp32", "expert_bits": 4}, "no packed experts"),
        ({"weights": "bf16", "moe_op": "llama"}, "no packed experts"),
        ({"output_dir": "existing"}, "exists and would be overwritten"),
        ({"output_dir": "existing/file/out"}, "file is no directory one can write to"),
        ({"model": "missing"}, "There is no directory .*missing. Name a checkpoint"),
    ],
)
def test_requests_that_cannot_be_met_write_nothing(options, message, text_checkpoint, tmp_path):
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "file").touch()
    model = tmp_path / options.pop("model") if "model" in options else text_checkpoint
    output = tmp_path / options.pop("output_dir", "out")
    with pytest.raises((ValueError, OSError), match=message):
        export_checkpoint(model, output, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]
    assert [path.name for path in (tmp_path / "existing").iterdir()] == ["file"]


def with_rope_scaling(checkpoint, directory, **scaling):
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    return directory


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "rope_type='dynamic', whose frequencies change"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "attention factor of 1.139, and the kernels",
        ),
    ],
)
@pytest.mark.parametrize("export", [export_checkpoint, export_glm4_moe, export_mlx])
def test_rope_that_no_program_has_is_refused(scaling, message, export, text_checkpoint, tmp_path):
    checkpoint = with_rope_scaling(text_checkpoint, tmp_path / "checkpoint", **scaling)
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mlx_refuses_other_rope_rules(text_checkpoint, tmp_path):
    checkpoint = with_rope_scaling(text_checkpoint, tmp_path / "checkpoint", rope_type="linear", factor=4.0)
    with pytest.raises(ValueError, match="rope_type='linear', and the model file for MLX"):
        export_mlx(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_program_of_an_extended_context_is_the_checkpoint(text_checkpoint, tmp_path):
    checkpoint = with_rope_scaling(text_checkpoint, tmp_path / "checkpoint", rope_type="linear", factor=8.0)
    export_checkpoint(checkpoint, tmp_path / "out", max_seq_len=64)
    program = PteModel(tmp_path / "out")
    tokens = program.encode(TEXT)
    actual, expected, other = (
        model.last_logits(tokens, 0, 1).flatten() if model is program else model.all_logits(tokens)[-1]
        for model in (program, *(CheckpointModel(path, dtype=torch.float32) for path in (checkpoint, text_checkpoint)))
    )
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.999
    assert (actual - expected).norm() < 0.2 * (actual - other).norm()


def other_architecture(directory):
    LlamaConfig().save_pretrained(directory)


def no_config(directory):
    (directory / "config.json").unlink()


def no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def damaged_tokenizer(directory):
    file = directory / "tokenizer.json"
    file.write_text(file.read_text()[:-100])


def damaged_config(directory):
    (directory / "config.json").write_text("{")


def scale_that_is_no_number(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.feed_forward.shared_expert.down_proj.weight_scale"][3, 1] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def missing_weights(directory):
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_architecture, "is a llama model and this exporter writes MobileMoE programs"),
        (no_config, "has no config.json"),
        (damaged_config, "config.json does not hold the configuration of a model: it is not JSON"),
        (no_tokenizer, "has no tokenizer.json"),
        (damaged_tokenizer, "tokenizer.json does not hold a tokenizer: it is not JSON"),
        (scale_that_is_no_number, "scales that are zero, negative or not finite. The file is damaged"),
        (truncated, "cannot be read as safetensors"),
        (missing_weights, "no file named model.safetensors"),
    ],
)
def test_damaged_checkpoints_write_nothing(damage, message, text_checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(text_checkpoint, source)
    damage(source)
    with pytest.raises((ValueError, OSError), match=message):
        export_checkpoint(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_group_size_that_does_not_divide_is_named(tiny_config, tokenizer, tmp_path):
    from conftest import build_tiny_model

    config = type(tiny_config)(**tiny_config.to_dict() | {"intermediate_size": 48, "intermediate_size_mlp": 192})
    build_tiny_model(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="input dimension is not divisible by the group size 32"):
        export_checkpoint(tmp_path / "source", tmp_path / "out", moe_op="llama")
    assert not (tmp_path / "out").exists()


def test_too_little_disk_or_memory_is_said_before_the_start(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="0.00 GB free. Free space"):
        export_checkpoint(text_checkpoint, tmp_path / "deep" / "out")
    monkeypatch.undo()
    monkeypatch.setattr(export_module, "available_memory", lambda: 10**8)
    with pytest.raises(ValueError, match="0.1 GB are available. Use a larger machine"):
        export_checkpoint(text_checkpoint, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_needs_are_stated_before_the_start(tmp_path, monkeypatch, caplog):
    """S: the program is what its formats add up to, and full precision is in memory whole before it is packed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**10))
    monkeypatch.setattr(export_module, "available_memory", lambda: 10**10)
    caplog.set_level("INFO", logger="mobilemoe")
    config = MobileMoEConfig()
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in MobileMoEForCausalLM(config).parameters())
    stated = {}
    for config.quantization in (INT4_BLOCK, None):
        export_module.check_resources(
            config, ProgramOptions(8192, expert_bits=4), tmp_path / "out", MOE_MODULES["llama"]
        )
        said = re.search(r"(\d+) MB to write, about ([\d.]+) GB of memory", caplog.text)
        caplog.clear()
        stated[config.quantization is None] = float(said[2])
        # ExecuTorch's own arithmetic: 796 MB of experts, about 170 MB of everything else.
        assert 960 <= int(said[1]) <= 980
    assert stated[False] > 0.97 + 0.34
    assert stated[True] > max(stated[False], 4e-9 * num_parameters)


def test_long_stages_report_while_they_run(monkeypatch, caplog):
    caplog.set_level("INFO", logger="mobilemoe")
    monkeypatch.setattr(export_module.Stages, "report_every", 0.01)
    stages = export_module.Stages()
    with stages("lower"):
        time.sleep(0.2)
    assert "lower: 0 s so far, peak memory" in caplog.text
    assert stages.seconds["lower"] >= 0.2
    num_threads = threading.active_count()
    with pytest.raises(ValueError), stages("trace"):
        raise ValueError
    time.sleep(0.1)
    assert threading.active_count() <= num_threads and "trace" not in stages.seconds


class FakeProgram:
    """In the place of a lowered program, for what happens after the lowering."""

    executorch_program = SimpleNamespace(execution_plan=[SimpleNamespace(operators=[])])

    def write_to_file(self, file):
        header = PROGRAM_HEADER.pack(b"ET12", b"eh00", 32, 64, 64, 1_999_936)
        file.write(header + bytes(2_000_000 - len(header)))

    def write_tensor_data_to_file(self, directory):
        pass


def test_a_disk_that_fills_up_leaves_nothing(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "lower", lambda *_: FakeProgram())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(SystemExit, match="mobilemoe export: .*File too large"):
            main(["export", "--model", str(text_checkpoint), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_something_else_fails_the_export(text_checkpoint, tmp_path, monkeypatch):
    class Broken:
        has_all_logits = False

        def __init__(self, path):
            assert (path / "model.pte").is_file()

        def forward(self, tokens, start):
            return torch.randn(512)

        def generate(self, tokens, num_tokens):
            return iter([0] * num_tokens)

    monkeypatch.setattr(export_module, "lower", lambda *_: FakeProgram())
    monkeypatch.setattr(export_module, "PteModel", Broken)
    with pytest.raises(ValueError, match="does not compute this model: the signal to noise in dB of pte_to_pytorch"):
        export_checkpoint(text_checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_writing_leaves_nothing(number, tmp_path):
    script = """
import signal, sys, time
from modeling_mobilemoe.saving_mobilemoe import replace_when_complete
from mobilemoe.export.exporter import stop_signal_as_exit

# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_signal_as_exit(), replace_when_complete(sys.argv[1]) as partial:
    (partial / "model.pte").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.wait(30) != 0
    process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_output_and_the_next_one_cleans_up(tmp_path):
    script = """
import sys, time
from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

with replace_when_complete(sys.argv[1]) as partial:
    (partial / "model.pte").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    export_module.remove_remnants(tmp_path / "out")
    # Still at work: not touched.
    (partial,) = tmp_path.iterdir()
    assert (partial / "model.pte").exists()
    process.kill()
    process.wait(30)
    process.stdout.close()
    assert list(tmp_path.iterdir()) == [partial] and partial.name.startswith(".out.partial-")
    export_module.remove_remnants(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_named_before_work_starts(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(SystemExit, match=r"executorch\.exir is not installed\. pip install 'mobilemoe\[export\]'"):
        main(["export", "--model", str(text_checkpoint), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_512_tokens_are_those_of_pytorch(kernel_pte: Path, text_checkpoint: Path):
    """Greedy tokens of PyTorch on packed weights, and what the program says at each of them."""
    program = PteModel(kernel_pte)
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32).eval()
    tokens = program.encode(inspect.getsource(argparse))

    def logits(roundings: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """PyTorch's and the program's."""
        expected, actual = [], []
        with rounded_as(model, roundings, 4, on_kernels=True), torch.inference_mode():
            for window in range(16):
                path = tokens[1000 + 64 * window :][:32]
                path = model.generate(torch.tensor([path]), max_new_tokens=32, min_new_tokens=32, do_sample=False)[0]
                expected.append(model(path[None, :-1]).logits[0, 31:])
                actual.append(program.last_logits(path[:-1].tolist(), 0, 32))
        return torch.cat(expected), torch.cat(actual)

    expected, actual = logits({"INT8 activations", "INT8 expert activations", "INT8 KV cache"})
    assert len(expected) == 512 and torch.equal(actual, expected)
    expected, actual = logits(set())
    # Logits of this small model, unsure of most tokens, have a standard deviation of 2.3.
    gaps = expected.amax(-1) - expected.gather(-1, actual.argmax(-1, keepdim=True))[:, 0]
    assert (gaps <= 0.1).float().mean() >= 0.98
    assert torch.cosine_similarity(actual, expected, dim=-1).mean() >= 0.9998
