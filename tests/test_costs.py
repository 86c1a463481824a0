"""Counts, bytes, FLOPs and device speed, against models, files, torch's FLOP counter and published measurements."""

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stand_ins import bench_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from mobilemoe.costs import (
    Device,
    attention_flops,
    calibrate,
    decode_bytes,
    expected_experts,
    inference_flops,
    int4_bytes,
    kv_cache_bytes,
    memory_bytes,
    prefill_matmul_flops,
    program_bytes,
    read_device,
    training_flops,
    weight_bytes_read,
)
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {
    "s": MobileMoEConfig(),
    "m": MobileMoEConfig.from_pretrained(RECIPES / "mobilemoe-m"),
    "l": MobileMoEConfig.from_pretrained(RECIPES / "mobilemoe-l"),
}


@pytest.mark.parametrize("size", SIZES)
def test_counts_equal_those_of_a_model_without_memory(size):
    config = SIZES[size]
    with torch.device("meta"):
        model = MobileMoEForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    assert config.num_total_parameters == total + biases
    active = sum(
        parameter.numel() * (config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    )
    assert config.num_active_parameters == active
    assert training_flops(config, 10) == 60 * active and inference_flops(config) == 2 * active


# Predicted from the published tensor formats; the released S-QAT file is this and a header.
@pytest.mark.parametrize(("size", "num_bytes"), [("s", 713_863_008), ("m", 1_590_916_144), ("l", 3_004_279_040)])
def test_int4_bytes_of_the_released_sizes(size, num_bytes):
    assert sum(int4_bytes(SIZES[size]).values()) == num_bytes


def test_int4_bytes_equal_a_saved_file(int4_checkpoint, tiny_config):
    file = int4_checkpoint / "model.safetensors"
    (header,) = struct.unpack("<Q", file.open("rb").read(8))
    assert sum(int4_bytes(tiny_config).values()) == file.stat().st_size - 8 - header
    groups = {"embed": "embedding", "self_attn": "attention", "shared": "shared_expert", ".experts.": "experts"}
    groups |= {"router": "router"}
    found = dict.fromkeys(int4_bytes(tiny_config), 0)
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            part = next((part for key, part in groups.items() if key in name), "norms_and_biases")
            found[part] += tensors.get_tensor(name).nbytes
    assert found == int4_bytes(tiny_config)


def test_widths_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="intermediate_size_mlp=40 is not divisible by the INT4 group of 32"):
        int4_bytes(MobileMoEConfig(intermediate_size_mlp=40))


# Equation 5 with INT8 entries, MB at 1k, 4k and 8k tokens (paper, from a secondary source).
@pytest.mark.parametrize(
    ("size", "megabytes"), [("s", (10.5, 41.9, 83.9)), ("m", (13.6, 54.5, 109.1)), ("l", (16.8, 67.1, 134.2))]
)
def test_kv_cache_of_the_paper(size, megabytes):
    for context, expected in zip((1024, 4096, 8192), megabytes, strict=True):
        assert kv_cache_bytes(SIZES[size], context, bits=8) / 1e6 == pytest.approx(expected, abs=0.06)
    with pytest.raises(ValueError, match="context=0 holds no token"):
        kv_cache_bytes(SIZES["s"], 0)


def test_memory_equals_that_of_an_exported_program(tiny_config, tiny_model):
    from mobilemoe.export.program import MOE_MODULES, ExportModel, ProgramOptions

    weights = sum(program_bytes(tiny_config, 32).values())
    for kv_cache, bits in (("fp32", 32), ("bf16", 16), ("int8", 8)):
        options = ProgramOptions(32, expert_bits=4, kv_cache=kv_cache)
        program = ExportModel(quantize(copy.deepcopy(tiny_model)), options, MOE_MODULES["mobilemoe"])
        caches = [buffer.nbytes for name, buffer in program.named_buffers() if "_cache" in name]
        assert memory_bytes(tiny_config, 32, bits) == weights + sum(caches)
        assert len(caches) == 2


