"""Quantization-aware training: what the loss sees, what moves, what is refused, and what comes out."""

import copy
import json
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, IntxFakeQuantizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from mobilemoe.export.program import int8_values
from mobilemoe.export.roundings import rounded_as
from mobilemoe.train import fake_quantization
from mobilemoe.train import recipe as training
from mobilemoe.train.fake_quantization import GRIDS, Int8BlockFakeQuantizer, Int8FakeQuantizer, int4_values
from mobilemoe.train.qat import (
    FakeQuantizationStart,
    convert,
    enable_fake_quantization,
    preparation_table,
    prepare,
)
from mobilemoe.train.recipe import load_model
from mobilemoe.train.routing import set_capacity_factor
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, dequantize, quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format, dequantize_tensor, pack_int4, quantize_tensor
from modeling_mobilemoe.kernels import reference


AXES = ["output", "input"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "capacity"]


def set_implementation(model: MobileMoEForCausalLM, name: str) -> None:
    # Twice the experts over top-k: nothing is dropped.
    set_capacity_factor(model, 2.0) if name == "capacity" else model.set_experts_implementation(name)


def packed_values(weight: torch.Tensor, dim: int = -1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    quantized, scale = quantize_tensor(weight, dim)
    return dequantize_tensor(pack_int4(quantized), scale, dtype, dim)


def group_dim(name: str, axis: str) -> int:
    return Int4Format(axis).expert_dim if "experts." in name and "shared" not in name else -1


def is_packed(name: str) -> bool:
    return name.endswith(("_proj", "_proj.weight", "embed_tokens.weight"))


def awkward_weight(*shape: int) -> torch.Tensor:
    """Groups full of ties, of zeros, of subnormal scales, and ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    ties = torch.randint(-15, 16, shape, generator=generator) / 2
    ties[..., ::8] = 7.5
    weight[0] = ties[0] / 64
    weight[1, :32] = 0
    weight[1, 32:] *= 1e-7
    return weight


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [torch.float32, torch.bfloat16])
def test_training_sees_the_values_of_packing(dim, dtype, seen, monkeypatch):
    # Not a divisor of anything: the last part is smaller.
    monkeypatch.setattr(fake_quantization, "CPU_CHUNK", 32 * 96 * 5)
    weight = awkward_weight(7, 64, 96).to(dtype)
    assert torch.equal(int4_values(weight, dim, seen), packed_values(weight, dim, seen))
    transposed = weight.mT
    assert torch.equal(int4_values(transposed, dim, seen), packed_values(transposed, dim, seen))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_torchao_int4_is_another_grid(precision):
    """Why linears get our weight quantizer: should this fail one day, torchao's own will do."""
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32, scale_precision=precision))
    theirs, (integers, _) = quantizer(weight), quantize_tensor(weight)
    scale = quantizer.scale.float().repeat_interleave(32, dim=1)
    differing = ((theirs / scale).round() != integers).float().mean()
    assert 0.001 < differing < 0.02
    assert not torch.equal(theirs, packed_values(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_round_as_the_exported_linear_does(dtype):
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as exported

    hidden_states = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden_states[0, 0] = 0
    hidden_states[0, 1] = hidden_states[0, 1].abs() + 3
    expected = exported._apply_int8_act_asym_per_token_quant_dequant(hidden_states.float())
    assert torch.equal(Int8FakeQuantizer()(hidden_states), expected.to(dtype))
    # The exporter has the same rounding, of its own.
    assert torch.equal(int8_values(hidden_states), expected.to(dtype))


@pytest.mark.parametrize(("grid", "int8"), [("mobilemoe", Int8BlockFakeQuantizer), ("per_token", Int8FakeQuantizer)])
def test_gradient_of_a_linear_is_the_one_by_hand(tiny_model, grid, int8):
    prepare(tiny_model, activations=grid)
    linear = tiny_model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, FakeQuantizedLinear)
    # One value of each group is clipped from 7.5 to 7: it gets its gradient too.
    with torch.no_grad():
        linear.weight.copy_(awkward_weight(64, 64))
    inputs = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    linear(inputs).backward(upstream)
    assert torch.equal(linear.weight.grad, upstream.T @ int8()(inputs.detach()))
    assert torch.equal(inputs.grad, upstream @ packed_values(linear.weight))


def rounded_twin(model: MobileMoEForCausalLM, axis: str) -> MobileMoEForCausalLM:
    """A plain model that holds the rounded weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if is_packed(name):
                tensor.copy_(packed_values(tensor, group_dim(name, axis)))
            elif name.endswith(("norm.weight", "expert_bias")):
                tensor.copy_(tensor.bfloat16())
    return twin


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_at_the_rounded_weights(tiny_model, input_ids, axis, implementation):
    set_implementation(tiny_model.train(), implementation)
    twin = rounded_twin(tiny_model, axis)
    prepare(tiny_model, Int4Format(axis), activations="none")
    losses = [model(input_ids, labels=input_ids).loss for model in (tiny_model, twin)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, parameter), expected in zip(tiny_model.named_parameters(), twin.parameters(), strict=True):
        # The order of the sums differs where one tensor is read twice: the embedding and the head.
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


def prepared_experts(model, axis):
    """The experts of a layer, ready for training, and the weights that they should read."""
    experts = model.model.layers[0].feed_forward.experts
    expected = [
        packed_values(weight, Int4Format(axis).expert_dim) for weight in (experts.gate_up_proj, experts.down_proj)
    ]
    prepare(model, Int4Format(axis), "per_token")
    return model.model.layers[0].feed_forward.experts, *expected


def routed_tokens():
    """Tokens, four experts for each, and their weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 64, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(6)])
    return tokens, index, torch.rand(6, 4, generator=generator)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_round_both_inputs(tiny_model, axis, implementation):
    set_implementation(tiny_model, implementation)
    experts, gate_up, down = prepared_experts(tiny_model, axis)
    tokens, index, weights = routed_tokens()
    int8, expected = Int8FakeQuantizer(), torch.zeros(6, 64)
    for token in range(6):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (int8(tokens[token]) @ gate_up[expert]).chunk(2)
            expected[token] += weight * (int8(F.silu(gate) * up) @ down[expert])
    with torch.no_grad():
        torch.testing.assert_close(experts(tokens, index, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_experts_are_those_by_hand(tiny_model, axis, implementation):
    """Straight through all four roundings: products with rounded factors, as if nothing had been rounded between."""
    set_implementation(tiny_model.train(), implementation)
    # As large as trained ones, or the gradients would be too small to compare.
    with torch.no_grad():
        for parameter in tiny_model.model.layers[0].feed_forward.experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8)
    experts, gate_up_proj, down_proj = prepared_experts(tiny_model, axis)
    tokens, index, weights = routed_tokens()
    upstream = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    int8 = Int8FakeQuantizer()
    d_gate_up, d_down = torch.zeros_like(gate_up_proj), torch.zeros_like(down_proj)
    d_tokens, d_weights = torch.zeros_like(tokens), torch.zeros_like(weights)
    for token in range(6):
        for position, expert in enumerate(index[token].tolist()):
            inputs = int8(tokens[token])
            gate, up = (inputs @ gate_up_proj[expert]).chunk(2)
            gated = int8(F.silu(gate) * up)
            d_weights[token, position] = upstream[token] @ (gated @ down_proj[expert])
            d_output = weights[token, position] * upstream[token]
            d_down[expert] += torch.outer(gated, d_output)
            d_gated = down_proj[expert] @ d_output
            sigmoid = gate.sigmoid()
            d_gate = d_gated * up * sigmoid * (1 + gate * (1 - sigmoid))
            d_both = torch.cat((d_gate, d_gated * F.silu(gate)))
            d_gate_up[expert] += torch.outer(inputs, d_both)
            d_tokens[token] += gate_up_proj[expert] @ d_both
    tokens.requires_grad_()
    weights.requires_grad_()
    experts(tokens, index, weights).backward(upstream)
    for name, found, expected in (
        ("tokens", tokens.grad, d_tokens),
        ("weights", weights.grad, d_weights),
        ("gate_up_proj", experts.gate_up_proj.grad, d_gate_up),
        ("down_proj", experts.down_proj.grad, d_down),
    ):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_inputs_round_as_the_operators_do():
    """Groups of zeros, of values that count as zero, of ties, and experts whose last block is not full."""
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(0))
    x[0, :32], x[1, :32], x[2, :32] = 0, 2.0**-101, torch.arange(-16, 16) * 127 / 32
    quantized, scale = quantize_tensor(awkward_weight(64, 160))
    expected = reference.int4_linear(x, pack_int4(quantized), scale)
    found = Int8BlockFakeQuantizer()(x) @ packed_values(awkward_weight(64, 160)).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    weight = awkward_weight(160, 64)
    quantized, scale = quantize_tensor(weight)
    expected = reference.expert_linear(x, pack_int4(quantized), scale)
    torch.testing.assert_close(fake_quantization.expert_linear(x, weight), expected, rtol=1e-5, atol=1e-4)
    # Per token, or not at all, is another grid.
    for other in (Int8FakeQuantizer()(x), x):
        assert (other @ packed_values(weight) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_prepared_model_computes_what_the_operators_compute(tiny_config, input_ids):
    """Sums have another order, so a value at a tie may round to its other neighbour: most logits are equal."""
    model = MobileMoEForCausalLM(tiny_config).eval()
    packed = quantize(copy.deepcopy(model))
    with rounded_as(packed, {"INT8 activations", "INT8 expert activations"}, 4, on_kernels=True):
        expected = packed(input_ids, use_cache=False).logits
    difference = {
        grid: (prepare(copy.deepcopy(model), activations=grid)(input_ids, use_cache=False).logits - expected).abs()
        for grid in GRIDS
    }
    largest = expected.abs().max()
    assert difference["mobilemoe"].median() < 1e-5 * largest
    assert difference["per_token"].median() > 1e-3 * largest
    assert difference["none"].median() > 1e-3 * largest


def test_gradients_of_experts_on_the_grid_of_the_operators(tiny_model):
    """Those of the products with the INT4 values, as if inputs had not been rounded."""
    layer = tiny_model.train().model.layers[0].feed_forward
    prepare(tiny_model)
    experts = layer.experts
    tokens, index, weights = routed_tokens()
    # Two experts get no token.
    index = index % 6
    upstream = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    inputs = tokens.clone().requires_grad_()
    experts(inputs, index, weights).backward(upstream)
    gate_up, down = (packed_values(w.detach()).requires_grad_() for w in (experts.gate_up_proj, experts.down_proj))
    plain = tokens.clone().requires_grad_()
    total = torch.zeros(6, 64)
    for token in range(6):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (plain[token] @ gate_up[expert]).chunk(2)
            total[token] = total[token] + weight * ((F.silu(gate) * up) @ down[expert])
    total.backward(upstream)
    # The gradient of the gate is taken at rounded products.
    for found, expected in ((inputs, plain), (experts.gate_up_proj, gate_up), (experts.down_proj, down)):
        assert (found.grad - expected.grad).norm() < 0.03 * expected.grad.norm()
    assert not experts.gate_up_proj.grad[6:].any() and not experts.down_proj.grad[6:].any()


@pytest.mark.parametrize(
    ("grid", "axis", "message"),
    [
        ("int8", "output", "activation_grid=int8 is no grid of activations. Set one of mobilemoe, per_token, none"),
        ("mobilemoe", "input", "activation_grid=mobilemoe with expert_axis=input: .* Set per_token"),
    ],
)
def test_grids_that_no_program_has_are_refused(tiny_model, grid, axis, message):
    with pytest.raises(ValueError, match=message):
        prepare(tiny_model, Int4Format(axis), grid)


@torch.no_grad()
def test_loss_of_trl_sees_the_rounded_head_and_its_rounded_input(tiny_model, input_ids):
    table, norm = tiny_model.lm_head.weight.clone(), copy.deepcopy(tiny_model.model.norm)
    norm.weight.copy_(norm.weight.bfloat16())
    prepare(tiny_model)
    last_layer_output = []
    tiny_model.model.norm.register_forward_pre_hook(lambda module, args: last_layer_output.append(args[0]))
    add_fused_lm_head(tiny_model)
    loss = tiny_model(input_ids, labels=input_ids, fused_lm_head=True).loss
    hidden_states = Int8BlockFakeQuantizer()(norm(last_layer_output[0]))
    logits = hidden_states @ packed_values(table).T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert torch.equal(tiny_model.lm_head.weight, packed_values(table))
    assert torch.equal(tiny_model.model.embed_tokens(input_ids), packed_values(table)[input_ids])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_all_that_was_used(tiny_model, input_ids, implementation):
    set_implementation(tiny_model, implementation)
    counts = []
    layers = tiny_model.model.layers
    for layer in layers:
        layer.feed_forward.router.register_forward_hook(lambda m, a, o: counts.append(o[2].flatten().bincount()))
    prepare(tiny_model.train())
    # One token per row, or every expert would be routed to.
    tiny_model(input_ids[:, :1], inputs_embeds=None).logits.square().mean().backward()
    for layer, count in zip(layers, counts, strict=True):
        count = F.pad(count, (0, 8 - len(count)))
        assert 0 < (count > 0).sum() < 8
        for parameter in layer.feed_forward.experts.parameters():
            used = parameter.grad.flatten(1).abs().amax(dim=1) > 0
            assert torch.equal(used, count > 0)
    assert {name for name, parameter in tiny_model.named_parameters() if not parameter.grad.any()} == set()
    assert (tiny_model.model.embed_tokens.weight.grad.abs().amax(dim=1) > 0).all()


def test_prepare_and_convert_keep_parameters_names_hooks_and_settings(tiny_model, input_ids):
    """The modules change; an optimizer, a hook and a handle made before `prepare` stay valid."""
    layer = tiny_model.model.layers[0]
    watched = {
        "model.embed_tokens": tiny_model.model.embed_tokens,
        "model.layers.0.self_attn.q_proj": layer.self_attn.q_proj,
        "model.layers.0.feed_forward.router": layer.feed_forward.router,
        "model.layers.0.feed_forward.experts": layer.feed_forward.experts,
        "model.norm": tiny_model.model.norm,
        "lm_head": tiny_model.lm_head,
    }
    calls = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        for name, module in watched.items()
    ]
    layer.feed_forward.experts.train()
    # The flag that expert parallelism sets on an instance.
    layer.feed_forward.experts._is_expert_parallel = True
    parameters, names = dict(tiny_model.named_parameters()), list(tiny_model.state_dict())
    prepare(tiny_model)
    assert list(tiny_model.state_dict()) == names
    found = dict(tiny_model.named_parameters())
    assert list(found) == list(parameters) and all(found[name] is parameters[name] for name in parameters)
    assert next(tiny_model.lm_head.parameters()) is parameters["model.embed_tokens.weight"]
    experts = layer.feed_forward.experts
    assert experts.training and experts._is_expert_parallel and not tiny_model.model.norm.training
    experts._is_expert_parallel = False
    with torch.no_grad():
        tiny_model(input_ids)
        assert calls == list(watched)
        for handle in handles[:-2]:
            handle.remove()
        tiny_model(input_ids)
        assert calls == [*watched, "model.norm", "lm_head"]
        # Of these only the norm stays.
        convert(tiny_model)(input_ids)
    assert calls == [*watched, "model.norm", "lm_head", "model.norm"]


