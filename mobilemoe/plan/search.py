"""The limits of a plan, the shapes that are searched, and what each of them costs."""

import functools
import math
from dataclasses import dataclass, field

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig

from ..costs import (
    PROGRAM_KV_BITS,
    Device,
    inference_flops,
    kv_cache_bytes,
    memory_bytes,
    read_device,
    training_flops,
)
from .law import ScalingLaw


# The paper's choice of E, among values that the law cannot distinguish, of the granularity and of key-value heads.
PAPER_EXPANSION, PAPER_GRANULARITY, PAPER_KV_HEADS = 8, 8, 4
# Of the 8 active units per token, the number that the shared expert replaces (paper).
SHARED_UNITS = 4
# Width / depth; the paper's models have 38.4 to 40.
ASPECTS = (32, 48)
# Multiples of the head size, so that all matrices divide into INT4 groups.
HEAD_DIM = 64
WIDTHS = (64, 128, 192, *range(256, 2049, 128))
EXPANSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Default limit of speed, on the default device. L, the slowest released model, decodes 8.9 tokens per second there
# with 8,192 tokens in its cache (paper).
DEVICE, TOKENS_PER_SECOND = "galaxy-s25", 8.0


@dataclass(frozen=True)
class Request:
    """
    The limits and budgets of a plan. Exactly one of `tokens` and `flops` must be set.

    Args:
        memory (`float`): limit in bytes for the weights and the key-value cache of the exported program.
        context (`int`, defaults to 8192): tokens that the cache holds.
        tokens (`float`, *optional*): training tokens.
        flops (`float`, *optional*): training FLOPs, `6 N_act D`.
        inference_flops (`float`, *optional*): maximum FLOPs per token, `2 N_act`.
        tokens_per_second (`float`, defaults to 8): minimum decode speed at the full context.
        device (`Device`, *optional*): the device for which speeds are predicted; a Galaxy S25 by default.
        kv_bits (`int`, defaults to 8): bits of a cache entry, 8 in the programs of this package and in the paper.
        vocab_size (`int`, defaults to 128256): vocabulary size of the tokenizer.
        extrapolate (`bool`, defaults to `False`): also use the law outside the range of its runs.

    Raises:
        ValueError: for a value that is not positive, or a combination that is incomplete or contradictory.
    """

    memory: float
    context: int = 8192
    tokens: float | None = None
    flops: float | None = None
    inference_flops: float | None = None
    tokens_per_second: float = TOKENS_PER_SECOND
    device: Device = field(default_factory=functools.partial(read_device, DEVICE))
    kv_bits: int = PROGRAM_KV_BITS
    vocab_size: int = 128256
    extrapolate: bool = False

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and name not in ("device", "extrapolate") and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} cannot be met by any model. Set a positive number.")
        if (self.tokens is None) == (self.flops is None):
            raise ValueError(
                f"tokens={self.tokens} and flops={self.flops}: the training budget is one of the two, and the other "
                "follows from the size. Set exactly one."
            )


@dataclass(frozen=True)
class Candidate:
    """A shape with its costs, its predicted loss, the limits that it exceeds, and the verdict on it."""

    config: MobileMoEConfig
    expansion: int
    memory: int
    tokens: float
    loss: float
    decode_speed: float
    broken: tuple[str, ...] = ()
    verdict: str = ""

    @property
    def row(self) -> dict:
        """The candidate as plain numbers, for tables and JSON."""
        config = self.config
        return {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "expansion": self.expansion,
            "num_local_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "intermediate_size": config.intermediate_size,
            "intermediate_size_mlp": config.intermediate_size_mlp,
            "active_parameters": config.num_active_parameters,
            "total_parameters": config.num_total_parameters,
            "memory_bytes": self.memory,
            "training_tokens": self.tokens,
            "training_flops": training_flops(config, self.tokens),
            "loss": self.loss,
            "decode_tokens_per_second": self.decode_speed,
            "verdict": self.verdict,
        }