def test_flops_equal_those_that_torch_counts(tiny_config, tiny_model, input_ids):
    tiny_model.set_attn_implementation("eager")
    tiny_model.set_experts_implementation("eager")
    cache = DynamicCache(config=tiny_config)
    with torch.no_grad():
        tiny_model(input_ids[:1, :-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            tiny_model(input_ids[:1, -1:], cache=cache)
    context = input_ids.shape[1]
    predicted = inference_flops(tiny_config) + attention_flops(tiny_config, 1, context)
    assert counter.get_total_flops() == predicted
    assert prefill_matmul_flops(tiny_config, 1) == inference_flops(tiny_config)
    # A prompt is its tokens one after the other.
    one_by_one = sum(attention_flops(tiny_config, 1, position) for position in range(1, context + 1))
    assert attention_flops(tiny_config, context) == one_by_one


@pytest.mark.parametrize("size", SIZES)
def test_program_bytes_by_part(size):
    """tests/test_export.py compares the sum with real files."""
    config = SIZES[size]
    parts, packed = program_bytes(config, 4096), int4_bytes(config)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert parts["norms_and_biases"] == 4 * (norms + config.num_hidden_layers * config.num_local_experts)
    assert parts["rotary"] == 4 * 4096 * config.head_dim
    same = ("embedding", "attention", "experts", "shared_expert", "router")
    assert [parts[name] for name in same] == [packed[name] for name in same] and "head" not in parts
    # ExecuTorch's operator: 10 bits a weight in place of 4.5, and XNNPACK's copy of the head.
    stock = program_bytes(config, 4096, expert_bits=8, moe_op="llama::quantized_moe_ffn")
    assert stock["experts"] * 4.5 == parts["experts"] * 10 and stock["head"] == parts["embedding"]


def test_bytes_of_a_decoded_token_are_those_of_the_tensors_it_reads(int4_checkpoint, tiny_config):
    share = tiny_config.num_experts_per_tok / tiny_config.num_local_experts
    with safe_open(int4_checkpoint / "model.safetensors", "pt") as tensors:
        read = sum(tensors.get_tensor(name).nbytes * (share if ".experts." in name else 1) for name in tensors.keys())
    assert weight_bytes_read(tiny_config) == pytest.approx(read)
    cache = kv_cache_bytes(tiny_config, 24)
    assert decode_bytes(tiny_config, 24) == pytest.approx(read + cache)
    # A long prompt reads everything once.
    assert weight_bytes_read(tiny_config, 10_000) == pytest.approx(sum(int4_bytes(tiny_config).values()))


def test_expected_experts_of_random_routing():
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 8, 32):
        chosen = torch.rand(4000, tokens, 60, generator=generator).topk(4).indices.flatten(1)
        reached = torch.zeros(4000, 60).scatter_(1, chosen, 1.0).sum(dim=1)
        error = 4 * reached.std().item() / 4000**0.5
        assert expected_experts(60, 4, tokens) == pytest.approx(reached.mean().item(), abs=error + 1e-9)


# Decode tokens per second by context (paper, from a secondary source).
S25 = {"m": {256: 83.6, 8192: 15.4}, "l": {256: 53.4, 512: 43, 2048: 23, 8192: 8.9}}
IPHONE = {"s": {256: 204.6, 8192: 32.2}, "m": {256: 106.8, 8192: 17.2}, "l": {256: 59.4, 8192: 10.8}}


def test_phones_measured_with_s_predict_m_and_l():
    s25 = read_device("galaxy-s25")
    iphone = calibrate(SIZES["s"], list(IPHONE["s"].items()), kv_bits=8)
    # How good the description of a device by four rates is; docs/scaling.md says the same.
    for device, published, error in ((s25, S25, 0.16), (iphone, IPHONE, 0.10)):
        for size, speeds in published.items():
            for context, speed in speeds.items():
                assert device.decode_tokens_per_second(SIZES[size], context) == pytest.approx(speed, rel=error)
    # Prefill of L, 125 and 79 tokens per second as published, comes out too fast.
    for tokens, speed in ((512, 125), (2048, 79)):
        assert 1.2 < tokens / s25.prefill_seconds(SIZES["l"], tokens) / speed < 1.4


def test_rates_of_s_are_too_slow_for_a_dense_model_at_short_context():
    # MobileLLM-Pro: 30 layers, 20 heads of 64 channels, 4.5 bits per weight. docs/scaling.md says the same.
    s25 = read_device("galaxy-s25")
    assert s25.decode_attention_rate is not None
    for context, predicted, published in ((256, 40, 61.3), (8192, 10.1, 10.6)):
        seconds = 1_084_453_120 * 4.5 / 8 / s25.bandwidth + 4 * 30 * 20 * 64 * context / s25.decode_attention_rate
        assert 1 / seconds == pytest.approx(predicted, rel=0.01) and predicted < published


def test_calibration_recovers_a_device():
    config = SIZES["s"]
    device = Device(25e9, 270e9, 15e9, 46e9)
    decode = [(context, device.decode_tokens_per_second(config, context)) for context in (256, 1024, 4096)]
    prefill = [(tokens, tokens / device.prefill_seconds(config, tokens)) for tokens in (1024, 4096)]
    found = calibrate(config, decode, prefill)
    for name in ("bandwidth", "rate", "decode_attention_rate", "prefill_attention_rate"):
        assert found.__dict__[name] == pytest.approx(device.__dict__[name], rel=1e-6)
    # One context: what is predicted there is what was measured there.
    found = calibrate(config, decode[:1], prefill[:1])
    assert found.decode_attention_rate is None
    assert found.decode_tokens_per_second(config, 256) == pytest.approx(decode[0][1])
    assert found.prefill_seconds(config, 1024) == pytest.approx(1024 / prefill[0][1])


def test_a_short_prefill_is_bound_by_reading_and_a_device_without_rate_predicts_none():
    device = Device(1e9, 1e15)
    assert device.prefill_seconds(SIZES["s"], 2) == pytest.approx(weight_bytes_read(SIZES["s"], 2) / 1e9, rel=1e-3)
    assert Device(1e9).prefill_seconds(SIZES["s"], 512) is None


def test_devices_by_name(tmp_path, monkeypatch):
    assert read_device("galaxy-s25").name == "Galaxy S25, 4 threads"
    with pytest.raises(ValueError, match="No such file or known device: pixel. .* or one of: galaxy-s25"):
        read_device("pixel")
    # A file of that name goes first.
    monkeypatch.chdir(tmp_path)
    content = {"device": "desk", "config": SIZES["s"].to_dict(), "decode": [{"context": 256, "tokens_per_second": 50}]}
    Path("galaxy-s25").write_text(json.dumps(content))
    assert read_device("galaxy-s25").name == "desk"


def test_device_files(tmp_path):
    file = tmp_path / "bench.json"
    content = {"device": "desk", "config": SIZES["s"].to_dict(), "decode": [{"context": 256, "tokens_per_second": 50}]}
    file.write_text(json.dumps(content | {"anything": 1}))
    device = read_device(file)
    assert device.name == "desk" and device.decode_tokens_per_second(SIZES["s"], 256) == pytest.approx(50)
    for broken in ("{", json.dumps({"config": {}}), json.dumps(content | {"decode": [{"context": 1}]})):
        file.write_text(broken)
        with pytest.raises(ValueError, match="does not hold the measurements of a device: .* give --bandwidth"):
            read_device(file)
    # What `mobilemoe bench` wrote of a model in BF16, whose bytes are others.
    bench = bench_result(bf16=SIZES["s"])
    file.write_text(json.dumps(bench))
    with pytest.raises(ValueError, match="no MobileMoE model with packed weights"):
        read_device(file)
    model = bench["models"]["bf16"]
    packed = model["config"] | {"quantization": {"bits": 4}}
    bench["models"]["int4"] = model | {"config": packed, "lengths": {"512": model["lengths"]["512"]}}
    file.write_text(json.dumps(bench))
    device = read_device(file)
    assert device.name == "Test CPU, 1 threads" and device.kv_bits == 16
    # Half of the new tokens are in the cache on average.
    assert device.decode_tokens_per_second(SIZES["s"], 512 + 24) == pytest.approx(21.5)
    assert device.prefill_seconds(SIZES["s"], 512) == pytest.approx(512 / 100)
    file.write_text(json.dumps(content | {"decode": []}))
    with pytest.raises(ValueError, match="at least one decode measurement"):
        read_device(file)
    with pytest.raises(ValueError, match="-1 tokens per second at 256 tokens cannot be"):
        calibrate(SIZES["s"], [(256, -1)])
    with pytest.raises(ValueError, match="bandwidth=-1 of a device cannot work"):
        Device(-1)
