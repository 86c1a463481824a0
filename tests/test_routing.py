"""Balancing, z-loss, capacity dispatch and the record of the routing."""

import json
import math
import statistics

import pytest
import torch
from conftest import build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from mobilemoe.train import routing
from mobilemoe.train.qat import prepare
from mobilemoe.train.routing import (
    ExpertBiasCallback,
    add_router_z_loss,
    expert_capacity,
    plot_routing,
    read_routing,
    router_z_loss,
    set_capacity_factor,
)
from modeling_mobilemoe import quantize


@pytest.fixture
def record(tmp_path):
    """Writes what a callback has pending and returns all rows."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def write(callback):
        callback.on_step_end(args, STATE, TrainerControl(should_save=True))
        return read_routing(tmp_path)

    return write


STATE = TrainerState(is_world_process_zero=True)


def test_bias_moves_against_the_load_by_the_update_rate(tiny_model, record):
    tiny_model.train()
    layers = [layer.feed_forward for layer in tiny_model.model.layers]
    before = [layer.expert_bias.clone() for layer in layers]
    callback = ExpertBiasCallback(tiny_model, update_rate=0.01)
    routed: list[list[torch.Tensor]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        layer.router.register_forward_hook(lambda module, args, output, index=index: routed[index].append(output[2]))
    # Two micro-batches belong to one optimizer step.
    for seed in (0, 1):
        tiny_model(torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(seed)))
    callback.on_optimizer_step(None, STATE, None)
    (row,) = record(callback)
    for index, layer in enumerate(layers):
        load = torch.bincount(torch.cat(routed[index]).flatten(), minlength=8).float()
        assert load.sum() == 2 * 2 * 16 * 4
        torch.testing.assert_close(layer.expert_bias - before[index], 0.01 * torch.sign(load.mean() - load))
        assert torch.equal(callback.load[index], load)
        assert row["imbalance"][index] == pytest.approx((load.max() / load.mean()).item(), rel=1e-4)
    assert callback.totals.sum() == 0


def test_evaluation_is_not_counted(tiny_model):
    callback = ExpertBiasCallback(tiny_model.eval())
    tiny_model(torch.arange(8)[None])
    assert callback.totals.sum() == 0


def test_packed_model_is_counted(tiny_model):
    callback = ExpertBiasCallback(quantize(tiny_model).train())
    tiny_model(torch.arange(3, 19)[None])
    assert callback.layers == [layer.feed_forward for layer in tiny_model.model.layers]
    assert callback.totals[:, :8].sum(dim=1).tolist() == [16 * 4] * 2


def test_balancing_evens_a_skewed_router_and_without_it_stays_skewed(tiny_model, record):
    """The load of frozen weights under the rule alone: max over mean below 1.5 with it, unchanged without."""
    input_ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    imbalance = {}
    for rate in (0.0, 0.02):
        for layer in tiny_model.train().model.layers:
            layer.feed_forward.expert_bias.copy_(torch.linspace(-0.5, 0.5, 8))
        callback = ExpertBiasCallback(tiny_model, update_rate=rate)
        with torch.no_grad():
            for _ in range(60):
                tiny_model(input_ids)
                callback.on_optimizer_step(None, STATE, None)
        imbalance[rate] = max(record(callback)[-1]["imbalance"])
    assert imbalance[0.0] > 1.8 > 1.5 > imbalance[0.02]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_z_loss_hook_gives_the_gradients_of_the_explicit_term(tiny_model, gradient_checkpointing):
    input_ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    tiny_model.train()
    output = tiny_model(input_ids, labels=input_ids, output_router_logits=True)
    z_loss = sum(router_z_loss(logits) for logits in output.router_logits)
    (output.loss + 0.01 * z_loss).backward()
    expected = {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    (plain_loss := tiny_model(input_ids, labels=input_ids).loss).backward()
    plain = tiny_model.model.layers[0].feed_forward.router.weight.grad.clone()

    tiny_model.zero_grad()
    if gradient_checkpointing:
        tiny_model.gradient_checkpointing_enable()
    # Two micro-batches of the same data share a step: each counts half.
    add_router_z_loss(tiny_model, 0.01, gradient_accumulation_steps=2)
    for _ in range(2):
        loss = tiny_model(input_ids, labels=input_ids).loss
        assert loss == plain_loss
        (loss / 2).backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(plain, expected["model.layers.0.feed_forward.router.weight"], rtol=1e-3)


def experts_and_batch(model, num_tokens=48):
    generator = torch.Generator().manual_seed(0)
    experts = model.model.layers[0].feed_forward.experts
    hidden_states = torch.randn(num_tokens, 64, generator=generator)
    top_k_index = torch.rand(num_tokens, 8, generator=generator).topk(4).indices
    return experts, hidden_states, top_k_index, torch.rand(num_tokens, 4, generator=generator)


def test_capacity_dispatch_equals_dropless_when_nothing_is_dropped(tiny_model):
    tiny_model.train()
    experts, hidden_states, top_k_index, top_k_weights = experts_and_batch(tiny_model)
    results = []
    # At a factor of E / k one expert could take every token.
    for implementation in ("grouped_mm", 2.0):
        if implementation == 2.0:
            set_capacity_factor(tiny_model, implementation)
        inputs = hidden_states.clone().requires_grad_(), top_k_weights.clone().requires_grad_()
        output = experts(inputs[0], top_k_index, inputs[1])
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, *experts.parameters()])
        results.append([output, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_capacity_dispatch_drops_what_the_factor_says(tiny_model):
    experts, hidden_states, top_k_index, top_k_weights = experts_and_batch(tiny_model)
    # Everybody wants expert 3 first.
    top_k_index = torch.where(top_k_index == 3, top_k_index[:, :1], top_k_index)
    top_k_index[:, 0] = 3
    expected = top_k_weights.clone()
    capacity = expert_capacity(48, 4, 8, 1.25)
    assert capacity == 30
    for expert in range(8):
        token_idx, position = torch.where(top_k_index == expert)
        expected[token_idx[capacity:], position[capacity:]] = 0
    assert (expected[:, 0] == 0).sum() == 48 - 30
    set_capacity_factor(tiny_model.train(), 1.25)
    dropping = experts(hidden_states, top_k_index, top_k_weights)
    # Outside training nothing is dropped.
    tiny_model.eval()
    torch.testing.assert_close(dropping, experts(hidden_states, top_k_index, expected), rtol=1e-4, atol=1e-5)
    tiny_model.set_experts_implementation("eager")
    whole = experts(hidden_states, top_k_index, top_k_weights)
    set_capacity_factor(tiny_model, 1.25)
    torch.testing.assert_close(experts(hidden_states, top_k_index, top_k_weights), whole, rtol=1e-4, atol=1e-5)


def test_capacity_below_one_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"capacity_factor=0\.5 is below 1"):
        set_capacity_factor(tiny_model, 0.5)


class NoWaiting(TorchDispatchMode):
    """Refuses what has a data-dependent shape or reads a value back: a GPU waits for it, a compiled graph breaks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
        assert not waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_capacity_dispatch_has_static_shapes_and_keeps_the_dtype(tiny_model, autocast):
    set_capacity_factor(tiny_model.train(), 1.25)
    experts, hidden_states, top_k_index, top_k_weights = experts_and_batch(tiny_model)
    with NoWaiting(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = experts(hidden_states.requires_grad_(), top_k_index, top_k_weights)
        output.square().sum().backward()
    assert output.dtype == torch.float32


def test_dropped_assignments_have_no_output_and_no_gradient(tiny_model):
    set_capacity_factor(tiny_model.train(), 1.0)
    experts, hidden_states, top_k_index, top_k_weights = experts_and_batch(tiny_model)
    # Everybody has the last expert: of 48 tokens, 24 fit, and no place is left empty.
    top_k_index = torch.where(top_k_index == 7, top_k_index[:, :1], top_k_index)
    top_k_index[:, 0] = 7
    output = experts(hidden_states, top_k_index, top_k_weights.requires_grad_())
    output.square().sum().backward()
    assert (top_k_weights.grad[:24, 0] != 0).all() and (top_k_weights.grad[24:, 0] == 0).all()
    # So their weights do not matter.
    others = top_k_weights.detach().clone()
    others[24:, 0] = 100
    assert torch.equal(experts(hidden_states, top_k_index, others), output)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "capacity"])
