"""Two processes on the CPU: every parallel plan against one process, and the routing callback over both."""

import copy
import json
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_model
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import TrainerState

from mobilemoe.train.routing import (
    ExpertBiasCallback,
    add_router_z_loss,
    read_routing,
    set_capacity_factor,
    shard_routers,
)
from modeling_mobilemoe import MobileMoEForCausalLM, MobileMoEModel


LAYOUTS = {
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "tp_ep_all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}
INPUT_IDS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def training_pass(model, capacity_factor=None):
    """Loss, whole gradients and routing totals of one pass with the z-loss hook."""
    model.train().zero_grad()
    if capacity_factor is not None:
        set_capacity_factor(model, capacity_factor)
    add_router_z_loss(model, 0.01)
    callback = ExpertBiasCallback(model, capacity_factor=capacity_factor)
    loss = model(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss
    loss.backward()
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    return {"loss": full(loss).detach(), "gradients": gradients, "totals": callback.totals.clone()}


def run_layout(name, tiny, directory):
    def load():
        return MobileMoEForCausalLM.from_pretrained(tiny, distributed_config=DistributedConfig(**LAYOUTS[name]))

    model = load().eval()
    with torch.no_grad():
        result = {"logits": full(model(INPUT_IDS).logits)}
    result["shapes"] = {
        parameter_name: tuple(parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape)
        for parameter_name, parameter in model.named_parameters()
    }
    if name == "pp":
        return result
    result |= training_pass(model)
    if name == "tp":
        result["capacity"] = training_pass(load(), capacity_factor=1.0)
    if name == "tp_ep":
        with pytest.raises(ValueError, match="capacity_factor is set on a model with ep_size > 1"):
            training_pass(load(), capacity_factor=1.0)
    # The gradients as a step, so that what is saved is not what was loaded.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.save_pretrained(directory / name)
    return result


def run_callback(config, output_dir, rank):
    """Two optimizer steps of two micro-batches on each process."""
    model = build_tiny_model(config).train()
    callback = ExpertBiasCallback(model, update_rate=0.01, capacity_factor=1.0)
    args = SimpleNamespace(output_dir=output_dir)
    state = TrainerState(is_world_process_zero=rank == 0)
    callback.on_train_begin(args, state, None)
    for step in range(2):
        with torch.no_grad():
            for micro_batch in range(2):
                model(INPUT_IDS[:, 6 * (2 * micro_batch + rank) :][:, :6])
        callback.on_optimizer_step(args, state, None)
        state.global_step = step + 1
    callback.on_train_end(args, state, None)
    return [layer.expert_bias for layer in callback.layers]


def run_mixed_precision(config, keep_routers):
    """What the routers compute with, their logits and gradients, when FSDP2 gathers the layers in BF16."""
    model = build_tiny_model(config).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    if keep_routers:
        shard_routers(model)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    weights, logits, linears = [], [], []
    for layer in model.model.layers:
        router, linear = layer.feed_forward.router, layer.self_attn.q_proj
        # Before the forward pass, because after it the weights are freed.
        router.register_forward_pre_hook(lambda module, args: weights.append(module.weight.detach().clone()))
        router.register_forward_hook(lambda module, args, output: logits.append(output[0].dtype))
        linear.register_forward_hook(lambda module, args, output: linears.append(output.dtype))
    model(INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
    return {
        "weights": weights,
        "logits": logits,
        "linears": linears,
        "gradients": [full(layer.feed_forward.router.weight.grad) for layer in model.model.layers],
    }


def refused(model_class, checkpoint, **layout):
    try:
        model_class.from_pretrained(checkpoint, distributed_config=DistributedConfig(**layout))
    except ValueError as error:
        return str(error)


def work(rank, directory, config, tiny, int4):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    results = {}
    try:
        for name in LAYOUTS:
            results[name] = run_layout(name, tiny, directory)
        results["callback"] = run_callback(config, directory / "callback", rank)
        for keep_routers in (False, True):
            results["routers", keep_routers] = run_mixed_precision(config, keep_routers)
        results["int4"] = refused(MobileMoEForCausalLM, int4, tp_size=2)
        results["int4 base"] = refused(MobileMoEModel, int4, tp_size=2)
        results["int4 ep"] = refused(MobileMoEForCausalLM, int4, fsdp_size=2, ep_size=2)
    except BaseException:
        # The other process waits for this one in a collective, so an error must end both.
        traceback.print_exc()
        os._exit(1)
    torch.save(results, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tiny_config, tiny_checkpoint, int4_checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("parallel")
    mp.spawn(work, (directory, tiny_config, tiny_checkpoint, int4_checkpoint), nprocs=2)
    return directory


@pytest.fixture(scope="module", params=[0, 1])
def results(request, directory):
    """What one of the two processes computed."""
    return torch.load(directory / f"{request.param}.pt")


@pytest.fixture(scope="module")
def expected(tiny_config):
    """The same in this process alone."""
    model = build_tiny_model(tiny_config)
    with torch.no_grad():
        logits = model(INPUT_IDS).logits
    return {
        "logits": logits,
        **training_pass(model),
        "capacity": training_pass(build_tiny_model(tiny_config), capacity_factor=1.0),
    }


def assert_same_training(actual, expected):
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual["totals"], expected["totals"], rtol=1e-5, atol=0)
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(actual["gradients"][name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_one_process(results, expected, layout):
    torch.testing.assert_close(results[layout]["logits"], expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pp"])
def test_gradients_equal_those_of_one_process(results, expected, layout):
    assert_same_training(results[layout], expected)


def test_drop_and_pad_under_tensor_parallelism(results, expected):
    assert expected["capacity"]["totals"][:, 8].min() > 0
    assert_same_training(results["tp"]["capacity"], expected["capacity"])


def test_weights_are_really_split(results):
    whole = {
        "model.embed_tokens.weight": (512, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.feed_forward.experts.gate_up_proj": (8, 64, 64),
        "model.layers.0.feed_forward.experts.down_proj": (8, 32, 64),
        "model.layers.0.feed_forward.router.weight": (8, 64),
    }
    tensor, expert = results["tp"]["shapes"], results["tp_ep"]["shapes"]
    assert [tensor[name] for name in whole] == [(256, 64), (16, 64), (8, 64, 32), (8, 16, 64), (8, 64)]
    assert [expert[name] for name in whole] == [(256, 64), (16, 64), (4, 64, 64), (4, 32, 64), (8, 64)]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pp"])
def test_sharded_model_saves_an_ordinary_checkpoint(directory, tiny_config, tiny_checkpoint, expected, layout):
    files = {path.name for path in (directory / layout).iterdir()}
    assert files == {path.name for path in tiny_checkpoint.iterdir()}
    config, expected_config = (
        json.loads((path / "config.json").read_text()) for path in (directory / layout, tiny_checkpoint)
    )
    assert config["auto_map"] == expected_config["auto_map"]
    assert config["architectures"] == expected_config["architectures"]
    saved = AutoModelForCausalLM.from_pretrained(directory / layout)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    for name, parameter in build_tiny_model(tiny_config).named_parameters():
        stepped = parameter - 0.1 * expected["gradients"][name]
        torch.testing.assert_close(saved.get_parameter(name), stepped, rtol=0, atol=1e-5, msg=name)
        assert not torch.equal(saved.get_parameter(name), parameter)


def test_routers_stay_in_fp32_under_mixed_precision(results, tiny_config):
    plain = [layer.feed_forward.router.weight for layer in build_tiny_model(tiny_config).model.layers]
    kept, rounded = results["routers", True], results["routers", False]
    assert all(map(torch.equal, kept["weights"], plain)) and set(kept["logits"]) == {torch.float32}
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in kept["gradients"])
    # The other parameters are gathered in BF16, as the routers are without it.
    assert set(kept["linears"]) == {torch.bfloat16}
    assert all(torch.equal(weight, whole.bfloat16()) for weight, whole in zip(rounded["weights"], plain, strict=True))


def test_packed_checkpoint_is_not_sharded(results):
    """Its tensors have other names: hooks without split weights would add up whole results."""
    assert "`tp_size=2` was requested, but `MobileMoEForCausalLM` has no `tp_plan`" in results["int4"]
    assert "`tp_size=2` was requested, but `MobileMoEModel` has no `tp_plan`" in results["int4 base"]
    assert "`ep_size=2` was requested, but `MobileMoEForCausalLM` has no `ep_plan`" in results["int4 ep"]


def test_callback_adds_up_both_processes(directory, tiny_config, tmp_path):
    # All of it in one process: four micro-batches of each step.
    model = build_tiny_model(copy.deepcopy(tiny_config)).train()
    callback = ExpertBiasCallback(model, update_rate=0.01, capacity_factor=1.0)
    args = SimpleNamespace(output_dir=tmp_path)
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for step in range(2):
        with torch.no_grad():
            for part in INPUT_IDS.split(6, dim=1):
                model(part)
        callback.on_optimizer_step(args, state, None)
        state.global_step = step + 1
    callback.on_train_end(args, state, None)

    for rank in (0, 1):
        biases = torch.load(directory / f"{rank}.pt")["callback"]
        assert all(torch.equal(*pair) for pair in zip(biases, [x.expert_bias for x in callback.layers], strict=True))
    # One process writes; all four parts of both steps are in it.
    for actual, row in zip(read_routing(directory / "callback"), read_routing(tmp_path), strict=True):
        assert actual.keys() == row.keys()
        for name in row:
            assert actual[name] == pytest.approx(row[name], rel=1e-4), name
    load = json.loads((directory / "callback/expert_load.json").read_text())["load"]
    assert load == callback.load.tolist() and [sum(layer) for layer in load] == [192, 192]
