"""Each rounding of a program inside the PyTorch model is what it says, and the model is as it was afterwards."""

import copy

import pytest
import torch

from mobilemoe.export.packing import expand_rows, operator_rows
from mobilemoe.export.parity import compare, reference_logits
from mobilemoe.export.roundings import rounded_as
from modeling_mobilemoe import quantize
from modeling_mobilemoe.int4_mobilemoe import dequantize_tensor


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
    for sources in ({source} for source in ("expert grid", "BF16 scales", "INT8 activations")):
        with rounded_as(packed, sources, 4):
            assert not torch.equal(before[0], reference_logits(packed, PROMPTS)[0])
    with rounded_as(packed, set(), 4, on_kernels=True):
        # Sums in another order, and nothing rounded.
        assert compare(before, reference_logits(packed, PROMPTS)).sqnr_db > 100
    for source in ("INT8 activations", "INT8 expert activations"):
        with rounded_as(packed, {source}, 4, on_kernels=True):
            # In the median: of one position the rounding moves the choice of experts.
            assert 0.999 < compare(before, reference_logits(packed, PROMPTS)).cosine_median < 0.9999999
    assert [type(module) for module in packed.modules()] == classes
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.state_dict().items())
    assert torch.equal(before[0], reference_logits(packed, PROMPTS)[0])


def test_experts_compute_with_the_rows_of_the_operator(packed):
    experts = packed.model.layers[0].feed_forward.experts
    qweight, scale = experts.down_qweight, experts.down_scale
    with rounded_as(packed, {"expert grid"}, 4):
        experts = packed.model.layers[0].feed_forward.experts
        expected = expand_rows(*operator_rows(qweight[1], scale[1], -1, 4)).T
        assert torch.equal(experts._expand(qweight, scale, 1, torch.float32), expected)
    experts = packed.model.layers[0].feed_forward.experts
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


def test_bf16_arithmetic_is_the_model_in_bf16(tiny_model):
    before = reference_logits(tiny_model, PROMPTS)
    with rounded_as(tiny_model, {"BF16 arithmetic"}, 8):
        rounded = reference_logits(tiny_model, PROMPTS)
    assert torch.equal(before[0], reference_logits(tiny_model, PROMPTS)[0])
    # As good as equal, and for the right reason: the weights have 8 bits.
    assert 30 < compare(before, rounded).sqnr_db < 60
    in_bf16 = reference_logits(copy.deepcopy(tiny_model).bfloat16(), PROMPTS)
    assert compare(before, in_bf16).sqnr_db < 60
    assert compare(rounded, in_bf16).cosine_median > compare(before, in_bf16).cosine_median > 0.999