@pytest.mark.parametrize("qat", [False, True])
def test_autocast_multiplies_in_bf16_over_fp32_weights(tiny_model, implementation, qat):
    """Every matrix product of training in BF16 except the router's, and FP32 gradients for every weight."""

    class ProductDtypes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.products = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten._grouped_mm):
                self.products.append((func.overloadpacket, args[0].dtype, args[1].dtype, tuple(args[1].shape)))
            return func(*args, **(kwargs or {}))

    model = prepare(tiny_model.train(), activations="per_token") if qat else tiny_model.train()
    if implementation == "capacity":
        set_capacity_factor(model, 1.5)
    else:
        model.set_experts_implementation(implementation)
    add_router_z_loss(model, 1e-3)
    callback = ExpertBiasCallback(model)
    input_ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    with ProductDtypes() as forward, torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids, labels=input_ids, output_router_logits=True)
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    fp32 = [product for product in forward.products if torch.float32 in product[1:3]]
    # The router, `(H, E)` once transposed, in each of two layers.
    assert [product[3] for product in fp32] == [(64, 8)] * 2
    experts_product = torch.ops.aten._grouped_mm if implementation == "grouped_mm" else torch.ops.aten.bmm
    # Up and down, in each of two layers.
    assert sum(product[0] is experts_product for product in forward.products) >= 4
    output.loss.backward()
    callback.on_optimizer_step(None, STATE, None)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


