"""LoRA: the scope alone trains, counts are PEFT's, adapters merge, save and load, and merged models pack to INT4."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mobilemoe.train.lora import (
    SCOPES,
    add_lora,
    check_adapters,
    lora_config,
    num_adapter_parameters,
    target_shapes,
    trainable_table,
)
from mobilemoe.train.qat import convert, prepare
from mobilemoe.train.routing import ExpertBiasCallback, add_router_z_loss, read_routing
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, dequantize, quantize


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
SHARED = {f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
ROUTED = {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"}
# Written out once more, on purpose.
WEIGHTS = {
    "attention": ATTENTION,
    "dense": ATTENTION | SHARED,
    "experts": SHARED | ROUTED,
    "all": ATTENTION | SHARED | ROUTED,
}


@pytest.fixture(scope="module")
def batch(tiny_config):
    return torch.randint(3, tiny_config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(2))


def randomize_adapters(model):
    """B starts at zero, where a wrong adapter changes nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapters(model):
    """Adapters by the weight they adapt, read off the modules."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name] = module
    return found


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids).logits


def assert_same(actual, expected):
    """To 1e-5 of the largest logit."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_scope_is_covered():
    assert SCOPES.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("scope", WEIGHTS)
def test_only_the_scope_trains_and_all_of_it(tiny_model, scope, batch):
    model = add_lora(tiny_model, scope, rank=8).train()
    expected = {f"model.layers.{layer}.{weight}" for layer in range(2) for weight in WEIGHTS[scope]}
    assert adapters(model).keys() == expected
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Weight decay would move an A that gets no gradient.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    for layer in adapters(model).values():
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if isinstance(layer, ParamWrapper):
            # In A the experts follow each other, in B they alternate.
            assert lora_a.grad.unflatten(0, (layer.num_experts, -1)).abs().amax(dim=(1, 2)).gt(0).all()
            assert lora_b.grad.unflatten(1, (-1, layer.num_experts)).abs().amax(dim=(0, 1)).gt(0).all()


@pytest.mark.parametrize("scope", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_counts_and_ranks_are_those_of_peft(tiny_model, scope, rank, capsys):
    # Four experts per token share the rank.
    expert_rank = {1: 1, 6: 1, 16: 4}[rank]
    expected = num_adapter_parameters(target_shapes(tiny_model, scope), rank, expert_rank)
    model = add_lora(tiny_model, scope, rank=rank, alpha=3 * rank)
    assert model.get_nb_trainable_parameters()[0] == expected
    for name, layer in adapters(model).items():
        assert layer.r["default"] == (expert_rank if "experts." in name else rank), name
        assert layer.scaling["default"] == pytest.approx(3), name
    # The recipe prints the table, not the library.
    assert capsys.readouterr().out == ""
    table = trainable_table(model)
    assert f"trainable: {expected:,} parameters, {expected / 206160:.2%} of the model's 206,160" in table
    lines = table.splitlines()
    assert {line.split()[0].removeprefix("model.layers.*.") for line in lines[1:-1]} == WEIGHTS[scope]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[1:-1]) == expected


def test_adapter_sizes_of_the_s_model():
    """By hand, per rank and layer: 4,608 + 512 in attention, 3 * 2,304 in the shared, 60 * 2,688 in routed experts."""
    with torch.device("meta"):
        model = MobileMoEForCausalLM(MobileMoEConfig())
    sizes = {scope: num_adapter_parameters(target_shapes(model, scope), 16, 4) for scope in SCOPES}
    attention, shared, routed = 20 * 16 * 5120, 20 * 16 * 6912, 20 * 4 * 161280
    assert sizes == {
        "attention": attention,
        "dense": attention + shared,
        "experts": shared + routed,
        "all": attention + shared + routed,
    }
    assert sizes["all"] == 16_752_640


