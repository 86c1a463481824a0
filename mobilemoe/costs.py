"""What a MobileMoE model costs: parameters, FLOPs, bytes in memory, bytes per token, and seconds on a measured device.

Bytes of weights are those of the INT4 format as this package writes it: 4.5 bits per weight with their FP16 scales, an
FP32 router, the tied embedding once. A checkpoint (`quantization_mobilemoe.py`) has norms in BF16, a program
(`export/program.py` with the operators of this package) in FP32, and the angles of its positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_mobilemoe.cache_mobilemoe import CACHE_BITS, CACHE_BLOCK
from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels.modules import DEFAULT_CACHE, MoEFFN

from .results import Benchmark, DeviceMeasurements, result_kind


# Measurements of devices that `mobilemoe plan --device` knows by name.
DEVICES = Path(__file__).parent / "plan/devices"
# Of an entry of the key-value cache, by default in an exported program and in the paper.
PROGRAM_KV_BITS = CACHE_BITS[DEFAULT_CACHE]
# Of every head's INT8 keys, and values, of a token in a program: an FP32 step.
INT8_CACHE_OVERHEAD = 4
# Bits that an operator for packed experts stores per group of 32 weights beside the integers: an FP16 scale in ours,
# an FP32 scale and an INT32 sum in ExecuTorch's.
MOE_GROUP_BITS = {MoEFFN.operator: 16, "llama::quantized_moe_ffn": 64}


def parameter_counts(config: MobileMoEConfig) -> dict[str, int]:
    """Weights by part; the embedding, which is the head too, once."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "embedding": config.vocab_size * hidden,
        "attention": layers * 2 * hidden * (query + key),
        "experts": layers * 3 * config.num_local_experts * hidden * config.intermediate_size,
        "shared_expert": layers * 3 * hidden * config.intermediate_size_mlp,
        "router": layers * config.num_local_experts * hidden,
        "norms_and_biases": (2 * layers + 1) * hidden + layers * config.num_local_experts,
    }


def packed_bytes(num_weights: int, bits: int = Int4Format.bits, group_bits: int = 16) -> int:
    """Bytes of weights in groups of 32, with `group_bits` per group beside the integers: 16 in our format."""
    return num_weights * bits // 8 + num_weights // Int4Format.group_size * group_bits // 8


def int4_bytes(config: MobileMoEConfig) -> dict[str, int]:
    """
    Bytes of a packed checkpoint by part, as in [`parameter_counts`]. Their sum is a saved file without its header:
    713,863,008 for S, whose released file has 713,916,240. The paper's first term, b_w / 8 * N_total (equation 5),
    leaves out scales and the FP32 router.

    Raises:
        ValueError: for a width that does not divide into groups of the format.
    """
    group = Int4Format.group_size
    for name, width in (
        ("hidden_size", config.hidden_size),
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim),
        ("2 * intermediate_size", 2 * config.intermediate_size),
        ("intermediate_size_mlp", config.intermediate_size_mlp),
    ):
        if width % group:
            raise ValueError(
                f"{name}={width} is not divisible by the INT4 group of {group}, so the model cannot be packed. "
                f"Set a multiple of {group}."
            )
    parts = {name: packed_bytes(count) for name, count in parameter_counts(config).items()}
    parts["router"] = 4 * parameter_counts(config)["router"]
    parts["norms_and_biases"] = 2 * parameter_counts(config)["norms_and_biases"]
    return parts