def packed_batch():
    """Two rows of two documents each; positions start anew at the second."""
    input_ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    return input_ids, torch.cat([torch.arange(10), torch.arange(14)])[None].repeat(2, 1)


def training_pass(config, capacity_factor=None, checkpointing=None, compiled=None):
    """Loss, gradients and the record of one forward and backward pass with both hooks."""
    torch.compiler.reset()
    model = build_tiny_model(config).train()
    if capacity_factor is not None:
        set_capacity_factor(model, capacity_factor)
    add_router_z_loss(model, 0.01)
    callback = ExpertBiasCallback(model, capacity_factor=capacity_factor)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if compiled == "layers":
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled == "model" else model
    input_ids, position_ids = packed_batch()
    loss = forward(input_ids, position_ids=position_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, callback.totals


def assert_same_pass(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_a_checkpointed_layer_counts_once(tiny_config, checkpointing):
    expected = training_pass(tiny_config, capacity_factor=1.25)
    # 2 x 24 tokens times 4.
    assert expected[2][:, :8].sum(dim=1).tolist() == [192, 192] and expected[2][:, -1].tolist() == [1, 1]
    assert expected[2][:, 8].min() > 0
    assert_same_pass(training_pass(tiny_config, 1.25, checkpointing), expected)


@pytest.mark.parametrize("capacity_factor", [1.25, pytest.param(None, marks=pytest.mark.slow)])
def test_compiled_training_equals_eager(tiny_config, capacity_factor):
    """One graph with packed documents and both hooks; its second half runs anew inside the backward pass."""
    expected = training_pass(tiny_config, capacity_factor)
    assert_same_pass(training_pass(tiny_config, capacity_factor, "non-reentrant", compiled="model"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_compiled_layers_count_once(tiny_config, checkpointing):
    """Here the checkpoint is outside of what is compiled, so the compiled code itself runs twice."""
    expected = training_pass(tiny_config, 1.25)
    assert_same_pass(training_pass(tiny_config, 1.25, checkpointing, compiled="layers"), expected)


def test_rows_measure_the_routing(tiny_model, record):
    callback = ExpertBiasCallback(tiny_model.train(), capacity_factor=1.0)
    input_ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router_logits = tiny_model(input_ids, output_router_logits=True).router_logits
    callback.on_optimizer_step(None, STATE, None)
    (row,) = record(callback)
    assert row.keys() == {"step", "imbalance", "dropped", "entropy", "z_loss"} and row["step"] == 1
    for index, logits in enumerate(router_logits):
        counts = callback.load[index]
        # 64 tokens times 4 over 8 experts: an even share is 32.
        dropped = (counts - 32).clamp(min=0).sum() / counts.sum()
        assert row["dropped"][index] == pytest.approx(dropped.item(), rel=1e-4)
        assert row["z_loss"][index] == pytest.approx(router_z_loss(logits).item(), rel=1e-4)
        shares = torch.distributions.Categorical(probs=logits.sigmoid())
        assert row["entropy"][index] == pytest.approx(shares.entropy().mean().item(), rel=1e-4)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        input_ids = torch.randint(3, 512, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": input_ids, "labels": input_ids}


class Crash(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(config, output_dir, crash_at=None, **arguments):
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = build_tiny_model(config)
    add_router_z_loss(model, 1e-3, args.gradient_accumulation_steps)
    callbacks = [ExpertBiasCallback(model, capacity_factor=1.0)] + ([] if crash_at is None else [Crash(crash_at)])
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(**arguments)
    return trainer


def test_trainer_writes_one_row_per_step_and_logs_the_last(tiny_config, tmp_path):
    # Left by another run: a fresh start replaces it.
    (tmp_path / "routing.jsonl").write_text('{"step": 1}\n{"step": 99}\n')
    trainer = train(tiny_config, tmp_path)
    rows = read_routing(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, row in zip(logged, rows[1::2], strict=True):
        assert entry["load_imbalance"] == max(row["imbalance"])
        for name, key in (("dropped_tokens", "dropped"), ("router_entropy", "entropy"), ("router_z_loss", "z_loss")):
            assert entry[name] == pytest.approx(statistics.mean(row[key]))
    assert min(row["imbalance"][0] for row in rows) > 1 and min(row["dropped"][0] for row in rows) > 0
    assert all(0 < entropy < math.log(8) for row in rows for entropy in row["entropy"])
    load = json.loads((tmp_path / "expert_load.json").read_text())["load"]
    # The last step: 2 micro-batches of 2 x 16 tokens, times 4.
    assert [sum(layer) for layer in load] == [256, 256]
    assert rows[-1]["imbalance"] == [pytest.approx(max(layer) / 32, rel=1e-4) for layer in load]
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_has_the_rows_of_an_uninterrupted_one(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, tmp_path / "resumed", crash_at=4)
    file = tmp_path / "resumed/routing.jsonl"
    # Step 4 was logged after the checkpoint of step 3, and a line was cut off with the process.
    assert [row["step"] for row in read_routing(file.parent)] == [1, 2, 3, 4]
    with file.open("a") as end:
        end.write('{"step": 5, "imb')
    # Trainer reads nothing but a version from it, with a class that fails on released configurations: training.train.
    (file.parent / "checkpoint-3/config.json").unlink()
    train(tiny_config, tmp_path / "resumed", resume_from_checkpoint=True)
    assert read_routing(file.parent) == read_routing(tmp_path / "whole")


def test_hooks_and_step_never_wait_for_the_device(tiny_model, monkeypatch):
    # Checks the ids on the CPU only.
    monkeypatch.setattr("modeling_mobilemoe.modeling_mobilemoe.check_ids", lambda *args: None)
    # The operator's own function: a dispatch mode does not see into an operator.
    monkeypatch.setattr(routing, "record_routing", routing.record_routing._init_fn)
    set_capacity_factor(tiny_model.train(), 1.25)
    add_router_z_loss(tiny_model, 1e-3)
    callback = ExpertBiasCallback(tiny_model, capacity_factor=1.25)
    with NoWaiting():
        tiny_model(torch.arange(8)[None]).logits.sum().backward()
        callback.on_optimizer_step(None, STATE, None)
    assert callback.load.sum() == 2 * 8 * 4


def test_plot_reads_the_files_alone(tmp_path):
    rows = [
        {"step": step} | {name: [1.0, 2.0] for name in ("imbalance", "dropped", "entropy", "z_loss")}
        for step in (1, 2)
    ]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "expert_load.json").write_text(json.dumps({"load": [[1, 2], [2, 1]]}))
    plot_routing(tmp_path)
    assert (tmp_path / "routing.png").stat().st_size > 10_000
