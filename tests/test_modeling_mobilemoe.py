import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, StaticCache

from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, packed_mobilemoe
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoERotaryEmbedding,
    MobileMoERouter,
    apply_rotary_emb,
    rms_normalize,
)


# Flex attention and inductor generate C++ on a CPU.
needs_cxx = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


def naive_inv_freq(config: MobileMoEConfig) -> list[float]:
    scaling = config.rope_scaling
    inv_freq = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        long = wavelength > scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        inv_freq.append(frequency / scaling["factor"] if long else frequency)
    return inv_freq


def naive_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean() + eps)


def naive_swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """All three matrices are `[in, out]`."""
    gated = x @ gate
    return (gated * torch.sigmoid(gated) * (x @ up)) @ down


def naive_rotate(x: torch.Tensor, position: int, inv_freq: list[float]) -> torch.Tensor:
    rotated = []
    for i, frequency in enumerate(inv_freq):
        pair = complex(x[2 * i], x[2 * i + 1])
        turned = pair * complex(math.cos(position * frequency), math.sin(position * frequency))
        rotated += [turned.real, turned.imag]
    return torch.tensor(rotated, dtype=x.dtype)


def naive_attention(weights: dict[str, torch.Tensor], prefix: str, config: MobileMoEConfig, xs: list) -> list:
    inv_freq = naive_inv_freq(config)
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(name: str, x: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
        projected = weights[f"{prefix}{name}.weight"] @ x
        return [projected[head * head_dim : (head + 1) * head_dim] for head in range(num_heads)]

    def rotate_and_norm(states: list[torch.Tensor], position: int) -> list[torch.Tensor]:
        return [naive_norm(naive_rotate(state, position, inv_freq), config.rms_norm_eps) for state in states]

    queries = [rotate_and_norm(project("q_proj", x, heads), position) for position, x in enumerate(xs)]
    keys = [rotate_and_norm(project("k_proj", x, kv_heads), position) for position, x in enumerate(xs)]
    values = [project("v_proj", x, kv_heads) for x in xs]
    outputs = []
    for position in range(len(xs)):
        per_head = []
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = [queries[position][head] @ keys[t][kv_head] / math.sqrt(head_dim) for t in range(position + 1)]
            probabilities = torch.stack(scores).softmax(dim=0)
            per_head.append(sum(probabilities[t] * values[t][kv_head] for t in range(position + 1)))
        outputs.append(weights[f"{prefix}o_proj.weight"] @ torch.cat(per_head))
    return outputs


def naive_feed_forward(weights: dict, prefix: str, config: MobileMoEConfig, x: torch.Tensor) -> torch.Tensor:
    scores = torch.sigmoid(weights[f"{prefix}router.weight"] @ x).tolist()
    bias = weights[f"{prefix}expert_bias"].tolist()
    by_rank = sorted(range(config.num_local_experts), key=lambda expert: -(scores[expert] + bias[expert]))
    selected = by_rank[: config.num_experts_per_tok]
    width = config.intermediate_size
    shared = [weights[f"{prefix}shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down")]
    output = naive_swiglu(x, *shared)
    for expert in selected:
        gate_up = weights[f"{prefix}experts.gate_up_proj"][expert]
        down = weights[f"{prefix}experts.down_proj"][expert]
        weight = scores[expert] / sum(scores[e] for e in selected) * config.routed_scaling_factor
        output = output + weight * naive_swiglu(x, gate_up[:, :width], gate_up[:, width:], down)
    return output


def naive_logits(weights: dict[str, torch.Tensor], config: MobileMoEConfig, token_ids: list[int]) -> torch.Tensor:
    """
    The published forward pass, one token, one head and one expert at a time, in FP32.

    Returns:
        `torch.Tensor` of shape `(tokens, vocab_size)`.
    """
    embedding, eps = weights["model.embed_tokens.weight"], config.rms_norm_eps
    hs = [embedding[token] for token in token_ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        xs = [weights[f"{prefix}input_layernorm.weight"] * naive_norm(h, eps) for h in hs]
        attended = naive_attention(weights, f"{prefix}self_attn.", config, xs)
        hs = [h + output for h, output in zip(hs, attended, strict=True)]
        xs = [weights[f"{prefix}post_attention_layernorm.weight"] * naive_norm(h, eps) for h in hs]
        mixed = [naive_feed_forward(weights, f"{prefix}feed_forward.", config, x) for x in xs]
        hs = [h + output for h, output in zip(hs, mixed, strict=True)]
    return torch.stack([embedding @ (weights["model.norm.weight"] * naive_norm(h, eps)) for h in hs])


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_logits_equal_the_naive_reference(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    logits = tiny_model(input_ids).logits
    weights = tiny_model.state_dict()
    for row in range(len(input_ids)):
        expected = naive_logits(weights, tiny_model.config, input_ids[row].tolist())
        assert relative_difference(logits[row], expected) < 1e-5


def test_routing_vector():
    # integrallis/models, MobileMoeRoutingTest.
    config = MobileMoEConfig(
        hidden_size=4, num_local_experts=4, num_experts_per_tok=2, routed_scaling_factor=2.5, num_hidden_layers=1
    )
    router = MobileMoERouter(config)
    logits = torch.tensor([0.0, math.log(3), -math.log(3), math.log(4)])
    router.weight.data = torch.diag(logits)
    router_logits, weights, index = router(torch.ones(1, 4), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(router_logits, logits[None])
    weight_of = dict(zip(index[0].tolist(), weights[0].tolist(), strict=True))
    assert weight_of == pytest.approx({2: 0.5952381, 3: 1.9047619}, abs=1e-6)


def test_ties_in_routing_go_to_the_lower_index():
    config = MobileMoEConfig(hidden_size=4, num_local_experts=60, num_hidden_layers=1)
    router = MobileMoERouter(config)
    torch.nn.init.zeros_(router.weight)
    hidden_states = torch.ones(100, 4)
    _, _, index = router(hidden_states, torch.zeros(60))
    assert index.tolist() == [[0, 1, 2, 3]] * 100
    # A tie below a winner: the winner first, then the lowest of the others.
    bias = torch.zeros(60)
    bias[40] = 0.1
    _, _, index = router(hidden_states, bias)
    assert index.tolist() == [[40, 0, 1, 2]] * 100


@pytest.mark.parametrize(
    ("states", "expected"), [((3.0, 4.0), (0.8485278, 1.1313704)), ((0.0, 5.0), (0.0, 1.4142130))]
)
def test_head_norm_vector(states: tuple[float, float], expected: tuple[float, float]):
    # integrallis/models, MobileMoeMathTest.
    torch.testing.assert_close(rms_normalize(torch.tensor(states), 1e-5), torch.tensor(expected), atol=2e-7, rtol=0)


def test_rope_frequencies_synthetic_vector():
    # integrallis/models, RotaryTableLlama3Test.
    config = MobileMoEConfig(
        head_dim=8,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8,
            "original_max_position_embeddings": 1000,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
        },
    )
    inv_freq = MobileMoERotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.000125]), atol=0, rtol=1e-6)