def program_bytes(
    config: MobileMoEConfig,
    context: int,
    weights: str = "int4",
    expert_bits: int = 4,
    embedding_bits: int = 4,
    moe_op: str | None = MoEFFN.operator,
) -> dict[str, int]:
    """
    Bytes of the weights in an exported `model.pte`, and its `.ptd`, by part: those of [`parameter_counts`], `head`
    where it is stored apart from the embedding, and `rotary`, cosine and sine of every position. The graph comes on
    top, some 30 KB per layer.

    Args:
        config (`MobileMoEConfig`): the shape.
        context (`int`): positions of the program.
        weights (`str`, defaults to `"int4"`): or `"fp32"`, `"bf16"`, as the exporter's option.
        expert_bits (`int`, defaults to 4): width of the experts, 4 or 8.
        embedding_bits (`int`, defaults to 4): width of the embedding, 4 or 8.
        moe_op (`str`, *optional*): operator of the experts, a key of `MOE_GROUP_BITS`; `None` in full precision.

    Raises:
        ValueError: as [`int4_bytes`].
    """
    counts = parameter_counts(config)
    if weights == "int4":
        assert moe_op is not None
        parts = int4_bytes(config)
        parts["experts"] = packed_bytes(counts["experts"], expert_bits, MOE_GROUP_BITS[moe_op])
        # Our operators read the head from the embedding; XNNPACK and ExecuTorch's wider embedding need their own copy.
        if moe_op != MoEFFN.operator or embedding_bits == 8:
            parts["head"] = parts["embedding"]
            parts["embedding"] = packed_bytes(counts["embedding"], embedding_bits)
    else:
        itemsize = 2 if weights == "bf16" else 4
        parts = {name: itemsize * count for name, count in counts.items()}
        if weights == "fp32":
            # XNNPACK has a copy of the table as its head.
            parts["head"] = parts["embedding"]
    parts["router"] = 4 * counts["router"]
    parts["norms_and_biases"] = 4 * counts["norms_and_biases"]
    parts["rotary"] = 4 * context * config.head_dim
    return parts


def kv_cache_bytes(config: MobileMoEConfig, context: int, bits: int = PROGRAM_KV_BITS) -> int:
    """
    Bytes of keys and values of `context` tokens (paper, equation 5, where `bits` is 8).

    Raises:
        ValueError: for a context below 1.
    """
    if context < 1:
        raise ValueError(f"context={context} holds no token. Set 1 or more.")
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context * bits // 8