@pytest.mark.parametrize("scope", WEIGHTS)
def test_budget_buys_the_largest_rank(tiny_model, scope):
    size = {rank: num_adapter_parameters(target_shapes(tiny_model, scope), rank, max(1, rank // 4)) for rank in (7, 8)}
    for budget, rank in ((size[8], 8), (size[8] - 1, 7), (size[7] - 1, 6)):
        model = add_lora(copy.deepcopy(tiny_model), scope, budget=budget)
        assert max(layer.r["default"] for layer in adapters(model).values()) == rank
        assert model.get_nb_trainable_parameters()[0] <= budget


def test_budget_ends_at_full_rank(tiny_model):
    # k_proj has 32 rows, the narrowest linear of the experts 64 columns.
    assert lora_config(tiny_model, "attention", budget=10**9).r == 32
    assert lora_config(tiny_model, "experts", budget=10**9).rank_pattern["shared_expert.gate_proj"] == 64


def square_config(config):
    """hidden == intermediate makes down_proj square; in the tiny config gate_up_proj is."""
    return MobileMoEConfig(**config.to_dict() | {"intermediate_size": config.hidden_size})


@pytest.mark.parametrize("experts_implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("shape", ["tiny", "square"])
def test_merged_equals_unmerged(tiny_config, tiny_model, shape, experts_implementation, input_ids):
    if shape == "square":
        torch.manual_seed(0)
        tiny_model = MobileMoEForCausalLM(square_config(tiny_config))
    base = copy.deepcopy(tiny_model)
    tiny_model.set_experts_implementation(experts_implementation)
    model = randomize_adapters(add_lora(tiny_model, "all", rank=16))
    unmerged = logits(model, input_ids)
    assert (unmerged - logits(base, input_ids)).abs().max() > 0.1
    deltas = {}
    for name, layer in adapters(model).items():
        lora_a, lora_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if isinstance(layer, ParamWrapper):
            # Naively, expert by expert: x @ (A^T B^T), A maps from the input side.
            deltas[name] = torch.stack([lora_a[4 * e : 4 * e + 4].T @ lora_b[:, e::8].T for e in range(8)])
        else:
            deltas[f"{name}.weight"] = lora_b @ lora_a
    merged = model.merge_and_unload()
    assert_same(logits(merged, input_ids), unmerged)
    assert type(merged) is MobileMoEForCausalLM
    for name, parameter in base.named_parameters():
        expected = parameter + 2 * deltas[name] if name in deltas else parameter
        torch.testing.assert_close(merged.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", WEIGHTS)
def test_adapter_saves_and_loads_on_a_fresh_base(tiny_checkpoint, scope, input_ids, tmp_path, recwarn):
    model = randomize_adapters(add_lora(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), scope, rank=6))
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), tmp_path)
    assert torch.equal(logits(loaded, input_ids), expected)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), input_ids), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="has no adapter"):
        check_adapters(loaded, scope)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    check_adapters(PeftModel.from_pretrained(base, tmp_path, is_trainable=True), scope)
    # PEFT's word for patterns and targets that matched nothing.
    assert not [str(warning.message) for warning in recwarn if "match" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "router", "rank": 4}, "scope='router' is unknown. Set one of attention, dense, experts, all"),
        ({"scope": "all"}, "Set exactly one of the two"),
        ({"scope": "all", "rank": 4, "budget": 10**5}, "Set exactly one of the two"),
        ({"scope": "all", "rank": 0}, "rank=0 is not between 1 and 32"),
        ({"scope": "attention", "rank": 33}, "rank=33 is not between 1 and 32"),
        ({"scope": "attention", "budget": 895}, "budget=895 .* trains 896 parameters at rank 1"),
    ],
)
def test_bad_requests_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_model, **arguments)
    assert not adapters(tiny_model)


def test_target_that_matches_nothing_is_refused(tiny_model):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    for scope, matched in (("attention", 8), ("experts", 0)):
        with pytest.raises(ValueError, match=f"this llama model has {matched} of them. Load a MobileMoE checkpoint"):
            add_lora(llama, scope, rank=4)
    # A module that was swapped for another kind has no adapter, and nothing would say so.
    tiny_model.model.layers[1].self_attn.v_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="means 4 weights in each of the 2 layers, but this mobilemoe model has 7"):
        add_lora(tiny_model, "attention", rank=4)


