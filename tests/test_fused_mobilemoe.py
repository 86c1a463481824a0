"""A packed model's layers as one operator, and the cache in blocks that it keeps."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from modeling_mobilemoe import kernels
from modeling_mobilemoe.cache_mobilemoe import BlockLayer
from modeling_mobilemoe.fused_mobilemoe import Int4DecoderLayer, is_causal


pytestmark = pytest.mark.skipif(not kernels.available(), reason="the kernels do not compile on this machine")


@pytest.fixture(scope="module")
def model(int4_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.bfloat16).eval()


@pytest.fixture
def num_fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers ran as one operator since the list was last set to zero."""
    count, fused = [0], Int4DecoderLayer._fused

    def counted(*args):
        count[0] += 1
        return fused(*args)

    monkeypatch.setattr(Int4DecoderLayer, "_fused", staticmethod(counted))
    return count


def run(model, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, cache=cache).logits


def filled(model, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    run(model, ids, cache)
    return cache


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 200, (1, 70), generator=torch.Generator().manual_seed(0))


def test_the_operator_computes_what_the_modules_do(model, ids, num_fused, monkeypatch):
    cache = DynamicCache(config=model.config)
    fused = [run(model, part, cache) for part in (ids[:, :65], ids[:, 65:66], ids[:, 66:])]
    assert num_fused == [3 * model.config.num_hidden_layers]
    monkeypatch.setattr(Int4DecoderLayer, "_plan_for", lambda *args: None)
    plain_cache = DynamicCache(config=model.config)
    plain = [run(model, part, plain_cache) for part in (ids[:, :65], ids[:, 65:66], ids[:, 66:])]
    for one, other in zip(fused, plain, strict=True):
        # In FP32 inside a layer, and in BF16 between modules: a near-tie may choose another expert.
        cosine = torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)
        assert cosine.quantile(0.1) > 0.99 and cosine.median() > 0.999
    for layer, plain_layer in zip(cache.layers, plain_cache.layers, strict=True):
        assert type(layer) is BlockLayer
        assert layer.keys.shape == plain_layer.keys.shape
        for states, plain_states in ((layer.keys, plain_layer.keys), (layer.values, plain_layer.values)):
            cosine = torch.nn.functional.cosine_similarity(states.float(), plain_states.float(), dim=-1)
            assert cosine.quantile(0.1) > 0.99 and cosine.median() > 0.999


def test_tokens_in_one_call_and_one_by_one_are_the_same_bits(model, ids):
    together = run(model, ids[:, 60:68], filled(model, ids[:, :60]))
    cache = filled(model, ids[:, :60])
    alone = [run(model, ids[:, at : at + 1], cache) for at in range(60, 68)]
    assert torch.equal(torch.cat(alone, dim=1), together)


def test_blocks_and_tensors_hold_the_same_numbers(model, ids):
    cache = filled(model, ids)
    other = copy.deepcopy(cache)
    before = cache.layers[1].blocks[:, :1].clone()
    keys, values = other.layers[1].keys, other.layers[1].values
    assert other.layers[1].blocks is None and cache.layers[1].blocks is not None
    assert keys.shape == values.shape == (1, model.config.num_key_value_heads, 70, model.config.head_dim)
    # Back into blocks, which a token more needs.
    assert torch.equal(run(model, ids[:, :1], other), run(model, ids[:, :1], cache))
    assert torch.equal(other.layers[1].blocks[:, :1], before)
    assert other.get_seq_length() == cache.get_seq_length() == 71


def test_cropping_forgets_the_last_tokens(model, ids):
    cache = filled(model, ids)
    expected = run(model, ids[:, :3], cache)
    run(model, ids[:, 3:9], cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 70
    assert torch.equal(run(model, ids[:, :3], cache), expected)
    cache.layers[0].crop(-1000)
    assert cache.layers[0].get_seq_length() == 0
    cache.reset()
    assert cache.get_seq_length() == 0 and type(cache.layers[0]) is BlockLayer


def test_a_cache_from_elsewhere_is_taken_over(model, ids, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Int4DecoderLayer, "_plan_for", lambda *args: None)
        cache = filled(model, ids)
    keys, values = cache.layers[0].keys.clone(), cache.layers[0].values.clone()
    assert type(cache.layers[0]) is DynamicLayer
    run(model, ids[:, :1], cache)
    assert type(cache.layers[0]) is BlockLayer
    assert torch.equal(cache.layers[0].keys[:, :, :70], keys)
    assert torch.equal(cache.layers[0].values[:, :, :70], values)


def test_what_the_operator_cannot_do_runs_module_by_module(model, ids, num_fused):
    batch = ids.view(2, 35)
    assert run(model, batch, DynamicCache(config=model.config)).shape[:2] == (2, 35)
    with torch.no_grad():
        padded = torch.ones(1, 70, dtype=torch.long)
        padded[:, :5] = 0
        model(ids, attention_mask=padded, cache=DynamicCache(config=model.config))
        model(ids, cache=StaticCache(config=model.config, max_cache_len=80))
        model(ids, use_cache=False)
    # Gradients reach the routers and norms.
    assert model(ids, cache=DynamicCache(config=model.config)).logits.requires_grad
    assert num_fused == [0]


def test_hooks_and_other_modules_are_seen_at_once(model, ids, num_fused):
    model, seen = copy.deepcopy(model), []
    layers = model.config.num_hidden_layers
    cache = filled(model, ids)
    linear = model.model.layers[0].self_attn.q_proj
    handle = linear.register_forward_hook(lambda *args: seen.append(1))
    num_fused[0] = 0
    run(model, ids[:, :1], cache)
    assert seen == [1] and num_fused == [layers - 1]
    handle.remove()
    run(model, ids[:, :1], cache)
    assert num_fused == [2 * layers - 1]
    # Another weight takes effect, too.
    before = run(model, ids[:, :1], copy.deepcopy(cache))
    model.load_state_dict(
        {
            name: tensor.flip(0) if name.endswith("o_proj.qweight") else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    assert not torch.equal(run(model, ids[:, :1], cache), before)


def test_hidden_states_are_recorded(model, ids):
    model = copy.deepcopy(model)
    with torch.no_grad():
        output = model(
            ids, cache=DynamicCache(config=model.config), output_hidden_states=True, output_router_logits=True
        )
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert len(output.router_logits) == model.config.num_hidden_layers


@pytest.mark.parametrize("start", [0, 5])
def test_only_a_causal_mask_is_one(start: int):
    causal = torch.ones(3, start + 3, dtype=torch.bool).tril(start)[None, None]
    assert is_causal(causal, 3, start)
    other = causal.clone()
    other[0, 0, 2, 0] = False
    assert not is_causal(other, 3, start)
    assert not is_causal(causal, 3, start + 1)
    assert not is_causal(torch.zeros(1, 1, 3, start + 3), 3, start)