def test_linears_of_torchao_add_two_attributes():
    """`prepare` sets these two and does not call the constructor; one that a later torchao adds fails here."""
    added = vars(FakeQuantizedLinear(64, 64)).keys() - vars(nn.Linear(64, 64, bias=False)).keys()
    assert added == {"weight_fake_quantizer", "activation_fake_quantizer"}


def test_one_step_moves_every_parameter_and_keeps_the_tie(tiny_model):
    prepare(tiny_model.train())
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    input_ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    tiny_model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert [name for name, parameter in tiny_model.named_parameters() if torch.equal(parameter, before[name])] == []
    # The next pass sees the new weights, in the embedding and in the head.
    table = packed_values(tiny_model.model.embed_tokens.weight)
    assert torch.equal(tiny_model.lm_head.weight, table)
    assert torch.equal(tiny_model.model.embed_tokens(input_ids), table[input_ids])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_converted_model_computes_what_training_saw(tiny_model, input_ids, tmp_path, axis, implementation):
    set_implementation(tiny_model, implementation)
    prepare(tiny_model, Int4Format(axis), activations="none")
    with torch.no_grad():
        seen = tiny_model(input_ids).logits
        convert(tiny_model).save_pretrained(tmp_path)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids).logits
    if implementation == "eager":
        assert torch.equal(packed, seen)
    else:
        # The packed experts sum in the eager order; the other kernels differ in the last bits.
        assert (packed - seen).abs().max() <= 1e-6 * seen.abs().max()