def test_check_finds_what_is_missing_and_what_is_too_much(tiny_model, monkeypatch):
    config = lora_config(tiny_model, "all", rank=4)
    config.layers_to_transform = [0]
    config.target_parameters = None
    with monkeypatch.context() as patch:
        patch.setattr("mobilemoe.train.lora.lora_config", lambda *args: config)
        with pytest.raises(ValueError, match="scope='all': .* has no adapter, and 10 more"):
            add_lora(copy.deepcopy(tiny_model), "all", rank=4)
    model = add_lora(tiny_model, "dense", rank=4)
    with pytest.raises(ValueError, match="shared_expert.gate_proj is trainable, and 5 more"):
        check_adapters(model, "attention")
    model.get_submodule("base_model.model.model.layers.1.feed_forward.router").requires_grad_(True)
    with pytest.raises(ValueError, match="model.layers.1.feed_forward.router.weight is trainable, and 0 more"):
        check_adapters(model, "dense")
    assert "model.layers.*.feed_forward.router.weight" in trainable_table(model)


def test_adapters_are_merged_before_quantising(tiny_model):
    model = add_lora(tiny_model, "attention", 32)
    for unmerged in (model, model.base_model.model):
        with pytest.raises(ValueError, match="merge_and_unload"):
            quantize(unmerged)
    assert quantize(model.merge_and_unload()).config.quantization is not None


def test_model_prepared_for_qat_is_refused(tiny_model):
    with pytest.raises(ValueError, match="Train and merge the adapters first"):
        add_lora(prepare(tiny_model), "attention", rank=4)


@pytest.mark.parametrize("scope", ["attention", "dense"])
def test_packed_base_trains_under_adapters(int4_checkpoint, scope, batch, input_ids, tmp_path, recwarn):
    # The exact path, in training and after it.
    def packed_base():
        return AutoModelForCausalLM.from_pretrained(int4_checkpoint, dtype=torch.float32)

    model = add_lora(packed_base(), scope, rank=8).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    expected = logits(model, input_ids)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"load it onto dequantize\(model\), merge there"):
            merge()
    assert torch.equal(logits(model, input_ids), expected)

    model.save_pretrained(tmp_path)
    packed = PeftModel.from_pretrained(packed_base(), tmp_path)
    assert torch.equal(logits(packed, input_ids), expected)
    # What the refusal says to do.
    plain = PeftModel.from_pretrained(dequantize(packed_base()), tmp_path)
    assert_same(logits(plain, input_ids), expected)
    assert_same(logits(plain.merge_and_unload(), input_ids), expected)
    assert not [str(warning.message) for warning in recwarn if "Unsupported layer type" in str(warning.message)]


@pytest.mark.works_with("LoraConfig(target_modules='all-linear')", "peft")
def test_stock_all_linear_is_the_dense_scope(int4_checkpoint, tiny_checkpoint, batch, input_ids):
    """On packed weights as on plain ones, without anything of ours but the model."""
    for checkpoint, dtype in ((int4_checkpoint, torch.float32), (tiny_checkpoint, torch.bfloat16)):
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        expected = {f"model.layers.{layer}.{weight}" for layer in range(2) for weight in WEIGHTS["dense"]}
        assert adapters(model).keys() == expected
        check_adapters(model, "dense")
        before = logits(model, input_ids)
        model(batch, labels=batch).loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in model.named_parameters() if ".lora_" in name}
        assert (logits(randomize_adapters(model), input_ids) - before).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(logits(model, input_ids), before)


@pytest.mark.works_with("LoraConfig() without targets", "peft")
def test_stock_targets_are_those_of_attention(int4_checkpoint, tiny_checkpoint):
    for checkpoint in (int4_checkpoint, tiny_checkpoint):
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        check_adapters(get_peft_model(base, LoraConfig(r=4)), "attention")


@pytest.mark.works_with("LoraConfig(target_parameters=[...]) on routed experts", "peft", weights=["BF16"])
def test_stock_target_parameters_reach_the_experts(tiny_checkpoint, batch, input_ids, tmp_path):
    options = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, **options))
    assert adapters(model).keys() == {f"model.layers.{layer}.{weight}" for layer in range(2) for weight in ROUTED}
    randomize_adapters(model)(batch, labels=batch).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".lora_" in name)
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, input_ids), expected)
    # In FP32: in BF16 the sum of weight and update is rounded once more.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), tmp_path)
    expected = logits(loaded, input_ids)
    assert_same(logits(loaded.merge_and_unload(), input_ids), expected)


