"""The MLX directory: every number in it, and what mlx-lm makes of it where it is installed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mobilemoe.cli import main
from mobilemoe.export.relayout import relayout
from mobilemoe.export.source import weights_of
from mobilemoe.runtime import CheckpointModel


CHECKPOINTS = ["float_text_checkpoint", "text_checkpoint", "qat_checkpoint"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def exported(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("mlx") / "out"
    checkpoint = request.getfixturevalue(request.param)
    main(["export", "--to", "mlx", "--model", str(checkpoint), "--output", str(output)])
    return request.param, checkpoint, output


def affine_values(words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """MLX's own definition: eight numbers in a word, the lowest bits first; `scale * q + bias`."""
    shifts = torch.arange(0, 32, 4)
    q = (words.to(torch.int64)[..., None] >> shifts & 15).flatten(-2).unflatten(-1, (-1, 32))
    return (scales.float()[..., None] * q + biases.float()[..., None]).flatten(-2)


def test_every_number(exported):
    kind, checkpoint, output = exported
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = relayout(dict(weights_of(model.state_dict(), model.config)), model.config)
    stored = load_file(output / "model.safetensors")
    for name, weight in expected.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        values = stored.pop(name)
        if weight.is_int4:
            base = name.removesuffix(".weight")
            values = affine_values(values, stored.pop(f"{base}.scales"), stored.pop(f"{base}.biases"))
            if ".experts." in name and kind == "text_checkpoint":
                # Stored as released, (E, in, out).
                values = values.transpose(-1, -2)
        assert torch.equal(values.float(), weight.float()), name
    assert stored == {}
    report = json.loads((output / "export.json").read_text())
    assert set(report["rounding"].values()) == {"bit-exact"}


def test_config(exported):
    kind, _, output = exported
    config = json.loads((output / "config.json").read_text())
    assert (output / config["model_file"]).is_file()
    assert config["expert_axis"] == ("output" if kind == "text_checkpoint" else "input")
    packed = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config.get("quantization") == (None if kind == "float_text_checkpoint" else packed)
    assert config["eos_token_id"] == [497, 504]
    # transformers reads this file for the tokenizer, and fails over these in a model that it does not know.
    assert not {"auto_map", "rope_scaling", "quantization_config"} & config.keys()
    assert not (output / "__pycache__").exists()


@pytest.fixture
def loaded(exported):
    mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mobilemoe[mlx]'")
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs MLX: pip install 'mobilemoe[mlx]'")
    model, tokenizer = mlx_lm.load(str(exported[2]), trust_remote_code=True)
    # In half precision MLX sums in it on a CPU.
    model.set_dtype(mx.float32)
    return mx, model, tokenizer


def test_mlx_computes_the_model(exported, loaded):
    mx, model, _ = loaded
    tokens = torch.randint(3, 490, (1, 200), generator=torch.Generator().manual_seed(3))
    expected = CheckpointModel(exported[1], dtype=torch.float32).all_logits(tokens[0].tolist())
    actual = torch.tensor(model(mx.array(tokens.tolist()))[0].tolist())
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_mlx_generates_the_same(exported, loaded):
    from mlx_lm import stream_generate

    _, model, tokenizer = loaded
    reference = CheckpointModel(exported[1], dtype=torch.float32)
    prompt = reference.encode("What does it do?", chat=True)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does it do?"}], add_generation_prompt=True, return_dict=False
    ) == prompt  # fmt: skip
    produced = [part.token for part in stream_generate(model, tokenizer, prompt, max_tokens=40)]
    ended = produced and produced[-1] in reference.eos_ids
    assert produced[: len(produced) - ended] == list(reference.generate(prompt, 40))


def test_lora_trains_and_fuses(exported, loaded):
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx, model, _ = loaded
    tokens = mx.array([list(range(3, 23))])
    before = model(tokens)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    for projection in (
        "self_attn.q_proj",
        "mlp.experts.gate_proj",
        "mlp.experts.down_proj",
        "mlp.shared_experts.up_proj",
    ):
        assert f"model.layers.1.{projection}.lora_a" in names
    # An adapter that was not trained changes nothing.
    assert mx.array_equal(model(tokens), before)

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    gradients = dict(tree_flatten(gradients))
    assert gradients.keys() == names
    assert all(mx.abs(gradients[name]).max().item() > 0 for name in names if name.endswith("lora_b"))
    # Against the gradient, far enough to be seen in numbers of 4 bits.
    updates = [(name, tensor - 0.3 * gradients[name]) for name, tensor in tree_flatten(model.trainable_parameters())]
    model.update(tree_unflatten(updates))
    assert loss(model).item() < value.item()
    trained = model(tokens)
    model.update_modules(
        tree_unflatten([(n, m.fuse(dequantize=True)) for n, m in model.named_modules() if "fuse" in dir(m)])
    )
    assert mx.abs(model(tokens) - trained).max().item() < 1e-3 * mx.abs(trained).max().item()
