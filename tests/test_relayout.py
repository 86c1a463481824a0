"""The re-layout and its inverse, and what every exporter to another runtime refuses."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mobilemoe.cli import main
from mobilemoe.export.gguf import export_gguf
from mobilemoe.export.glm4_moe import export_glm4_moe
from mobilemoe.export.mlx import export_mlx
from mobilemoe.export.relayout import Weight, relayout, restore
from mobilemoe.export.source import Shards, Source, plan, weights_of
from modeling_mobilemoe import quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format


needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf: pip install 'mobilemoe[gguf]'")
EXPORTERS = [pytest.param(export_gguf, marks=needs_gguf, id="gguf"), export_mlx, export_glm4_moe]


@pytest.fixture(params=["full precision", "output", "input"])
def weights(request, tiny_model):
    if request.param != "full precision":
        quantize(tiny_model, Int4Format(request.param))
    return dict(weights_of(tiny_model.state_dict(), tiny_model.config)), tiny_model.config


def test_there_and_back(weights):
    ours, config = weights
    theirs = relayout(ours, config)
    back = restore(theirs, config)
    assert back.keys() == ours.keys()
    for name, weight in ours.items():
        assert torch.equal(back[name].values, weight.values), name
        assert back[name].is_int4 == weight.is_int4
        if weight.is_int4:
            assert torch.equal(back[name].scale, weight.scale), name
            assert back[name].group_dim == weight.group_dim
    # Without the moves there would be nothing to undo.
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(theirs[query].values, ours[query].values)


def test_integers_and_scales_move_together(weights):
    ours, config = weights
    theirs = relayout(ours, config)
    plain = relayout({name: Weight(weight.float()) for name, weight in ours.items()}, config)
    assert theirs.keys() == plain.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight.float(), plain[name].values), name


def test_layout(tiny_model):
    """Against the definition, written out for one layer."""
    config = tiny_model.config
    theirs = relayout(dict(weights_of(tiny_model.state_dict(), config)), config)
    layer = tiny_model.model.layers[1]
    width = config.intermediate_size
    for expert in range(config.num_local_experts):
        gate_up, down = layer.feed_forward.experts.gate_up_proj[expert], layer.feed_forward.experts.down_proj[expert]
        for name, expected in (("gate", gate_up[:, :width]), ("up", gate_up[:, width:]), ("down", down)):
            actual = theirs[f"model.layers.1.mlp.experts.{name}_proj.weight"].values[expert]
            assert torch.equal(actual, expected.T)
    rows = layer.self_attn.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
    permuted = torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1).flatten(0, 1)
    assert torch.equal(theirs["model.layers.1.self_attn.k_proj.weight"].values, permuted)
    assert theirs["model.layers.1.self_attn.k_norm.weight"].values.tolist() == [1] * config.head_dim
    assert torch.equal(theirs["model.layers.1.mlp.gate.weight"].values, layer.feed_forward.router.weight)


def test_plan_is_what_is_read(text_checkpoint, tmp_path):
    source = Source(text_checkpoint, tmp_path / "out")
    planned = [(name, weight.values.shape) for name, weight in plan(source.config)]
    assert planned == [(name, weight.values.shape) for name, weight in source.relayouted("test")]


def test_a_group_over_gate_and_up_is_refused(tiny_config):
    config = tiny_config.__class__(**tiny_config.to_dict() | {"intermediate_size": 48})
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    weight = Weight(torch.zeros(8, 64, 96, dtype=torch.int8), torch.ones(8, 64, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="intermediate_size=48 is not divisible by 32"):
        relayout({name: weight}, config)


def test_shards(tmp_path):
    shards = Shards(tmp_path, {"format": "pt"})
    shards.max_bytes = 100
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 200
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def damage(kind, checkpoint, path):
    shutil.copytree(checkpoint, path)
    file = path / "model.safetensors"
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
        return
    tensors = load_file(file)
    if kind == "lacks a tensor":
        del tensors["model.layers.1.self_attn.q_proj.qweight"]
    elif kind == "scale of zero":
        tensors["model.layers.1.self_attn.q_proj.weight_scale"][3] = 0
    elif kind == "not a number":
        tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("export", EXPORTERS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut off", "cannot be read as safetensors"),
        ("lacks a tensor", "lacks tensor layers.1.self_attn.q_proj.qweight"),
        ("scale of zero", "scales that are zero, negative or not finite"),
        ("not a number", "values that are not finite"),
    ],
)
def test_damaged_checkpoints_leave_nothing(export, kind, message, text_checkpoint, tmp_path):
    damage(kind, text_checkpoint, tmp_path / "damaged")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "damaged", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("export", EXPORTERS)
def test_refusals_leave_nothing(export, text_checkpoint, tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.mkdir()
    (program / "model.pte").write_bytes(b"")
    with pytest.raises(ValueError, match="is a program for ExecuTorch"):
        export(program, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        export(text_checkpoint, program)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr("mobilemoe.export.exporter.shutil.disk_usage", lambda _: usage(free=1000))
        with pytest.raises(ValueError, match="0.00 GB free. Free space"):
            export(text_checkpoint, tmp_path / "out")
    full = OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("mobilemoe.artifacts.write_json", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space left"):
            export(text_checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_what_a_killed_export_left_goes_with_the_next(text_checkpoint, tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    remnant = tmp_path / f".out.partial-{dead.stdout.strip()}"
    remnant.mkdir()
    export_mlx(text_checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "mlx", "--weights", "bf16"], "--weights: of another format than --to mlx"),
        (["--to", "gguf", "--kv-cache", "int8"], "--kv-cache: of another format than --to gguf"),
        (["--to", "pte", "--expert-weights", "bf16"], "--expert-weights: of another format than --to pte"),
        (["--to", "glm4_moe", "--weights", "q4_0"], "weights='q4_0' is not written here. Set bf16 or fp32"),
        (["--to", "onnx"], None),
    ],
)
def test_options_of_another_format(options, message, text_checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--model", str(text_checkpoint), "--output", str(tmp_path / "out"), *options])
    if message is None:
        assert "invalid choice: 'onnx'" in capsys.readouterr().err
    else:
        assert message in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


def test_licence_and_ends(text_checkpoint, tmp_path):
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    card = "---\nlicense: other\nlicense_name: fair-noncommercial\n---\n# A model\n"
    (checkpoint / "README.md").write_text(card)
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 503}))
    source = Source(checkpoint, tmp_path / "out")
    assert source.licence == {"license": "other", "license_name": "fair-noncommercial"}
    # The config's, the generation config's, and <|eot|>, which is 504.
    assert source.eos_ids == [497, 503, 504]


def test_alternative_names(text_checkpoint, tmp_path):
    """A base model's names, and the suffix that some exports give experts."""
    checkpoint = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    export_glm4_moe(checkpoint, tmp_path / "out", weights="fp32")
    model = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_runtime_that_computes_another_model_is_an_error(text_checkpoint, tmp_path, monkeypatch):
    from mobilemoe.export import glm4_moe

    original = glm4_moe.glm4_moe_config
    monkeypatch.setattr(
        glm4_moe,
        "glm4_moe_config",
        lambda *args: (config := original(*args), config.update({"use_qk_norm": False}))[0],
    )
    with pytest.raises(ValueError, match="does not compute the model"):
        export_glm4_moe(text_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
