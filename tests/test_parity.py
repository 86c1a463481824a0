"""The comparison with PyTorch: each rounding is what it says, and the model is as it was afterwards."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from mobilemoe.export.packing import expand_rows, operator_rows
from mobilemoe.export.parity import (
    EXACT_DB,
    SOURCES,
    Reference,
    compare,
    encode_prompts,
    reference_logits,
    rounded_as,
)
from mobilemoe.export.program import ExportModel, ProgramOptions, QuantizedMoEFFN
from mobilemoe.generation import LanguageModel
from modeling_mobilemoe import kernels, quantize
from modeling_mobilemoe.int4_mobilemoe import dequantize_tensor
from modeling_mobilemoe.kernels.modules import MoEFFN
from modeling_mobilemoe.tiles_mobilemoe import linear_tiles, linear_weights


PROMPTS = [[3, 4, 5, 6], [7, 8, 9]]
needs_kernels = pytest.mark.skipif(
    shutil.which("c++") is None or not kernels.available(), reason="needs a C++ compiler and CMake"
)


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
        assert compare(before, reference_logits(packed, PROMPTS)).sqnr_db > 100
    for source in SOURCES[2:4]:
        with rounded_as(packed, {source}, 4, on_kernels=True):
            # In the median: of one position the rounding moves the choice of experts.
            assert 0.999 < compare(before, reference_logits(packed, PROMPTS)).cosine_median < 0.9999999
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


class EagerProgram(LanguageModel):
    """A program that was not lowered."""

    has_all_logits = True

    def __init__(self, module: ExportModel):
        self.module, self.max_seq_len, self.eos_ids = module, module.options.max_seq_len, []

    @torch.no_grad()
    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        return self.module(torch.tensor([tokens]), torch.tensor([start]))[0, -num_positions:]

    @torch.no_grad()
    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.module(torch.tensor([tokens]), torch.tensor([0]))[0]


WIDE_PROMPTS = [list(range(3, 19)), list(range(400, 412))]


def reference_and_program(model, moe_module, kv_cache: str = "fp32") -> tuple[Reference, ExportModel]:
    reference = Reference(model, WIDE_PROMPTS, [], 32)
    expert_bits = 4 if moe_module is MoEFFN else 8
    options = ProgramOptions(max_seq_len=32, expert_bits=expert_bits, all_logits=True, kv_cache=kv_cache)
    reference.add_sources(model, options, crosses=moe_module is not MoEFFN, on_kernels=moe_module is MoEFFN)
    return reference, ExportModel(model, options, moe_module)


def edit_linear(matrices, index, edit):
    """Of a linear whose outputs are a multiple of 32."""
    tiles = matrices.get_buffer(f"tiles_{index}")
    setattr(matrices, f"tiles_{index}", linear_tiles(*edit(*linear_weights(tiles, 32 * len(tiles)))))


def experts_swapped(program, experts):
    moe = program.layers[1].moe
    moe.packed_down = swap(moe.packed_down, *experts)


def swap(tensor, first, second):
    order = list(range(len(tensor)))
    order[first], order[second] = second, first
    return tensor[order]


def scales_of_the_output(program, experts):
    edit_linear(program.layers[1].attention, 3, lambda qweight, scale: (qweight, scale * 1.05))


def one_scale(program, experts):
    def edit(qweight, scale):
        scale[5, 3] *= 1.5
        return qweight, scale

    edit_linear(program.layers[1].attention, 0, edit)


def one_integer(program, experts):
    def edit(qweight, scale):
        qweight[7, 11] ^= 1
        return qweight, scale

    edit_linear(program.layers[1].feed_forward, 0, edit)


def rotation_off_by_one(program, experts):
    program.cos, program.sin = program.cos.roll(1, 0), program.sin.roll(1, 0)


def no_expert_bias(program, experts):
    program.layers[1].moe.expert_bias = torch.zeros_like(program.layers[1].moe.expert_bias)


def larger_route_scale(program, experts):
    program.layers[1].moe.route_scale *= 1.02


def gate_for_up(program, experts):
    moe = program.layers[1].moe
    moe.packed_gate_up = moe.packed_gate_up.flip(2)


def swapped_nibbles(program, experts):
    edit_linear(program.layers[1].attention, 0, lambda qweight, scale: (qweight >> 4 | qweight << 4, scale))


def another_epsilon(program, experts):
    program.layers[1].eps = 1e-6


def layers_swapped(program, experts):
    program.layers = torch.nn.ModuleList(list(program.layers)[::-1])


def keys_for_values(program, experts):
    inputs = program.layers[1].attention
    inputs.tiles_1, inputs.tiles_2 = inputs.tiles_2, inputs.tiles_1


DEFECTS = [
    experts_swapped,
    scales_of_the_output,
    one_scale,
    one_integer,
    rotation_off_by_one,
    no_expert_bias,
    larger_route_scale,
    gate_for_up,
    swapped_nibbles,
    another_epsilon,
    layers_swapped,
    keys_for_values,
]


@needs_kernels
@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
def test_a_correct_program_of_random_weights_passes(kv_cache, wide_model):
    reference, program = reference_and_program(wide_model(3), MoEFFN, kv_cache)
    reference.check_layers(program)
    report = reference.report(EagerProgram(program))
    for agreement in (report.pte_to_pytorch_with_the_same_roundings, report.prefill_to_token_by_token):
        assert agreement.sqnr_db > EXACT_DB and agreement.top1_agreement == 1
    # Rounding inputs to INT8 is what the program is meant to differ in.
    assert report.pte_to_checkpoint.sqnr_db < EXACT_DB


@needs_kernels
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_one_layer_is_refused(defect, wide_model):
    reference, program = reference_and_program(wide_model(2), MoEFFN, "int8")
    # Two that tokens use.
    defect(program, reference.layers[1].experts.flatten().unique()[:2].tolist())
    with pytest.raises(ValueError, match="does not compute this model: the signal to noise in dB of pte_to_pytorch"):
        reference.report(EagerProgram(program))


def stock_experts_swapped(program, experts):
    moe = program.layers[1].moe
    moe.packed_down = swap(moe.packed_down, *experts)


def stock_output_of_another_layer(program, experts):
    program.layers[1].attention.o_proj = program.layers[0].attention.o_proj


@pytest.mark.parametrize(
    "defect",
    [
        None,
        stock_experts_swapped,
        stock_output_of_another_layer,
        rotation_off_by_one,
        no_expert_bias,
        larger_route_scale,
        layers_swapped,
    ],
)
def test_a_defect_in_one_layer_of_stock_operators_is_refused(defect, wide_model):
    pytest.importorskip("executorch.extension.llm.custom_ops.custom_ops", reason="executorch is not installed")
    reference, program = reference_and_program(wide_model(2), QuantizedMoEFFN)
    if defect is None:
        reference.check_layers(program)
        assert not any(buffer.any() for layer in program.layers for buffer in (layer.attention.k_cache,))
        return
    defect(program, reference.layers[1].experts.flatten().unique()[:2].tolist())
    with pytest.raises(ValueError, match="does not compute this model: .* in layer [01] has a signal to noise of"):
        reference.check_layers(program)


def test_tokenizer_of_another_model_is_named(tokenizer):
    assert all(0 < len(prompt) <= 24 for prompt in encode_prompts(tokenizer, 512, 64))
    assert all(len(prompt) == 4 for prompt in encode_prompts(tokenizer, 512, 4))
    stranger = lambda text: SimpleNamespace(input_ids=[1, 600])  # noqa: E731
    with pytest.raises(ValueError, match="gives the id 600, the model has 512 tokens"):
        encode_prompts(stranger, 512, 64)