def memory_bytes(config: MobileMoEConfig, context: int, kv_bits: int = PROGRAM_KV_BITS) -> int:
    """
    Weights and key-value cache of an exported program: M(N_total, T) of the paper (equation 5), with both as they are
    really stored.
    """
    positions = math.ceil(context / CACHE_BLOCK) * CACHE_BLOCK
    cache = kv_cache_bytes(config, positions, kv_bits)
    if kv_bits == 8:
        cache += 2 * config.num_hidden_layers * config.num_key_value_heads * positions * INT8_CACHE_OVERHEAD
    return sum(program_bytes(config, context).values()) + cache


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """
    Experts of a layer that at least one of `tokens` tokens reaches: `E (1 - (1 - k / E)^T)`.

    For tokens routed evenly and independently. Neighbours in real text share experts, so they reach fewer.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def weight_bytes_read(
    config: MobileMoEConfig, tokens: int = 1, expert_bits: int = 4, moe_op: str | None = MoEFFN.operator
) -> float:
    """
    Expected bytes of packed weights read in one pass over `tokens` tokens of one sequence, logits for the last.

    With one token: all but the routed experts, `top_k` of those, and the tied embedding once, as the head.

    Args:
        config (`MobileMoEConfig`): the shape.
        tokens (`int`, defaults to 1): of the pass.
        expert_bits (`int`, defaults to 4): width of the experts.
        moe_op (`str`, *optional*): as in [`program_bytes`]; `None` for a dense program, without routed experts.
    """
    parts = int4_bytes(config)
    if moe_op is None:
        return sum(parts.values()) - parts["experts"] - parts["router"]
    touched = expected_experts(config.num_local_experts, config.num_experts_per_tok, tokens) / config.num_local_experts
    experts = packed_bytes(parameter_counts(config)["experts"], expert_bits, MOE_GROUP_BITS[moe_op])
    return sum(parts.values()) - parts["experts"] + experts * touched


def decode_bytes(config: MobileMoEConfig, context: int, kv_bits: int = PROGRAM_KV_BITS) -> float:
    """Bytes read for one new token when `context` tokens, itself included, are in the cache."""
    return weight_bytes_read(config) + kv_cache_bytes(config, context, kv_bits)


def training_flops(config: MobileMoEConfig, tokens: float) -> float:
    """`6 N_act D`, without attention scores (paper, equation 4)."""
    return 6.0 * config.num_active_parameters * tokens


def inference_flops(config: MobileMoEConfig) -> float:
    """`2 N_act` per token, without attention scores (paper, equation 4)."""
    return 2.0 * config.num_active_parameters


def attention_flops(config: MobileMoEConfig, tokens: int, context: int | None = None) -> float:
    """
    Scores and weighted values, which `N_act` leaves out: 4 per layer, query channel and pair of positions.

    Args:
        tokens (`int`): queries.
        context (`int`, *optional*): positions that the last one sees; a prompt of `tokens` when absent.
    """
    context = tokens if context is None else context
    pairs = tokens * context - tokens * (tokens - 1) // 2
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


@dataclass(frozen=True)
class Device:
    """
    How fast a device runs models of this family.

    Decoding is bound by memory, and by attention at long context; a prefill by arithmetic, and by memory when it is
    short. Time of a token: bytes of weights / bandwidth + attention; of a prefill: the larger of bytes / bandwidth and
    `2 N_act` per token / rate, + attention.

    Args:
        bandwidth (`float`): bytes per second at which weights are read.
        rate (`float`, *optional*): FLOP/s of matrix multiplications in a prefill; no prefill is predicted without.
        decode_attention_rate (`float`, *optional*): FLOP/s of attention when decoding; when absent, attention takes
            as long as reading the cache does.
        prefill_attention_rate (`float`, *optional*): in a prefill; `rate` when absent.
        kv_bits (`int`, defaults to 8): of an entry of the cache.
        name (`str`, defaults to `"device"`): for tables.

    Raises:
        ValueError: for a bandwidth or rate that is not positive.
    """

    bandwidth: float
    rate: float | None = None
    decode_attention_rate: float | None = None
    prefill_attention_rate: float | None = None
    kv_bits: int = PROGRAM_KV_BITS
    name: str = "device"

    def __post_init__(self) -> None:
        for field in ("bandwidth", "rate", "decode_attention_rate", "prefill_attention_rate", "kv_bits"):
            value = self.__dict__[field]
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field}={value} of a device cannot work. Set a positive number.")

    def decode_tokens_per_second(self, config: MobileMoEConfig, context: int) -> float:
        seconds = weight_bytes_read(config) / self.bandwidth
        if self.decode_attention_rate is None:
            seconds += kv_cache_bytes(config, context, self.kv_bits) / self.bandwidth
        else:
            seconds += attention_flops(config, 1, context) / self.decode_attention_rate
        return 1 / seconds

    def prefill_seconds(self, config: MobileMoEConfig, tokens: int) -> float | None:
        """Time to the first token of a prompt, or `None` without a rate."""
        if self.rate is None:
            return None
        arithmetic = prefill_matmul_flops(config, tokens) / self.rate
        reading = weight_bytes_read(config, tokens) / self.bandwidth
        attention = attention_flops(config, tokens) / (self.prefill_attention_rate or self.rate)
        return max(arithmetic, reading) + attention


def prefill_matmul_flops(config: MobileMoEConfig, tokens: int) -> float:
    """`2 N_act` per token without the head, which only the last token passes through."""
    head = config.vocab_size * config.hidden_size
    return 2.0 * ((config.num_active_parameters - head) * tokens + head)


def calibrate(
    config: MobileMoEConfig,
    decode: Sequence[tuple[int, float]],
    prefill: Sequence[tuple[int, float]] = (),
    kv_bits: int = PROGRAM_KV_BITS,
    name: str = "device",
) -> Device:
    """
    A device from measurements of one model on it. Least squares on relative errors of time.

    Args:
        config (`MobileMoEConfig`): of the measured model.
        decode (`list` of `(context, tokens per second)`): one context gives the bandwidth, two or more also the rate
            of attention.
        prefill (`list` of `(tokens, tokens per second)`): one length gives the rate, two or more also that of
            attention.

    Raises:
        ValueError: without a decode measurement, or for a speed that is not positive.
    """
    if not decode:
        raise ValueError("A device needs at least one decode measurement. Give a context and its tokens per second.")
    for length, speed in [*decode, *prefill]:
        if length < 1 or not 0 < speed < math.inf:
            raise ValueError(
                f"A measurement of {speed} tokens per second at {length} tokens cannot be. Give positive numbers."
            )
    seconds = np.array([1 / speed for _, speed in decode])
    weights = np.full(len(decode), weight_bytes_read(config))
    scores = np.array([attention_flops(config, 1, context) for context, _ in decode])
    bandwidth, decode_attention_rate = two_rates(weights, scores, seconds)
    if decode_attention_rate is None:
        # One context: reading the cache is part of what was measured.
        cache = np.array([kv_cache_bytes(config, context, kv_bits) for context, _ in decode])
        bandwidth = float(np.mean((weights + cache) / seconds))
    rate = prefill_attention_rate = None
    if prefill:
        seconds = np.array([tokens / speed for tokens, speed in prefill])
        products = np.array([prefill_matmul_flops(config, tokens) for tokens, _ in prefill])
        scores = np.array([attention_flops(config, tokens) for tokens, _ in prefill])
        rate, prefill_attention_rate = two_rates(products, scores, seconds)
        if prefill_attention_rate is None:
            rate = float(np.mean((products + scores) / seconds))
    return Device(bandwidth, rate, decode_attention_rate, prefill_attention_rate, kv_bits, name)


def two_rates(first: np.ndarray, second: np.ndarray, seconds: np.ndarray) -> tuple[float, float | None]:
    """Rates for `seconds = first / rate + second / other rate`; no other rate where it cannot be told apart."""
    design = np.stack([first, second], axis=1) / seconds[:, None]
    if len(set(second)) > 1:
        inverse, *_ = np.linalg.lstsq(design / design.max(axis=0), np.ones(len(seconds)), rcond=None)
        inverse = inverse / design.max(axis=0)
        if (inverse > 0).all():
            return 1 / float(inverse[0]), 1 / float(inverse[1])
    return float(np.mean(first / seconds)), None


def _measured_model(benchmark: Benchmark) -> Device:
    models = [
        model
        for model in benchmark.models.values()
        if model.config.get("model_type") == MobileMoEConfig.model_type and model.config.get("quantization")
    ]
    if not models:
        raise ValueError(
            "The benchmark has no MobileMoE model with packed weights, whose bytes are what speed is predicted from. "
            "Run `mobilemoe bench` with one, S for example."
        )
    decode = [
        # Tokens are decoded after the prompt: on average half of them are in the cache too.
        (int(length) + benchmark.new_tokens // 2, row.decode_tokens_per_s.median)
        for length, row in models[0].lengths.items()
    ]
    prefill = [
        (int(length), row.prefill_tokens_per_s.median)
        for length, row in models[0].lengths.items()
        if row.prefill_tokens_per_s is not None
    ]
    name = f"{benchmark.machine.cpu}, {benchmark.machine.threads} threads"
    return calibrate(MobileMoEConfig.from_dict(models[0].config), decode, prefill, models[0].kv_bits, name)


def device_file(device: str | Path) -> Path:
    """
    The file of that path, or that of a known device.

    Raises:
        ValueError: where there is neither; it lists the known ones.
    """
    if Path(device).is_file():
        return Path(device)
    known = {path.stem: path for path in sorted(DEVICES.glob("*.json"))}
    if str(device) not in known:
        raise ValueError(
            f"No such file or known device: {device}. Give a JSON of measurements, or one of: {', '.join(known)}."
        )
    return known[str(device)]


def read_device(path: str | Path) -> Device:
    """
    A device by its name in `plan/devices/`, or from a file: what `mobilemoe bench --json` wrote, of the first packed
    MobileMoE model in it, or a JSON of measurements: `config` (the measured model's `config.json`), `decode` (a list
    of `{"context", "tokens_per_second"}`), optionally `prefill` (of `{"tokens", "tokens_per_second"}`), `kv_bits` and
    `device`, a name. Other keys are ignored.

    Raises:
        ValueError: for a file that is neither.
    """
    path = device_file(path)
    if result_kind(path) is Benchmark:
        return _measured_model(Benchmark.load(path))
    measured = DeviceMeasurements.load(path)
    return calibrate(
        MobileMoEConfig.from_dict(measured.config),
        [(row.context, row.tokens_per_second) for row in measured.decode],
        [(row.tokens, row.tokens_per_second) for row in measured.prefill],
        measured.kv_bits or PROGRAM_KV_BITS,
        measured.device,
    )
