"""The comparison with PyTorch: correct programs pass whatever their weights, and defects are refused."""

import copy
import re
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mobilemoe.export.parity import EXACT_DB, Reference, compare, encode_prompts, reference_logits
from mobilemoe.export.program import DenseMoE, ExportModel, ProgramOptions, QuantizedMoEFFN
from mobilemoe.generation import LanguageModel
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, dequantize, kernels, quantize
from modeling_mobilemoe.int4_mobilemoe import dequantize_tensor, pack_int4, quantize_tensor
from modeling_mobilemoe.kernels.modules import MoEFFN
from modeling_mobilemoe.tiles_mobilemoe import linear_tiles, linear_weights


PROMPTS = [[3, 4, 5, 6], [7, 8, 9]]
needs_kernels = pytest.mark.skipif(
    shutil.which("c++") is None or not kernels.available(), reason="needs a C++ compiler and CMake"
)


@pytest.fixture
def packed(tiny_model):
    return quantize(tiny_model)


def test_prompts_of_a_batch_do_not_see_its_padding(packed):
    for prompt, rows in zip(PROMPTS, reference_logits(packed, PROMPTS), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(rows, packed(torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4)


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
    assert set(reference.sources) == {"expert grid", "BF16 scales", "INT8 activations"}
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


NUM_EXPERTS = 60
WIDE_PROMPTS = [list(range(3, 19)), list(range(400, 412))]
# Of programs, by the name of a module in `PROGRAMS`.
PROGRAMS = {"mobilemoe": MoEFFN, "llama": QuantizedMoEFFN, "fp32": DenseMoE, "bf16": DenseMoE}


def reference_and_program(model, kind: str, kv_cache: str = "fp32") -> tuple[Reference, ExportModel]:
    """Of a packed model, which programs in full precision expand."""
    moe_module = PROGRAMS[kind]
    options = ProgramOptions(
        max_seq_len=32,
        weights=kind if moe_module is DenseMoE else "int4",
        expert_bits=4 if moe_module is MoEFFN else 8,
        all_logits=True,
        kv_cache=kv_cache,
    )
    if moe_module is DenseMoE:
        dequantize(model)
    reference = Reference(model, WIDE_PROMPTS, [], 32)
    reference.add_sources(model, options, crosses=kind == "llama", on_kernels=moe_module is MoEFFN)
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
    moe.packed_gate_up = moe.packed_gate_up.unflatten(2, (2, -1)).flip(2).flatten(2)


def swapped_nibbles(program, experts):
    edit_linear(program.layers[1].attention, 0, lambda qweight, scale: (qweight >> 4 | qweight << 4, scale))


def another_epsilon(program, experts):
    program.layers[1].eps = 1e-6


def layers_swapped(program, experts):
    program.layers = torch.nn.ModuleList(list(program.layers)[::-1])


def keys_for_values(program, experts):
    inputs = program.layers[1].attention
    inputs.tiles_1, inputs.tiles_2 = inputs.tiles_2, inputs.tiles_1


def transposed_output(program, experts):
    """Read as `[in, out]`, which the square one of S may be."""

    def edit(qweight, scale):
        values = dequantize_tensor(qweight, scale, torch.float32)
        quantized, scale = quantize_tensor(values.T.reshape(values.shape))
        return pack_int4(quantized), scale

    edit_linear(program.layers[1].attention, 3, edit)


def head_rows_swapped(program, experts):
    # A copy: the table keeps its rows.
    program.lm_head.tiles = program.lm_head.tiles.clone()
    qweight, scale = linear_weights(program.lm_head.tiles, program.lm_head.out_features)
    program.lm_head.tiles = linear_tiles(swap(qweight, 5, 6), swap(scale, 5, 6))


def cache_not_written(program, experts):
    """What was in the cache before stays: every call has another one."""
    layer = program.layers[1]
    forward = layer.forward

    def stale(*inputs):
        before = layer.kv_cache.clone()
        output = forward(*inputs)
        layer.kv_cache.copy_(before)
        return output

    layer.forward = stale


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
    transposed_output,
    head_rows_swapped,
    cache_not_written,
]


@needs_kernels
@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
def test_a_correct_program_of_random_weights_passes(kv_cache, wide_model):
    reference, program = reference_and_program(wide_model(3), "mobilemoe", kv_cache)
    reference.check_parts(program)
    report = reference.report(EagerProgram(program))
    for agreement in (report.pte_to_pytorch_with_the_same_roundings, report.prefill_to_token_by_token):
        assert agreement.sqnr_db > EXACT_DB and agreement.top1_agreement == 1
    # Rounding inputs to INT8 is what the program is meant to differ in.
    assert report.pte_to_checkpoint.sqnr_db < EXACT_DB


@needs_kernels
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_one_layer_is_refused(defect, wide_model):
    reference, program = reference_and_program(wide_model(2), "mobilemoe", "int8")
    # Two that tokens use.
    defect(program, reference.layers[1].experts.flatten().unique()[:2].tolist())
    with pytest.raises(ValueError, match="does not compute this model: the signal to noise in dB of pte_to_pytorch"):
        reference.report(EagerProgram(program))


# Defects of programs of ExecuTorch's operators. They get a program and the experts that the tokens of its second layer
# choose, `(tokens, top_k)`.


def replace_weight(linear, edit):
    """Of a linear, which XNNPACK would round its input for: the weight in full precision stands for it."""
    weight = linear.weight
    expanded = weight if type(weight) in (torch.nn.Parameter, torch.Tensor) else weight.dequantize()
    if isinstance(linear, torch.nn.Linear):
        linear.weight = torch.nn.Parameter(edit(expanded.detach().clone()), requires_grad=False)
    else:
        linear.weight = edit(expanded.clone())


def chosen_experts_swapped(program, chosen):
    swap_experts(program.layers[1].moe, *chosen.flatten().unique()[:2].tolist())


def other_experts_swapped(program, chosen):
    """Two that no token of the prompts gets."""
    others = [expert for expert in range(NUM_EXPERTS) if not (chosen == expert).any()]
    swap_experts(program.layers[1].moe, *others[:2])


def swap_experts(moe, first, second):
    if isinstance(moe, QuantizedMoEFFN):
        moe.packed_down = swap(moe.packed_down, first, second)
        return
    width = moe.down_proj.weight.shape[1] // NUM_EXPERTS

    def edit(weight):
        experts = weight.unflatten(1, (NUM_EXPERTS, width)).transpose(0, 1)
        return swap(experts, first, second).transpose(0, 1).flatten(1).contiguous()

    replace_weight(moe.down_proj, edit)


def wrong_scale(program, chosen):
    replace_weight(program.layers[1].attention.o_proj, lambda weight: weight * 1.05)


def one_wrong_group(program, chosen):
    def edit(weight):
        weight[5, :32] *= 1.5
        return weight

    replace_weight(program.layers[1].shared_expert.down_proj, edit)


def transposed_projection(program, chosen):
    replace_weight(program.layers[1].attention.o_proj, lambda weight: weight.T.contiguous())


def wrong_head_rows(program, chosen):
    replace_weight(program.lm_head, lambda weight: swap(weight, 5, 6))


def wrong_table_rows(program, chosen):
    table = program.embed_tokens
    if isinstance(table, torch.nn.Embedding):
        table.weight = torch.nn.Parameter(swap(table.weight, 5, 6))
    else:
        table.weight, table.scale = swap(table.weight, 5, 6), swap(table.scale, 5, 6)


def norm_left_out(program, chosen):
    program.norm.weight = torch.nn.Parameter(torch.full_like(program.norm.weight, 1.01))


def another_norm_epsilon(program, chosen):
    program.layers[0].input_layernorm.variance_epsilon = 1e-6


def three_experts_of_four(program, chosen):
    program.layers[1].moe.top_k = 3


def stale_cache(program, chosen):
    """A call over what an earlier one left: keys and values of the earlier one are lost."""
    attention = program.layers[1].attention
    attend = attention.forward

    def forgetful(hidden_states, cos, sin, start):
        attention.k_cache.zero_()
        return attend(hidden_states, cos, sin, start)

    attention.forward = forgetful


def values_for_keys(program, chosen):
    inputs = program.layers[1].attention.inputs
    inputs.k_proj, inputs.v_proj = inputs.v_proj, inputs.k_proj


STOCK_DEFECTS = [
    chosen_experts_swapped,
    other_experts_swapped,
    wrong_scale,
    one_wrong_group,
    transposed_projection,
    wrong_head_rows,
    wrong_table_rows,
    norm_left_out,
    another_norm_epsilon,
    three_experts_of_four,
    stale_cache,
    values_for_keys,
    rotation_off_by_one,
    no_expert_bias,
    larger_route_scale,
    layers_swapped,
]
STOCK_PROGRAMS = [("llama", "fp32"), ("llama", "int8"), ("fp32", "fp32"), ("bf16", "fp32")]
needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")


def small_model(num_layers: int) -> torch.nn.Module:
    """As initialised, then packed. It has more experts than the prompts choose, and a square output projection."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "intermediate_size_mlp": 128, "vocab_size": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = MobileMoEConfig(num_hidden_layers=num_layers, num_local_experts=NUM_EXPERTS, **sizes)
    model = MobileMoEForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.feed_forward.expert_bias.normal_(std=0.02)
    return quantize(model)


@needs_executorch
@pytest.mark.parametrize(("kind", "kv_cache"), STOCK_PROGRAMS)
def test_defects_in_programs_of_stock_operators_are_refused(kind, kv_cache):
    reference, program = reference_and_program(small_model(2), kind, kv_cache)
    reference.check_parts(program)
    # A program begins with an empty cache.
    assert not any(buffer.any() for layer in program.layers for buffer in (layer.attention.k_cache,))
    chosen = reference.layers[1].experts
    passed = []
    for defect in STOCK_DEFECTS:
        damaged = copy.deepcopy(program)
        defect(damaged, chosen)
        try:
            reference.check_parts(damaged)
            passed.append(defect.__name__)
        except ValueError as error:
            assert re.search("does not compute this model: of the .* the median token has a signal", str(error))
    assert not passed
    reference.check_parts(program)


@pytest.mark.slow
@needs_executorch
@pytest.mark.parametrize(("kind", "kv_cache"), STOCK_PROGRAMS)
def test_a_deep_model_passes_whatever_its_logits(kind, kv_cache):
    """20 layers amplify the last bit of a sum: no limit on logits holds for any weights."""
    reference, program = reference_and_program(small_model(20), kind, kv_cache)
    reference.check_parts(program)
    report = reference.report(EagerProgram(program))
    if kind == "llama":
        assert report.pte_to_pytorch_with_the_same_roundings.sqnr_db < 40


def test_tokenizer_of_another_model_is_named(tokenizer):
    assert all(0 < len(prompt) <= 24 for prompt in encode_prompts(tokenizer, 512, 64))
    assert all(len(prompt) == 4 for prompt in encode_prompts(tokenizer, 512, 4))
    stranger = lambda text: SimpleNamespace(input_ids=[1, 600])  # noqa: E731
    with pytest.raises(ValueError, match="gives the id 600, the model has 512 tokens"):
        encode_prompts(stranger, 512, 64)