def test_rope_frequencies_of_the_releases():
    # A wavelength above 8192 tokens is stretched: 0 to 17 unchanged, 18 to 31 divided by 16.
    inv_freq = MobileMoERotaryEmbedding(MobileMoEConfig()).inv_freq
    unscaled = torch.tensor([500000 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(inv_freq[:18], unscaled[:18], atol=0, rtol=2e-6)
    torch.testing.assert_close(inv_freq[18:], unscaled[18:] / 16, atol=0, rtol=2e-6)
    assert inv_freq[17].item() == pytest.approx(9.384739e-4, rel=1e-6)
    assert inv_freq[18].item() == pytest.approx(3.892328e-5, rel=1e-6)


def test_rope_smooth_band_is_the_llama3_rule():
    # With low < high the band exists, and transformers' own llama3 rule is the reference.
    scaling = {
        "rope_type": "llama3",
        "factor": 16,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    llama = transformers.LlamaConfig(
        hidden_size=768, num_attention_heads=12, head_dim=64, rope_parameters=scaling | {"rope_theta": 500000.0}
    )
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    inv_freq = MobileMoERotaryEmbedding(MobileMoEConfig(rope_scaling=scaling)).inv_freq
    torch.testing.assert_close(inv_freq, expected, atol=0, rtol=1e-5)


# Of the tiny model: contexts of 64 tokens, extended four times.
ROPE_SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def test_every_rope_rule_of_transformers_is_covered():
    assert ROPE_SCALINGS.keys() == {"default", *transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("rope_type", ROPE_SCALINGS)
@torch.no_grad()
def test_rope_rules_are_those_of_transformers(
    tiny_config: MobileMoEConfig, tiny_checkpoint: Path, input_ids: torch.Tensor, rope_type: str
):
    scaling = {"rope_type": rope_type, **ROPE_SCALINGS[rope_type]}
    context = 64 if rope_type == "dynamic" else 256
    llama = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=context,
        rope_parameters=scaling | {"rope_theta": tiny_config.rope_theta},
    )
    reference = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(llama)
    # As people extend a context, of a released checkpoint.
    options = {"rope_scaling": scaling, "max_position_embeddings": context}
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, **options)
    # A short text, a long one, and a short one again.
    for length in (24, 200, 24):
        positions = torch.arange(length)[None]
        cos, sin = reference(torch.ones(1), positions)
        actual_cos, actual_sin = model.model.rotary_emb(torch.ones(1), positions)
        # transformers repeats them for both halves of a head.
        torch.testing.assert_close(actual_cos * reference.attention_scaling, cos[..., :8], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(actual_sin * reference.attention_scaling, sin[..., :8], atol=2e-5, rtol=1e-5)
    assert (reference.attention_scaling != 1) == (rope_type in ("yarn", "longrope"))
    scores = model.model.layers[0].self_attn.scaling
    assert scores == pytest.approx(16**-0.5 * reference.attention_scaling**2, rel=1e-6)
    # It takes part in the model.
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert not torch.equal(model(input_ids).logits, plain(input_ids).logits)


def test_rope_scaling_set_on_loading_is_checked(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="'factor'. is None, and rope_type='yarn' needs"):
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint, rope_scaling={"rope_type": "yarn"})


def test_rope_rotates_adjacent_pairs():
    states = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0))  # (B, T, heads, D)
    angles = torch.arange(3.0)[None, :, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])  # (B, T, D/2)
    rotated = apply_rotary_emb(states, angles.cos(), angles.sin())
    pairs = torch.view_as_complex(states.view(1, 3, 2, 4, 2)) * torch.polar(torch.ones(()), angles)[:, :, None]
    torch.testing.assert_close(rotated, torch.view_as_real(pairs).flatten(-2))

    # The other convention, which rotates channel i with i + D/2, computes something else.
    first, second = states.chunk(2, dim=-1)
    doubled = torch.cat((angles, angles), dim=-1)[:, :, None]
    rotate_half = states * doubled.cos() + torch.cat((-second, first), dim=-1) * doubled.sin()
    assert (rotated - rotate_half)[:, 1:].abs().max() > 0.1