def test_packed_gradients_are_those_of_the_expanded_base(int4_checkpoint, batch):
    gradients = []
    for expand in (False, True):
        options = {"experts_implementation": "eager", "dtype": torch.float32}
        base = AutoModelForCausalLM.from_pretrained(int4_checkpoint, **options)
        model = randomize_adapters(add_lora(dequantize(base) if expand else base, "dense", rank=4))
        model(batch, labels=batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["experts", "all"])
def test_packed_experts_are_refused(int4_checkpoint, scope):
    model = AutoModelForCausalLM.from_pretrained(int4_checkpoint)
    with pytest.raises(ValueError, match=rf"scope='{scope}' adapts routed experts.*Set scope='dense', or dequantize"):
        add_lora(model, scope, rank=4)
    add_lora(dequantize(model), scope, rank=4)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_routing_hooks_survive_the_wrapping(tiny_model, batch, wrap_first):
    gradients, callbacks = [], []
    for coefficient in (0.0, 1.0):
        model = copy.deepcopy(tiny_model)
        wrapped = add_lora(model, "attention", rank=4) if wrap_first else model
        add_router_z_loss(wrapped, coefficient)
        callbacks.append(ExpertBiasCallback(wrapped, update_rate=0.0))
        wrapped = randomize_adapters(wrapped if wrap_first else add_lora(model, "attention", rank=4)).train()
        wrapped(batch, labels=batch).loss.backward()
        gradients.append(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad)
    assert not torch.allclose(*gradients)
    for callback in callbacks:
        assert len(callback.layers) == 2
        # 256 tokens, 4 experts each.
        assert callback.totals[:, :8].sum(dim=1).tolist() == [1024, 1024]


@pytest.mark.parametrize("scope", WEIGHTS)
def test_sft_trainer_trains_the_scope(tiny_checkpoint, tokenizer, scope, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"def function_{i}(", "completion": f"value): return value + {i}"} for i in range(16)]
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), scope, rank=8)
    add_router_z_loss(model, 1e-3)
    balancing = ExpertBiasCallback(model, update_rate=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0,
        # TRL's default, and the memory of routed experts needs it.
        activation_checkpointing=True,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[balancing],
    )
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(read_routing(tmp_path)) == 2 and balancing.load.sum() > 0
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


def fine_tune_and_merge(checkpoint, batch, directory):
    model = add_lora(AutoModelForCausalLM.from_pretrained(checkpoint), "all", rank=8).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    expected = logits(model, batch)
    model.merge_and_unload().save_pretrained(directory)
    return expected


def test_road_from_base_to_packed_checkpoint(tiny_checkpoint, batch, input_ids, tmp_path):
    expected = fine_tune_and_merge(tiny_checkpoint, batch, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged, batch), expected)
    plain = quantize(copy.deepcopy(merged)).state_dict()

    prepare(merged).train()
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    merged(batch, labels=batch).loss.backward()
    optimizer.step()
    convert(merged).save_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert packed.config.quantization is not None
    assert packed.state_dict().keys() == plain.keys()
    produced = packed.generate(input_ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(produced, merged.eval().generate(input_ids, max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_merged_adapters_run_on_the_device_runtime(tiny_config, tokenizer, batch, tmp_path):
    from mobilemoe.export.exporter import export_checkpoint
    from mobilemoe.runtime import CheckpointModel, PteModel

    config = copy.deepcopy(tiny_config)
    config.bos_token_id, config.eos_token_id = 496, [497, 504]
    torch.manual_seed(0)
    MobileMoEForCausalLM(config).save_pretrained(tmp_path / "base")
    fine_tune_and_merge(tmp_path / "base", batch, tmp_path / "merged")
    quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "pte", max_seq_len=64)
    pte = PteModel(tmp_path / "pte")
    checkpoint = CheckpointModel(tmp_path / "packed", dtype=torch.float32)
    tokens = pte.encode("def parse(text):\n    return text.split()\n")
    similarity = torch.cosine_similarity(pte.all_logits(tokens), checkpoint.all_logits(tokens), dim=1)
    assert similarity.median() > 0.999
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), torch.tensor([tokens]))[0]
    assert torch.cosine_similarity(pte.all_logits(tokens), base, dim=1).median() < 0.99
    assert pte.decode(list(pte.generate(tokens, 8)))
