"""Generation modes and loaders of transformers, PEFT, TRL and accelerate, on full-precision and packed models."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_mobilemoe import MobileMoEForCausalLM


NEW_TOKENS = 12
# transformers prefetches through a CUDA stream.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need CUDA")


@pytest.fixture(scope="module", params=["float", "int4"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Path, int4_checkpoint: Path) -> MobileMoEForCausalLM:
    """In FP32, where both take the exact path. Do not modify it."""
    path = tiny_checkpoint if request.param == "float" else int4_checkpoint
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def generate(model: MobileMoEForCausalLM, input_ids: torch.Tensor, **options) -> list[list[int]]:
    """The new tokens of each row; without end tokens, so that all rows have the same length."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": [], "pad_token_id": 2} | options
    tokens = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return tokens[:, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        pytest.param({"cache_implementation": "offloaded"}, marks=needs_cuda),
        pytest.param({"cache_implementation": "offloaded_static"}, marks=needs_cuda),
        {"use_cache": False},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_generation_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor, options: dict):
    expected = generate(model, input_ids)
    assert generate(model, input_ids, **options) == expected
    # A row must not be the same token again and again, which any cache would give.
    assert all(len(set(row)) > NEW_TOKENS // 2 for row in expected)


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_beams_do_not_depend_on_the_cache(model: MobileMoEForCausalLM, input_ids: torch.Tensor, cache: dict):
    expected = generate(model, input_ids, num_beams=3)
    assert generate(model, input_ids, num_beams=3, **cache) == expected
    assert expected != generate(model, input_ids)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_speculation_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor, options: dict):
    # Twice the same prompt, so that a look-up finds something.
    prompt = input_ids[:1].repeat(1, 2)
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(model)}
    assert generate(model, prompt, **options) == generate(model, prompt)


def test_early_exit_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    calls = [0, 0]

    def count(layer, *_):
        calls[layer.self_attn.layer_idx] += 1

    hooks = [layer.register_forward_hook(count) for layer in model.model.layers]
    early = generate(model, input_ids[:1], assistant_early_exit=1)
    for hook in hooks:
        hook.remove()
    assert early == generate(model, input_ids[:1])
    # The drafts come from the first layer alone.
    assert calls[0] > calls[1] > 0


def test_quantised_cache_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    pytest.importorskip("hqq", reason="needs hqq")
    # In 8 bits: keys and values are rounded, and this prompt has no near-ties.
    config = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16}
    quantised = generate(model, input_ids[:1], cache_implementation="quantized", cache_config=config)
    assert quantised == generate(model, input_ids[:1])


def test_continuous_batching_equals_plain_greedy(model: MobileMoEForCausalLM, input_ids: torch.Tensor):
    prompts = [input_ids[0, :9].tolist(), input_ids[1].tolist(), input_ids[0, 5:20].tolist()]
    options = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=2)
    outputs = copy.deepcopy(model).generate_batch(prompts, generation_config=options)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert [output.generated_tokens] == generate(model, torch.tensor([prompt]))