@pytest.mark.parametrize("axis", AXES)
def test_convert_yields_the_integers_of_quantize(tiny_model, axis):
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if is_packed(name):
                parameter.copy_(awkward_weight(*parameter.shape))
    reference = quantize(copy.deepcopy(tiny_model), Int4Format(axis))
    prepare(tiny_model, Int4Format(axis))
    for layer, packed in zip(tiny_model.model.layers, reference.model.layers, strict=True):
        # Routing sees the biases that will be stored.
        assert torch.equal(layer.feed_forward.expert_bias, packed.feed_forward.expert_bias)
    converted = convert(tiny_model)
    assert converted.config.quantization == reference.config.quantization == Int4Format(axis).block
    converted, expected = converted.state_dict(), reference.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_converted_model_is_an_ordinary_packed_one(tiny_model, input_ids, tmp_path):
    plain_types = [type(module) for module in dequantize(quantize(copy.deepcopy(tiny_model))).modules()]
    assert [type(module) for module in dequantize(convert(prepare(tiny_model))).modules()] == plain_types


@pytest.mark.parametrize(
    ("implementation", "grid"), [("eager", "mobilemoe"), *((name, "per_token") for name in IMPLEMENTATIONS)]
)
def test_bf16_autocast_trains_fp32_weights(tiny_model, input_ids, implementation, grid):
    set_implementation(tiny_model.train(), implementation)
    with torch.autocast("cpu", torch.bfloat16):
        prepare(tiny_model, activations=grid)
        experts, seen = tiny_model.model.layers[0].feed_forward.experts, []
        hook = experts.weight_fake_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
        loss = tiny_model(input_ids, labels=input_ids).loss
    loss.backward()
    hook.remove()
    # Once per forward pass, however many experts are used.
    assert len(seen) == (0 if grid == "mobilemoe" else 2)
    for weight, parameter in zip(seen, (experts.gate_up_proj, experts.down_proj), strict=False):
        assert torch.equal(weight, packed_values(parameter, dtype=torch.bfloat16))
    reference = copy.deepcopy(tiny_model)
    reference.zero_grad()
    reference(input_ids, labels=input_ids).loss.backward()
    for (name, parameter), expected in zip(tiny_model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), expected.grad.flatten(), dim=0) > 0.98, name


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_compiled_training_equals_eager(tiny_model, input_ids, axis, implementation):
    """`torch_compile` of the recipes, without the code generator; in one graph where the implementation allows it."""
    set_implementation(tiny_model.train(), implementation)
    prepare(tiny_model, Int4Format(axis), "per_token")
    twin = copy.deepcopy(tiny_model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=implementation != "eager")
    losses = [model(input_ids, labels=input_ids).loss for model in (tiny_model, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for (name, expected), parameter in zip(tiny_model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max(), name


def test_gradient_checkpointing_and_accumulation_keep_the_gradients(tiny_model, input_ids):
    prepare(tiny_model.train())
    tiny_model(input_ids, labels=input_ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    for row in input_ids:
        (tiny_model(row[None], labels=row[None]).loss / 2).backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_full_precision_until_the_start_step(tiny_model, input_ids):
    with torch.no_grad():
        for name, buffer in tiny_model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(buffer.bfloat16())
        plain = tiny_model(input_ids).logits
        prepare(tiny_model)
        rounded = tiny_model(input_ids).logits
        start = FakeQuantizationStart(2)
        for step, expected in enumerate((plain, plain, rounded, rounded)):
            start.on_step_begin(None, types.SimpleNamespace(global_step=step), None, model=tiny_model)
            assert torch.equal(tiny_model(input_ids).logits, expected), step
        enable_fake_quantization(tiny_model, False)
        assert torch.equal(tiny_model(input_ids).logits, plain)
    assert not torch.equal(plain, rounded)


def train(model: MobileMoEForCausalLM, directory: Path, max_steps: int, resume: bool = False) -> None:
    rows = torch.randint(3, 512, (16, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        directory,
        max_steps=max_steps,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        resume_from_checkpoint=str(directory / "checkpoint-2") if resume else None,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    training.train(Trainer(model, arguments, train_dataset=dataset, callbacks=[FakeQuantizationStart(1)]))


def test_training_resumes_in_the_middle_from_an_ordinary_checkpoint(tiny_checkpoint, tmp_path):
    model = prepare(load_model(tiny_checkpoint))
    train(model, tmp_path / "whole", 4)
    first = prepare(load_model(tiny_checkpoint))
    train(first, tmp_path / "parts", 2)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "parts/checkpoint-2")
    assert checkpoint.config.quantization is None
    for (name, expected), (plain_name, parameter) in zip(
        first.named_parameters(), checkpoint.named_parameters(), strict=True
    ):
        assert name == plain_name and type(parameter) is nn.Parameter
        assert torch.equal(parameter, expected), name

    resumed = prepare(load_model(tiny_checkpoint))
    train(resumed, tmp_path / "parts", 4, resume=True)
    before = json.loads((tmp_path / "parts/checkpoint-4/trainer_state.json").read_text())
    assert before["global_step"] == 4
    for (name, expected), parameter in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    # The tie survived the loading.
    assert next(resumed.lm_head.parameters()) is resumed.model.embed_tokens.weight


def test_merged_lora_is_accepted_and_adapters_are_refused(tiny_model, input_ids):
    for options in (
        {"target_modules": ["q_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
    ):
        adapted = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=2, init_lora_weights=False, **options))
        with pytest.raises(ValueError, match=r"got a PeftModel.*Merge LoRA.*merge_and_unload"):
            prepare(adapted)
        # The adapters are also in the model itself.
        with pytest.raises(ValueError, match=r"(q_proj|experts).* left out of the INT4 checkpoint. Merge LoRA"):
            prepare(adapted.get_base_model())
        merged = prepare(adapted.merge_and_unload(), activations="none")
        with torch.no_grad():
            seen = merged(input_ids).logits
            torch.testing.assert_close(convert(merged)(input_ids).logits, seen, rtol=1e-5, atol=1e-5)


class OtherLinear(nn.Linear):
    pass


def test_incomplete_models_are_refused(tiny_model, tiny_config):
    other = copy.deepcopy(tiny_model)
    other.model.layers[1].self_attn.k_proj = OtherLinear(64, 32, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj is OtherLinear.*it is Linear"):
        prepare(other)
    extra = copy.deepcopy(tiny_model)
    extra.model.layers[0].self_attn.o_proj.register_parameter("bias", nn.Parameter(torch.zeros(64)))
    with pytest.raises(ValueError, match=r"parameter model\.layers\.0\.self_attn\.o_proj\.bias .* it is missing"):
        prepare(extra)
    added = copy.deepcopy(tiny_model)
    added.value_head = nn.Linear(64, 1)
    with pytest.raises(ValueError, match="module value_head is Linear.*it is missing"):
        prepare(added)
    untied = copy.deepcopy(tiny_model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="lm_head.weight is not the tensor of the embedding"):
        prepare(untied)
    narrow = MobileMoEForCausalLM(MobileMoEConfig(**tiny_config.to_dict() | {"intermediate_size": 16}))
    with pytest.raises(ValueError, match=r"experts\.down_proj has 16 values along the axis of its groups"):
        prepare(narrow, Int4Format("input"))
    # Gate and up together still make one group along the output.
    prepare(narrow)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(narrow)
    with pytest.raises(ValueError, match="not prepared"):
        convert(tiny_model)
    with pytest.raises(ValueError, match="packed INT4 and cannot be trained"):
        prepare(quantize(tiny_model))
    with pytest.raises(ValueError, match="got a Linear"):
        prepare(nn.Linear(32, 32))


@pytest.mark.parametrize("activations", ["per_token", "none"])
def test_table_has_every_parameter(tiny_model, capsys, activations):
    num_values = tiny_model.num_parameters() + 2 * 8
    prepare(tiny_model, Int4Format("input"), activations)
    # The recipe prints the table, not the library.
    assert capsys.readouterr().out == ""
    table = preparation_table(tiny_model)
    rows = [line.split(maxsplit=3) for line in table.splitlines()[1:]]
    assert sum(int(row[2].replace(",", "")) for row in rows) == num_values
    assert sum("INT4" in row[3] for row in rows) == 10
    assert sum("INT8" in row[3] for row in rows) == (10 if activations == "per_token" else 0)
    (router,) = [row for row in rows if row[0].endswith("router.weight")]
    assert "FP32" in router[3]


def test_base_model_has_no_head_to_round_for(tiny_model, input_ids):
    base = prepare(tiny_model.model)
    hidden_states = base(input_ids).last_hidden_state
    assert not torch.equal(Int8BlockFakeQuantizer()(hidden_states), hidden_states)
    assert "head" not in preparation_table(base)


def _two_process_worker(rank: int, checkpoint: Path, store: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = prepare(load_model(checkpoint)).train()
    distributed = nn.parallel.DistributedDataParallel(model)
    input_ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    distributed(input_ids[rank : rank + 1], labels=input_ids[rank : rank + 1]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, store.with_name("gradients.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients(tiny_checkpoint, tmp_path):
    torch.multiprocessing.spawn(_two_process_worker, (tiny_checkpoint, tmp_path / "store"), nprocs=2)
    model = prepare(load_model(tiny_checkpoint)).train()
    input_ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids, labels=input_ids).loss.backward()
    shared = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, shared[name], rtol=1e-4, atol=1e-6)