# Cached, so do not modify the result: a plan needs about a thousand configs, and validating one takes 2 ms.
@functools.cache
def shape_config(
    hidden_size: int, num_hidden_layers: int, expansion: int, vocab_size: int = 128256, context: int = 8192
) -> MobileMoEConfig:
    """
    The config for a width, a depth and an E, with granularity 8 and one shared expert as in S, M and L (paper, 2.4).

    There are 8E units, each an eighth of the dense width `4 hidden_size`, and 8 are active per token. A shared expert
    of four units' width replaces four of them. Heads have 64 channels; the number of key-value heads is the divisor of
    the number of heads closest to the paper's four.
    """
    unit = 4 * hidden_size // PAPER_GRANULARITY
    heads = hidden_size // HEAD_DIM
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    return MobileMoEConfig(
        architectures=["MobileMoEForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=unit,
        intermediate_size_mlp=SHARED_UNITS * unit,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=min(divisors, key=lambda count: abs(math.log(count / PAPER_KV_HEADS))),
        head_dim=HEAD_DIM,
        num_local_experts=PAPER_GRANULARITY * expansion - SHARED_UNITS,
        num_experts_per_tok=PAPER_GRANULARITY - SHARED_UNITS,
        max_position_embeddings=max(8192, context),
        bos_token_id=128000 if vocab_size == 128256 else None,
    )


def search(request: Request, law: ScalingLaw) -> list[Candidate]:
    """
    All shapes to which the law applies.

    Raises:
        ValueError: when there is none, because of the training budget.
    """
    shapes, outside = [], []
    for width in WIDTHS:
        for depth in range(math.ceil(width / ASPECTS[1]), width // ASPECTS[0] + 1):
            for expansion in EXPANSIONS:
                config = shape_config(width, depth, expansion, request.vocab_size, request.context)
                shape = evaluate(config, expansion, request, law)
                beyond = law.outside(config.num_active_parameters, shape.tokens, expansion)
                if beyond and not request.extrapolate:
                    outside.append(config.num_active_parameters)
                    # More experts hardly change the number of active parameters: these shapes are outside too.
                    break
                shapes.append(shape)
    if not shapes:
        (low, high), (least, most) = law.ranges["active_parameters"], law.ranges["tokens"]
        budget = "tokens" if request.flops is None else "flops"
        first, last = (least, most) if request.flops is None else (6 * low * least, 6 * high * most)
        value = request.__dict__[budget]
        if first <= value <= last:
            nearest = min(outside, key=lambda active: abs(math.log(active / math.sqrt(low * high))))
            raise ValueError(
                f"The law was fitted to {millions(low)} to {millions(high)} active parameters and {least:.3g} to "
                f"{most:.3g} tokens, and no shape with {budget}={value:.3g} is in that range; the nearest has "
                f"{millions(nearest)}. Give a law of such sizes, another vocabulary, or --extrapolate."
            )
        raise ValueError(
            f"{budget}={value:.3g} is outside the {first:.3g} to {last:.3g} that the law was fitted to, so it cannot "
            f"rank shapes there. Set {min(max(value, first), last):.3g}, or --extrapolate to have its extrapolation."
        )
    return shapes


def evaluate(config: MobileMoEConfig, expansion: int, request: Request, law: ScalingLaw) -> Candidate:
    """Computes the costs and the predicted loss of a shape, and the limits that it exceeds."""
    active = config.num_active_parameters
    memory = memory_bytes(config, request.context, request.kv_bits)
    tokens = request.tokens if request.flops is None else request.flops / (6 * active)
    speed = request.device.decode_tokens_per_second(config, request.context)
    broken = []
    if memory > request.memory:
        broken.append(f"needs {memory / 1e9:.3g} GB of {request.memory / 1e9:.3g}")
    if request.inference_flops is not None and inference_flops(config) > request.inference_flops:
        broken.append(f"{inference_flops(config) / 1e9:.3g} GFLOPs per token of {request.inference_flops / 1e9:.3g}")
    if speed < request.tokens_per_second:
        broken.append(f"decodes {speed:.3g} tokens/s of {request.tokens_per_second:.3g}")
    loss = float(law.loss(active, tokens, expansion))
    return Candidate(config, expansion, memory, tokens, loss, speed, tuple(broken))


def explain_nothing_fits(shapes: list[Candidate], request: Request) -> str:
    """Explains which limit, or combination of limits, excludes every shape, and what would fit."""
    beyond = "" if request.extrapolate else ", or --extrapolate for sizes that the law was not fitted to"
    smallest = min(shapes, key=lambda shape: shape.memory)
    if smallest.memory > request.memory:
        cache = kv_cache_bytes(smallest.config, request.context, request.kv_bits)
        return (
            f"memory={request.memory / 1e9:.3g} GB holds no model: the smallest one ({describe(smallest)}) needs "
            f"{smallest.memory / 1e9:.3g} GB, {cache / 1e9:.2g} GB of it for a context of {request.context} tokens. "
            f"Give more memory, a shorter context, or a smaller vocabulary{beyond}."
        )
    if request.inference_flops is not None:
        least = min(shapes, key=lambda shape: shape.config.num_active_parameters)
        if inference_flops(least.config) > request.inference_flops:
            return (
                f"inference_flops={request.inference_flops:.3g} per token is less than the smallest model needs: "
                f"{inference_flops(least.config):.3g} ({describe(least)}). Set that or more, or a smaller "
                f"vocabulary{beyond}."
            )
    fitting = [shape for shape in shapes if shape.memory <= request.memory]
    fastest = max(fitting, key=lambda shape: shape.decode_speed)
    if fastest.decode_speed < request.tokens_per_second:
        return (
            f"tokens_per_second={request.tokens_per_second:.3g} is above what {request.device.name} can read: at "
            f"{request.device.bandwidth / 1e9:.3g} GB/s the fastest model that fits ({describe(fastest)}) decodes "
            f"{fastest.decode_speed:.3g} tokens per second at a context of {request.context} tokens. Set that or "
            f"less, or a shorter context{beyond}."
        )
    nearest = min(shapes, key=lambda shape: (len(shape.broken), shape.memory))
    return (
        f"Each limit can be met, but not all by one model: {describe(nearest)}, which breaks the fewest, "
        f"{'; '.join(nearest.broken)}. Loosen that limit."
    )


def describe(shape: Candidate) -> str:
    config = shape.config
    return (
        f"width {config.hidden_size}, {config.num_hidden_layers} layers, E = {shape.expansion}, "
        f"{millions(config.num_active_parameters)} of {millions(config.num_total_parameters)} parameters active"
    )


def millions(count: float) -> str:
    """Parameters in millions: whole ones for large models, with digits for small ones."""
    return f"{count / 1e6:,.0f}M" if count >= 1e8 else f"{count / 1e6:.3g}M"