def new_cache(cache_class: type, config: MobileMoEConfig) -> DynamicCache | StaticCache:
    return StaticCache(config=config, max_cache_len=32) if cache_class is StaticCache else DynamicCache(config=config)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, cache_class: type
):
    expected = tiny_model(input_ids, use_cache=False).logits
    cache = new_cache(cache_class, tiny_model.config)
    # A prefill of five tokens, another chunk of four, then one token at a time.
    chunks = input_ids.split([5, 4] + [1] * 15, dim=1)
    steps = [tiny_model(chunk, cache=cache, use_cache=True).logits for chunk in chunks]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=3e-5, rtol=1e-5)


def left_padded(input_ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last `lengths[row]` tokens of each row, with the mask and positions that generation computes."""
    width = input_ids.shape[1]
    attention_mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return input_ids * attention_mask, attention_mask, position_ids


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_left_padded_rows_equal_each_row_alone(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, cache_class: type
):
    lengths = [17, 24]
    padded, attention_mask, position_ids = left_padded(input_ids, lengths)
    full = tiny_model(padded, attention_mask=attention_mask, position_ids=position_ids).logits

    cache = new_cache(cache_class, tiny_model.config)
    sizes = [20, 1, 1, 1, 1]
    steps, seen = [], 0
    for chunk, positions in zip(padded.split(sizes, dim=1), position_ids.split(sizes, dim=1), strict=True):
        seen += chunk.shape[1]
        mask = attention_mask[:, :seen]
        steps.append(tiny_model(chunk, attention_mask=mask, position_ids=positions, cache=cache).logits)
    stepped = torch.cat(steps, dim=1)

    for row, length in enumerate(lengths):
        alone = tiny_model(input_ids[row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(full[row, -length:], alone, atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(stepped[row, -length:], alone, atol=3e-5, rtol=1e-5)


def test_batched_generation_equals_each_prompt_alone(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    # `min_new_tokens` keeps the end token away, after which a finished row would differ by padding only.
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 2}
    lengths = [9, 24]
    padded, attention_mask, _ = left_padded(input_ids, lengths)
    batch = tiny_model.generate(padded, attention_mask=attention_mask, **options)[:, -12:]
    assert batch.shape == (2, 12)
    for row, length in enumerate(lengths):
        prompt = input_ids[row : row + 1, -length:]
        alone = tiny_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, -12:]
        assert batch[row].tolist() == alone.tolist()


def test_generation_equals_a_greedy_loop_without_cache(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    prompt = input_ids[:1]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": [], "pad_token_id": 2}
    generated = tiny_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            next_token = tiny_model(tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)
            tokens = torch.cat((tokens, next_token), dim=1)
    assert generated.tolist() == tokens.tolist()


def test_text_generation_pipeline(tiny_checkpoint: Path, tmp_path: Path):
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, 512)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    generator = transformers.pipeline("text-generation", model=str(tmp_path))
    prompts = ["w5 w9 w301", "w17 w44 w45 w46 w470 w12"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers = generator(prompts, return_full_text=False, batch_size=2, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**encoded, pad_token_id=2, **options)[0, -6:]
        assert answer[0]["generated_text"].split() == tokenizer.decode(expected).split()


@torch.no_grad()
def test_logits_to_keep(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    expected = tiny_model(input_ids).logits
    torch.testing.assert_close(tiny_model(input_ids, logits_to_keep=3).logits, expected[:, -3:])
    torch.testing.assert_close(tiny_model(input_ids, logits_to_keep=torch.tensor([2, 7])).logits, expected[:, [2, 7]])


def test_experts_default_to_grouped_mm(tiny_model: MobileMoEForCausalLM, tiny_checkpoint: Path):
    assert tiny_model.config._experts_implementation == "grouped_mm"
    assert AutoModelForCausalLM.from_pretrained(tiny_checkpoint).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@torch.no_grad()
def test_experts_implementations_agree(
    tiny_model: MobileMoEForCausalLM,
    input_ids: torch.Tensor,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
):
    tiny_model.set_experts_implementation("eager")
    expected = tiny_model(input_ids).logits
    tiny_model.set_experts_implementation(implementation)

    def eager_must_not_run(*args):
        raise AssertionError(f"{implementation} ran the eager loop")

    # Without its decorator's interface the class would agree with itself whatever is asked for.
    monkeypatch.setattr(torch.Tensor, "index_add_", eager_must_not_run)
    torch.testing.assert_close(tiny_model(input_ids).logits, expected, atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_implementations_agree(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    padded, attention_mask, position_ids = left_padded(input_ids, [17, 24])
    logits = {}
    for implementation in ("eager", "sdpa"):
        tiny_model.set_attn_implementation(implementation)
        logits[implementation] = tiny_model(padded, attention_mask=attention_mask, position_ids=position_ids).logits
    real = attention_mask.bool()
    torch.testing.assert_close(logits["sdpa"][real], logits["eager"][real], atol=3e-5, rtol=1e-5)


@pytest.mark.slow
@needs_cxx
@torch.no_grad()
def test_flex_attention_agrees(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    padded, attention_mask, position_ids = left_padded(input_ids, [17, 24])
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    expected = tiny_model(padded, **inputs).logits
    tiny_model.set_attn_implementation("flex_attention")
    logits = tiny_model(padded, **inputs).logits
    real = attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_cxx])])
@torch.no_grad()
def test_compiled_forward_equals_eager(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, backend: str):
    expected = tiny_model(input_ids, use_cache=False).logits
    compiled = torch.compile(tiny_model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected, atol=3e-5, rtol=1e-5)


def watch_routers(model: MobileMoEForCausalLM) -> list[tuple[MobileMoERouter, tuple, tuple]]:
    """Returns a list that every later router call of the model appends `(router, inputs, outputs)` to."""
    calls = []
    for module in model.modules():
        if isinstance(module, MobileMoERouter):
            module.register_forward_hook(lambda *call: calls.append(call))
    return calls


def assert_routed_in_fp32(calls: list[tuple[MobileMoERouter, tuple, tuple]]) -> None:
    for router, (hidden_states, _), (router_logits, weights, _) in calls:
        assert router_logits.dtype == weights.dtype == torch.float32
        # Outside of any autocast this is FP32 arithmetic on the same inputs.
        assert torch.equal(router_logits, F.linear(hidden_states.float(), router.weight.float()))


@torch.no_grad()
def test_router_runs_in_fp32_in_a_bf16_model(tiny_checkpoint: Path, input_ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert model.dtype == model.model.norm.weight.dtype == torch.bfloat16
    for layer in model.model.layers:
        assert layer.feed_forward.router.weight.dtype == torch.float32
        assert layer.feed_forward.expert_bias.dtype == torch.float32
    calls = watch_routers(model)
    assert model(input_ids).logits.dtype == torch.bfloat16
    assert len(calls) == model.config.num_hidden_layers
    assert_routed_in_fp32(calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_never_rounds_the_router(tiny_model: MobileMoEForCausalLM, dtype: torch.dtype):
    def assert_only_the_router_is_in_fp32(model):
        fixed = ("router.weight", "expert_bias")
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if name.endswith(fixed) else dtype), name

    expected = tiny_model.state_dict()["model.layers.1.feed_forward.router.weight"].clone()
    assert_only_the_router_is_in_fp32(tiny_model.to(dtype))
    assert torch.equal(tiny_model.state_dict()["model.layers.1.feed_forward.router.weight"], expected)
    assert_only_the_router_is_in_fp32(AutoModelForCausalLM.from_config(tiny_model.config, dtype=dtype))


@torch.no_grad()
def test_router_runs_in_fp32_under_autocast(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    calls = watch_routers(tiny_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny_model(input_ids).logits
    # The rest did run in BF16.
    assert logits.dtype == torch.bfloat16
    assert len(calls) == tiny_model.config.num_hidden_layers
    assert_routed_in_fp32(calls)


@torch.no_grad()
def test_bf16_is_finite_and_near_fp32(tiny_checkpoint: Path, input_ids: torch.Tensor):
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)(input_ids).logits
    logits = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)(input_ids).logits.float()
    assert logits.isfinite().all()
    # Near-ties may route differently, so a few tokens are off by more than rounding.
    similarity = F.cosine_similarity(logits, expected, dim=-1)
    assert similarity.median() > 0.999


@torch.no_grad()
def test_casting_a_model_keeps_its_positions(tiny_model: MobileMoEForCausalLM):
    rotary_emb, last_position = tiny_model.model.rotary_emb, torch.tensor([[8191]])
    cos, sin = rotary_emb(torch.ones(1), last_position)
    tiny_model.to(torch.bfloat16)
    # In BF16 a frequency is off by up to 2^-9 of itself: at position 8191 the angle is then off by whole turns.
    cast_cos, cast_sin = rotary_emb(torch.ones(1), last_position)
    torch.testing.assert_close((cast_cos, cast_sin), (cos, sin))


@torch.no_grad()
def test_router_logits_are_returned_on_request(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    assert tiny_model(input_ids).router_logits is None
    calls = watch_routers(tiny_model)
    router_logits = tiny_model(input_ids, output_router_logits=True).router_logits
    assert len(router_logits) == tiny_model.config.num_hidden_layers
    for recorded, (_, _, (expected, _, _)) in zip(router_logits, calls, strict=True):
        assert recorded.shape == (input_ids.numel(), tiny_model.config.num_local_experts)
        assert recorded.dtype == torch.float32
        assert torch.equal(recorded, expected)


@torch.no_grad()
def test_router_logits_are_returned_by_configuration(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    tiny_model.config.output_router_logits = True
    assert len(tiny_model(input_ids).router_logits) == tiny_model.config.num_hidden_layers
    assert tiny_model(input_ids, output_router_logits=False).router_logits is None


def test_router_logits_do_not_change_the_loss(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    outputs = tiny_model(input_ids, labels=input_ids, output_router_logits=True)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def gradients(model: MobileMoEForCausalLM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_one_step_moves_every_parameter_and_no_bias(
    tiny_model: MobileMoEForCausalLM, tiny_config: MobileMoEConfig, implementation: str
):
    tiny_model.set_experts_implementation(implementation)
    tiny_model.train()
    calls = watch_routers(tiny_model)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    batch = torch.randint(3, tiny_config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(2))
    # Without weight decay, which would move parameters that have no gradient.
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3, weight_decay=0.0)
    tiny_model(batch, labels=batch).loss.backward()
    optimizer.step()

    for _, _, (_, _, index) in calls:
        assert index.unique().numel() == tiny_config.num_local_experts
    for name, parameter in tiny_model.named_parameters():
        moved = parameter != before[name]
        # Every expert for itself, every other parameter as a whole.
        assert (moved.flatten(1).any(dim=1) if moved.ndim == 3 else moved.any()).all(), name
    biases = {name: buffer for name, buffer in tiny_model.named_buffers() if name.endswith("expert_bias")}
    assert len(biases) == tiny_config.num_hidden_layers
    assert all(torch.equal(bias, before[name]) for name, bias in biases.items())


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_implementations_have_equal_gradients(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, implementation: str
):
    tiny_model.set_experts_implementation("eager")
    expected = gradients(tiny_model, input_ids)
    tiny_model.set_experts_implementation(implementation)
    for name, gradient in gradients(tiny_model, input_ids).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_checkpointing_has_equal_gradients(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    expected = gradients(tiny_model, input_ids)
    tiny_model.gradient_checkpointing_enable()
    calls = watch_routers(tiny_model)
    for name, gradient in gradients(tiny_model, input_ids).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    # Each router ran forward and again in the backward pass: checkpointing was on.
    assert len(calls) == 2 * tiny_model.config.num_hidden_layers


@torch.no_grad()
def test_saved_model_loads_equal(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MobileMoEForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(input_ids).logits, tiny_model(input_ids).logits)
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(input_ids).last_hidden_state, tiny_model.model(input_ids).last_hidden_state
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_computes_the_frequencies(tiny_config: MobileMoEConfig, tiny_checkpoint: Path, dtype: torch.dtype):
    with torch.device("meta"):
        skeleton = MobileMoEForCausalLM(copy.deepcopy(tiny_config))
    assert {tensor.device.type for tensor in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    # The frequencies are in no file: loading must fill what construction on the meta device left empty.
    loaded = MobileMoEForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype)
    expected = torch.tensor(naive_inv_freq(tiny_config))
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected, atol=0, rtol=1e-6)


def test_input_ids_and_inputs_embeds_exclude_each_other(tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    inputs_embeds = tiny_model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(tiny_model(inputs_embeds=inputs_embeds).logits, tiny_model(input_ids).logits)
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        tiny_model(input_ids, inputs_embeds=inputs_embeds)
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        tiny_model()


LOAD_WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mobilemoe":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
input_ids_file, output_file, *checkpoints = sys.argv[1:]
input_ids = torch.load(input_ids_file)
logits = []
for checkpoint in checkpoints:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits.append(model(input_ids).logits)
assert "modeling_mobilemoe" not in sys.modules
torch.save(logits, output_file)
"""


@torch.no_grad()
def test_checkpoints_load_without_the_package(
    tiny_checkpoint: Path, int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path, monkeypatch
):
    # The copied files come without the kernels.
    monkeypatch.setattr(packed_mobilemoe, "has_cpu_kernels", bool)
    checkpoints = []
    for checkpoint in (tiny_checkpoint, int4_checkpoint):
        checkpoints.append(tmp_path / f"copy_{checkpoint.name}")
        shutil.copytree(checkpoint, checkpoints[-1])
    torch.save(input_ids, tmp_path / "input_ids.pt")
    arguments = [tmp_path / "input_ids.pt", tmp_path / "logits.pt", *checkpoints]
    completed = subprocess.run(
        # -I: neither the working directory nor PYTHONPATH is on sys.path.
        [sys.executable, "-I", "-c", LOAD_WITHOUT_THE_PACKAGE, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf_home")},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    for checkpoint, logits in zip(checkpoints, torch.load(tmp_path / "logits.pt"), strict=True):
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(input_ids).logits
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
def test_remote_code_never_runs_where_the_package_is_imported(
    tiny_checkpoint: Path, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
):
    # If it did run, it would be copied here first.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, marker = tmp_path / "trapped", tmp_path / "executed"
    shutil.copytree(tiny_checkpoint, path)
    trapped = list(path.glob("*.py"))
    assert len(trapped) == 10
    for file in trapped:
        file.write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('remote code was executed')\n")

    assert type(AutoConfig.from_pretrained(path, **options)) is MobileMoEConfig
    assert type(AutoModelForCausalLM.from_pretrained(path, **options)) is MobileMoEForCausalLM
    assert type(AutoModel.from_pretrained(path, **options)).__module__ == "modeling_mobilemoe.modeling_mobilemoe"
    assert not marker.exists()
    assert not (tmp_path / "modules").exists()
