"""The comparison with PyTorch: each rounding is what it says, and the model is as it was afterwards."""

import copy
from types import SimpleNamespace

import pytest
import torch

from mobilemoe.export.packing import expand_rows, operator_rows
from mobilemoe.export.parity import (
    MIN_COSINE,
    SOURCES,
    Reference,
    compare,
    encode_prompts,
    reference_logits,
    rounded_as,
)
from mobilemoe.export.program import ProgramOptions
from modeling_mobilemoe import quantize
from modeling_mobilemoe.fused_mobilemoe import dequantize_tensor


PROMPTS = [[3, 4, 5, 6], [7, 8, 9]]


@pytest.fixture
def packed(tiny_model):
    return quantize(tiny_model)


def test_nothing_rounded_is_the_model_and_everything_is_undone(packed):
    state = copy.deepcopy(packed.state_dict())
    classes = [type(module) for module in packed.modules()]
    before = reference_logits(packed, PROMPTS)
    with rounded_as(packed, set(), 8):
        assert compare(before, reference_logits(packed, PROMPTS)).cosine_min > 0.999999
    for sources in ({source} for source in SOURCES[:3]):
        with rounded_as(packed, sources, 4):
            assert not torch.equal(before[0], reference_logits(packed, PROMPTS)[0])
    with rounded_as(packed, set(), 4, on_kernels=True):
        # Sums in another order, and nothing rounded.
        assert compare(before, reference_logits(packed, PROMPTS))["sqnr_db"] > 100
    for source in SOURCES[2:4]:
        with rounded_as(packed, {source}, 4, on_kernels=True):
            # In the median: of one position the rounding moves the choice of experts.
            assert 0.999 < compare(before, reference_logits(packed, PROMPTS))["cosine_median"] < 0.9999999
    assert [type(module) for module in packed.modules()] == classes
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.state_dict().items())
    assert torch.equal(before[0], reference_logits(packed, PROMPTS)[0])


def test_prompts_of_a_batch_do_not_see_its_padding(packed):
    for prompt, rows in zip(PROMPTS, reference_logits(packed, PROMPTS), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(rows, packed(torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4)


def test_experts_compute_with_the_rows_of_the_operator(packed):
    experts = packed.model.layers[0].feed_forward.experts
    qweight, scale = experts.down_qweight, experts.down_scale
    with rounded_as(packed, {"expert grid"}, 4):
        expected = expand_rows(*operator_rows(qweight[1], scale[1], -1, 4)).T
        assert torch.equal(experts._expand(qweight, scale, 1, torch.float32), expected)
    assert torch.equal(
        experts._expand(qweight, scale, 1, torch.float32), dequantize_tensor(qweight[1], scale[1], torch.float32)
    )


def test_scales_of_head_and_linears_are_bf16_and_those_of_the_table_are_not(packed):
    embedding = packed.get_input_embeddings()
    linear = packed.model.layers[0].self_attn.q_proj
    scale = embedding.weight_scale.clone()
    with rounded_as(packed, {"BF16 scales"}, 8):
        assert torch.equal(packed.get_input_embeddings().weight_scale, scale)
        (table,) = packed.get_output_embeddings()._embedding
        for rounded in (table.weight_scale, linear.weight_scale):
            assert torch.equal(rounded, rounded.bfloat16().half())
        assert torch.equal(table.weight_scale.float(), scale.bfloat16().float())


def test_inputs_of_linears_have_at_most_256_values(packed):
    seen = []
    linear = packed.model.layers[1].self_attn.o_proj
    with rounded_as(packed, {"INT8 activations"}, 8):
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        reference_logits(packed, [list(range(3, 9))])
        hook.remove()
    scaled = seen[0][0]  # (T, N * D)
    for row in scaled:
        steps = row.unique().diff()
        assert torch.allclose(steps / steps.min(), (steps / steps.min()).round(), atol=1e-2)


def test_numbers_of_the_comparison():
    expected = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    assert compare(expected, expected).top1_agreement == 1
    actual = compare(expected, [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])
    assert (actual.cosine_mean, actual.cosine_min, actual.top1_agreement) == (0.5, 0.0, 0.5)
    # Energy 5, error 8.
    assert actual.sqnr_db == pytest.approx(-2.04)
    # Half of KL([0.119, 0.881] || [0.881, 0.119]) = 2 * 0.762 * 2 / 2.
    assert actual.kl_nats == pytest.approx(0.76159, abs=1e-4)


def test_a_rounding_that_the_program_lacks_is_found(packed):
    options = ProgramOptions(max_seq_len=64, expert_bits=4)
    reference = Reference(packed, PROMPTS, [497], 64)
    reference.add_sources(packed, options, crosses=True)
    assert set(reference.sources) == set(SOURCES[:3])
    # INT4 once more is the largest loss, BF16 scales the smallest.
    noise = {source: row.sqnr_db for source, row in reference.sources.items()}
    assert noise["BF16 scales"] > noise["INT8 activations"] > noise["expert grid"]
    assert not torch.equal(reference.same_rounding[0], reference.checkpoint[0])


def test_weights_of_a_training_that_diverged_are_named(tiny_model):
    with torch.no_grad():
        tiny_model.model.norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match="logits that are not numbers: its weights are damaged, or its training"):
        Reference(tiny_model, PROMPTS, [497], 64)


def swapped_nibbles(layer):
    layer.self_attn.q_proj.qweight = layer.self_attn.q_proj.qweight >> 4 | layer.self_attn.q_proj.qweight << 4


def gate_for_up(layer):
    experts = layer.feed_forward.experts
    for name in ("gate_up_qweight", "gate_up_scale"):
        setattr(experts, name, torch.cat(experts.get_buffer(name).chunk(2, dim=-1)[::-1], dim=-1))


def no_expert_bias(layer):
    layer.feed_forward.expert_bias.zero_()


def larger_route_scale(layer):
    layer.feed_forward.router.routed_scaling_factor *= 1.2


def experts_in_another_order(layer):
    experts = layer.feed_forward.experts
    experts.down_qweight, experts.down_scale = experts.down_qweight.roll(1, 0), experts.down_scale.roll(1, 0)


@pytest.mark.parametrize(
    "defect", [swapped_nibbles, gate_for_up, no_expert_bias, larger_route_scale, experts_in_another_order]
)
def test_a_defect_in_one_layer_is_below_the_threshold(defect, packed):
    prompts = [list(range(3, 27)), list(range(40, 64))]
    expected = reference_logits(packed, prompts)
    defect(packed.model.layers[0])
    assert compare(expected, reference_logits(packed, prompts)).cosine_median < MIN_COSINE


def test_tokenizer_of_another_model_is_named(tokenizer):
    assert all(0 < len(prompt) <= 24 for prompt in encode_prompts(tokenizer, 512, 64))
    assert all(len(prompt) == 4 for prompt in encode_prompts(tokenizer, 512, 4))
    stranger = lambda text: SimpleNamespace(input_ids=[1, 600])  # noqa: E731
    with pytest.raises(ValueError, match="gives the id 600, the model has 512 tokens"):
        encode_prompts(stranger, 512, 64)
