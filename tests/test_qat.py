"""Quantization-aware training: what the loss sees, what moves, and what comes out."""

import pytest
import torch

from modeling_mobilemoe import quantize
from modeling_mobilemoe.qat import convert, prepare
from modeling_mobilemoe.quantization_mobilemoe import dequantize_tensor, pack_int4, quantize_tensor


INPUT_IDS = torch.arange(2, 66).reshape(2, 32)


def test_every_packed_weight_reads_as_its_rounding(tiny_model):
    originals = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    prepare(tiny_model)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "model.layers.1.feed_forward.experts.down_proj",
        "model.layers.0.feed_forward.shared_expert.down_proj.weight",
    ):
        module_name, parameter_name = name.rsplit(".", 1)
        seen = getattr(tiny_model.get_submodule(module_name), parameter_name)
        quantized, scale = quantize_tensor(originals[name])
        assert torch.equal(seen, dequantize_tensor(pack_int4(quantized), scale, torch.float32)), name
        assert not torch.equal(seen, originals[name])
    assert torch.equal(tiny_model.lm_head.weight, tiny_model.model.embed_tokens.weight)
    router = tiny_model.model.layers[0].feed_forward.router
    assert torch.equal(router.weight, originals["model.layers.0.feed_forward.router.weight"])


def test_gradient_is_straight_through(tiny_model):
    prepare(tiny_model)
    layer = tiny_model.model.layers[0].self_attn.q_proj
    upstream = torch.randn_like(layer.weight)
    layer.weight.backward(upstream)
    assert torch.equal(layer.parametrizations.weight.original.grad, upstream)


def test_one_step_moves_every_parameter_and_keeps_the_tie(tiny_model):
    prepare(tiny_model.train())
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    input_ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    tiny_model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert [name for name, parameter in tiny_model.named_parameters() if torch.equal(parameter, before[name])] == []
    assert torch.equal(tiny_model.lm_head.weight, tiny_model.model.embed_tokens.weight)


@pytest.mark.parametrize("experts_implementation", ["eager", "batched_mm", "grouped_mm"])
def test_converted_model_computes_what_training_saw(tiny_model, experts_implementation):
    tiny_model.set_experts_implementation(experts_implementation)
    prepare(tiny_model)
    with torch.no_grad():
        seen = tiny_model(INPUT_IDS).logits
        packed = convert(tiny_model)(INPUT_IDS).logits
    if experts_implementation == "eager":
        assert torch.equal(packed, seen)
    else:
        # The packed experts sum in the eager order; the other kernels differ in the last bits.
        torch.testing.assert_close(packed, seen, rtol=1e-5, atol=1e-5)


def test_convert_yields_the_integers_of_quantize(tiny_model, tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    expected = quantize(AutoModelForCausalLM.from_pretrained(tiny_checkpoint)).state_dict()
    converted = convert(prepare(plain)).state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_packed_model_cannot_be_prepared(tiny_model):
    with pytest.raises(ValueError, match="packed INT4 and cannot be trained"):
        prepare(quantize(tiny_model))
