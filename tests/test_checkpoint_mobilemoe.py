import copy
import errno
import filecmp
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, modeling_utils

from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, dequantize, quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.quantization_mobilemoe import (
    INT4_BLOCK,
    MobileMoEInt4Config,
    MobileMoEInt4Quantizer,
    quantization_table,
)


Damage = Callable[[Path], None]

# Tensor names that the tables below use often.
LAYER = "model.layers.1."
EXPERTS = f"{LAYER}feed_forward.experts."
Q_PROJ = f"{LAYER}self_attn.q_proj."
UNREADABLE = r"/model\.safetensors cannot be read as safetensors"


def cut(keep: Callable[[int, int], int]) -> Damage:
    """Keeps the first bytes of the file, as many as `keep` says of the lengths of header and data."""

    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        header_length = int.from_bytes(content[:8], "little")
        file.write_bytes(content[: keep(header_length, len(content) - 8 - header_length)])

    return damage


def declare_length(length: int) -> Damage:
    """Overwrites the eight bytes that say how long the header is."""

    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])

    return damage


def edit_header(change: Callable[[str], str]) -> Damage:
    """Rewrites the header as text, with its length, and leaves the data."""

    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        data_start = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:data_start].decode()).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[data_start:])

    return damage


def edit_entry(name: str, **fields: object) -> Damage:
    """Rewrites fields of one tensor's header entry; a function gets the old value."""

    def change(header: str) -> str:
        entries = json.loads(header)
        for field, value in fields.items():
            entries[name][field] = value(entries[name][field]) if callable(value) else value
        return json.dumps(entries)

    return edit_header(change)


def append_garbage(path: Path) -> None:
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"\0" * 8)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def drop(name: str) -> Damage:
    return edit_tensors(lambda tensors: tensors.pop(name))


def add(name: str, tensor: torch.Tensor) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def rename(old: str, new: str) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    return edit_tensors(change)


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def put(name: str, value: float) -> Damage:
    """Writes one number into the middle of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[tensors[name].numel() // 2] = value

    return edit_tensors(change)


def edit_config(change: Callable[[dict], object], file_name: str = "config.json") -> Damage:
    def damage(path: Path) -> None:
        config = json.loads((path / file_name).read_text())
        change(config)
        (path / file_name).write_text(json.dumps(config))

    return damage


def set_config(**values: object) -> Damage:
    return edit_config(lambda config: config.update(values))


def set_depth(num_hidden_layers: int) -> Damage:
    """With the two lists that have an entry per layer."""
    return set_config(
        num_hidden_layers=num_hidden_layers,
        no_rope_layers=[1] * num_hidden_layers,
        layer_types=["full_attention"] * num_hidden_layers,
    )


def set_block(**values: object) -> Damage:
    return edit_config(lambda config: config["quantization"].update(values))


def write(file_name: str, text: str) -> Damage:
    return lambda path: (path / file_name).write_text(text)


def remove(file_name: str) -> Damage:
    return lambda path: (path / file_name).unlink()


def shard(path: Path) -> None:
    """Splits the one file in two, half of the tensors each, with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def sharded(then: Damage) -> Damage:
    def damage(path: Path) -> None:
        shard(path)
        then(path)

    return damage


def edit_index(change: Callable[[dict], object]) -> Damage:
    return sharded(edit_config(change, "model.safetensors.index.json"))


def store_twice(name: str, second_name: str) -> Damage:
    """Puts a tensor of the first shard into the second one too."""

    def damage(path: Path) -> None:
        first, second = sorted(path.glob("model-*.safetensors"))
        stored = load_file(first) | load_file(second)
        again = first if name in load_file(second) else second
        save_file(load_file(again) | {second_name: stored[name].clone()}, again, metadata={"format": "pt"})

    return sharded(damage)


# What was done to a checkpoint, to which one, and what the error must name.
MALFORMED: dict[str, tuple[str, Damage, str]] = {
    # The file itself.
    "cut to 0 bytes": ("fp32", cut(lambda header, data: 0), UNREADABLE),
    "cut to 4 bytes": ("fp32", cut(lambda header, data: 4), UNREADABLE),
    "cut to the length field": ("fp32", cut(lambda header, data: 8), UNREADABLE),
    "cut within the header": ("fp32", cut(lambda header, data: 8 + header // 2), UNREADABLE),
    "cut after the header": ("int4", cut(lambda header, data: 8 + header), UNREADABLE),
    "cut within the data": ("int4", cut(lambda header, data: 8 + header + data // 2), UNREADABLE),
    "cut by one byte": ("int4", cut(lambda header, data: 7 + header + data), UNREADABLE),
    "bytes after the end": ("int4", append_garbage, UNREADABLE),
    "header length 0": ("fp32", declare_length(0), UNREADABLE),
    "header length beyond the file": ("fp32", declare_length(2**24), UNREADABLE),
    "header length -1": ("fp32", declare_length(2**64 - 1), UNREADABLE),
    "header length 2**63": ("fp32", declare_length(2**63), UNREADABLE),
    "header not JSON": ("fp32", edit_header(lambda header: "x" * len(header)), UNREADABLE),
    "header a list": ("fp32", edit_header(lambda header: "[]"), UNREADABLE),
    "header without dtype": ("fp32", edit_header(lambda header: header.replace('"dtype":"F32",', "", 1)), UNREADABLE),
    "header with an unknown dtype": ("int4", edit_entry(f"{Q_PROJ}qweight", dtype="U4"), UNREADABLE),
    "offsets overlap": ("fp32", edit_entry("model.norm.weight", data_offsets=[0, 4 * 64]), UNREADABLE),
    "offsets beyond the file": (
        "fp32",
        edit_entry("model.norm.weight", data_offsets=lambda offsets: [offset + 2**30 for offset in offsets]),
        UNREADABLE,
    ),
    "offsets reversed": (
        "int4",
        edit_entry(f"{Q_PROJ}qweight", data_offsets=lambda offsets: offsets[::-1]),
        UNREADABLE,
    ),
    "offsets negative": ("int4", edit_entry(f"{Q_PROJ}qweight", data_offsets=[-8, 8]), UNREADABLE),
    "offsets of another shape": ("int4", edit_entry(f"{Q_PROJ}qweight", shape=[64, 33]), UNREADABLE),
    "a name twice in the header": (
        "fp32",
        edit_header(lambda header: header.replace("layers.0.input_layernorm", "layers.1.input_layernorm")),
        UNREADABLE,
    ),
    # Names.
    **{
        f"{name} missing": (base, drop(name), re.escape(f"lacks tensor {name.removeprefix('model.')}."))
        for base, name in (
            ("fp32", "model.norm.weight"),
            ("fp32", "model.embed_tokens.weight"),
            ("fp32", f"{LAYER}feed_forward.router.weight"),
            ("fp32", f"{LAYER}feed_forward.expert_bias"),
            ("fp32", f"{EXPERTS}gate_up_proj"),
            ("int4", "model.embed_tokens.qweight"),
            ("int4", "model.embed_tokens.weight_scale"),
            ("int4", f"{Q_PROJ}qweight"),
            ("int4", f"{Q_PROJ}weight_scale"),
            ("int4", f"{EXPERTS}down_qweight"),
            ("int4", f"{EXPERTS}gate_up_scale"),
        )
    },
    "file without tensors": ("fp32", edit_tensors(dict.clear), "lacks tensor embed_tokens.weight and 2"),
    "linear bias": (
        "fp32",
        add(f"{Q_PROJ}bias", torch.zeros(64)),
        r"unknown tensor layers\.1\.self_attn\.q_proj\.bias",
    ),
    "weight of the query norm": (
        "fp32",
        add(f"{LAYER}self_attn.q_norm.weight", torch.ones(16)),
        r"unknown tensor layers\.1\.self_attn\.q_norm",
    ),
    "zero points": (
        "int4",
        add(f"{Q_PROJ}zero_point", torch.zeros(64, 2)),
        r"unknown tensor layers\.1\.self_attn\.q_proj\.zero_point",
    ),
    "plain beside packed": ("int4", add(f"{Q_PROJ}weight", torch.zeros(64, 64)), r"unknown tensor .*q_proj\.weight\."),
    "tensor misnamed": (
        "fp32",
        rename(r"layers\.1\.feed_forward\.router", "layers.1.mlp.gate"),
        "1.feed_forward.router",
    ),
    "scale misnamed": (
        "int4",
        rename(r"1\.self_attn\.q_proj\.weight_scale", "1.self_attn.q_proj.scale"),
        "weight_scale",
    ),
    "prefix misnamed": ("fp32", rename("^model", "transformer"), "lacks tensor embed_tokens.weight and 2"),
    "experts one by one": (
        "fp32",
        rename(r"layers\.1\.feed_forward\.experts\.", "layers.1.feed_forward.experts.0."),
        r"lacks tensor layers\.1\.feed_forward\.experts\.down_proj and 1 more",
    ),
    "both names of an expert tensor": (
        "fp32",
        add(f"{EXPERTS}down_proj.weight", torch.zeros(8, 32, 64)),
        r"model\.safetensors holds .*experts\.down_proj(\.weight)? a second time",
    ),
    # Dtypes.
    "qweight I8": (
        "int4",
        replace(f"{Q_PROJ}qweight", lambda tensor: tensor.view(torch.int8)),
        r"q_proj\.qweight as I8",
    ),
    "expert qweight I32": ("int4", replace(f"{EXPERTS}down_qweight", torch.Tensor.int), "experts.down_qweight as I32"),
    "scale F32": ("int4", replace(f"{Q_PROJ}weight_scale", torch.Tensor.float), r"q_proj\.weight_scale as F32"),
    "scale BF16": ("int4", replace(f"{EXPERTS}down_scale", torch.Tensor.bfloat16), r"experts\.down_scale as BF16"),
    "norm I32": ("int4", replace("model.norm.weight", torch.Tensor.int), r"model\.norm\.weight as I32"),
    "norm F64": ("fp32", replace("model.norm.weight", torch.Tensor.double), r"model\.norm\.weight as F64"),
    "router U8": (
        "fp32",
        replace(f"{LAYER}feed_forward.router.weight", torch.Tensor.byte),
        r"feed_forward\.router\.weight as U8",
    ),
    "expert bias BOOL": (
        "int4",
        replace(f"{LAYER}feed_forward.expert_bias", torch.Tensor.bool),
        r"feed_forward\.expert_bias as BOOL",
    ),
    "experts F8": (
        "fp32",
        replace(f"{EXPERTS}down_proj", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        r"experts\.down_proj as F8_E4M3",
    ),
    # Shapes.
    # Only of `down_proj` and its packed form can one tell: `gate_up_proj` is square in every release.
    "expert transposed": (
        "fp32",
        replace(f"{EXPERTS}down_proj", lambda tensor: tensor.mT),
        r"experts\.down_proj with shape \(8, 64, 32\), config\.json makes it \(8, 32, 64\)",
    ),
    "packed expert transposed": (
        "int4",
        replace(f"{EXPERTS}gate_up_qweight", lambda tensor: tensor.mT),
        r"gate_up_qweight with shape \(8, 32, 64\)",
    ),
    "vocabulary truncated": (
        "fp32",
        replace("model.embed_tokens.weight", lambda tensor: tensor[:500]),
        r"model\.embed_tokens\.weight with shape \(500, 64\), config\.json makes it \(512, 64\)",
    ),
    "packed vocabulary truncated": (
        "int4",
        replace("model.embed_tokens.qweight", lambda tensor: tensor[:500]),
        r"model\.embed_tokens\.qweight with shape \(500, 32\)",
    ),
    "a group of scales missing": (
        "int4",
        replace(f"{Q_PROJ}weight_scale", lambda tensor: tensor[:, :1]),
        r"q_proj\.weight_scale with shape \(64, 1\), config\.json makes it \(64, 2\)",
    ),
    "a row missing": (
        "fp32",
        replace(f"{Q_PROJ}weight", lambda tensor: tensor[1:]),
        r"q_proj\.weight with shape \(63, 64\)",
    ),
    "an expert missing": (
        "int4",
        replace(f"{EXPERTS}down_scale", lambda tensor: tensor[1:]),
        r"experts\.down_scale with shape \(7, 32, 2\)",
    ),
    "norm with a dimension more": (
        "fp32",
        replace("model.norm.weight", lambda tensor: tensor[None]),
        r"norm\.weight with",
    ),
    "expert bias a scalar": (
        "fp32",
        replace(f"{LAYER}feed_forward.expert_bias", lambda tensor: tensor[0]),
        r"expert_bias with shape \(\)",
    ),
    # Scales.
    **{
        f"{value} in {name}": ("int4", put(name, value), f"^{re.escape(name)} holds scales")
        for name, value in (
            ("model.embed_tokens.weight_scale", float("nan")),
            (f"{Q_PROJ}weight_scale", float("nan")),
            (f"{Q_PROJ}weight_scale", float("inf")),
            (f"{Q_PROJ}weight_scale", float("-inf")),
            (f"{EXPERTS}gate_up_scale", -0.01),
            (f"{EXPERTS}down_scale", 0.0),
            (f"{EXPERTS}down_scale", -0.0),
        )
    },
    # The quantization block.
    **{
        f"{key}={value!r}": ("int4", set_block(**{key: value}), re.escape(f"{key}={value!r}"))
        for key, value in (
            ("format", "mobilemoe-int4-g64"),
            ("format", None),
            ("group_size", 64),
            ("embedding_group_size", 128),
            ("qmin", -7),
            ("qmax", 8),
            ("symmetric", False),
            ("packed", False),
            ("packed", "true"),
            ("scale_dtype", "float32"),
            ("linear_group_axis", "out (first dim of [out, in])"),
            ("expert_group_axis", "expert (first dim of [E, in, out])"),
        )
    },
    **{
        f"block without {key}": (
            "int4",
            set_config(quantization={name: INT4_BLOCK[name] for name in INT4_BLOCK if name != key}),
            f"lacks '{key}'",
        )
        for key in INT4_BLOCK
    },
    "block empty": ("int4", set_config(quantization={}), "quantization block of config.json lacks 'format'"),
    "block null": ("int4", set_config(quantization=None), "needs its `quantization` block in config.json"),
    "block of another axis": (
        "int4",
        set_config(quantization=Int4Format("input").block),
        r"experts\.\w+_scale with shape .*config\.json makes it",
    ),
    "block missing": (
        "int4",
        edit_config(lambda config: config.pop("quantization")),
        r"lacks tensor .*needs its `quantization` block in config\.json",
    ),
    "block with plain tensors": ("fp32", set_config(quantization=INT4_BLOCK), r"lacks tensor embed_tokens\.qweight"),
    "another method in the block": (
        "int4",
        set_config(quantization=INT4_BLOCK | {"zero_point": True}),
        r"has the key 'zero_point'",
    ),
    "block no mapping": ("int4", set_config(quantization=4), "wrong type: .*'quantization'"),
    # The other keys of the configuration.
    "number as text": ("fp32", set_config(hidden_size="64"), "wrong type: .*'hidden_size'"),
    "no dtype and a damaged file": (
        "fp32",
        lambda path: (edit_config(lambda config: config.pop("dtype"))(path), cut(lambda h, d: 8 + h // 2)(path)),
        "cannot be read as safetensors",
    ),
    "norm not finite": (
        "int4",
        edit_tensors(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
        r"model\.norm\.weight holds values that are not finite",
    ),
    **{
        f"{value} in {name}": (
            "fp32",
            edit_tensors(lambda tensors, name=name, value=value: tensors[name].view(-1)[-1].fill_(float(value))),
            rf"{name.split('.', 2)[-1]} holds values that are not finite",
        )
        for name in (f"{LAYER}feed_forward.router.weight", f"{EXPERTS}down_proj", "model.embed_tokens.weight")
        for value in ("nan", "inf", "-inf")
    },
    "one expert fewer": ("fp32", set_config(num_local_experts=7), r"feed_forward\.\S+ with shape \(8.* \(7"),
    "one expert more": ("int4", set_config(num_local_experts=9), r"feed_forward\.\S+ with shape \(8.* \(9"),
    "hidden_size smaller": (
        "fp32",
        set_config(hidden_size=32),
        r"embed_tokens\.weight with shape \(512, 64\).*, 32\)",
    ),
    "hidden_size larger": (
        "int4",
        set_config(hidden_size=96),
        r"embed_tokens\.qweight with shape \(512, 32\).*, 48\)",
    ),
    "vocab_size larger": ("int4", set_config(vocab_size=513), r"embed_tokens\.qweight with shape \(512.*\(513"),
    "head_dim larger": ("fp32", set_config(head_dim=32), r"self_attn\.\w_proj\.weight with shape"),
    "intermediate_size larger": ("fp32", set_config(intermediate_size=64), r"experts\.\S+ with shape"),
    "intermediate_size_mlp smaller": ("int4", set_config(intermediate_size_mlp=64), r"shared_expert\.\S+ with shape"),
    "a layer more": ("fp32", set_depth(3), r"lacks tensor layers\.2\.\S+ and 1\d more"),
    "a layer fewer": ("int4", set_depth(1), r"unknown tensor layers\.1\.\S+ and 21 more"),
    "num_hidden_layers alone": ("fp32", set_config(num_hidden_layers=3), "num_hidden_layers=3"),
    "config not JSON": ("fp32", write("config.json", "{"), r"config\.json"),
    "config empty": ("fp32", write("config.json", ""), r"config\.json"),
    "config a list": ("fp32", write("config.json", "[]"), r"config\.json"),
    "config without keys": ("fp32", write("config.json", "{}"), "model_type"),
    "config missing": ("fp32", remove("config.json"), r"config\.json"),
    # Shards.
    "weights missing": ("fp32", remove("model.safetensors"), r"no file named model\.safetensors"),
    "shard missing": (
        "fp32",
        sharded(remove("model-00002-of-00002.safetensors")),
        r"model-00002-of-00002\.safetensors",
    ),
    "shard cut": (
        "int4",
        sharded(lambda path: (path / "model-00002-of-00002.safetensors").write_bytes(b"\0")),
        r"model-00002-of-00002\.safetensors cannot be read",
    ),
    "index not JSON": ("fp32", sharded(write("model.safetensors.index.json", "{")), "index.json is not JSON"),
    "index empty": ("fp32", sharded(write("model.safetensors.index.json", "{}")), "index.json lacks its `weight_map`"),
    "index names another file": (
        "int4",
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "other.safetensors"})),
        r"other\.safetensors",
    ),
    "index names a file outside": (
        "fp32",
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "../other.safetensors"})),
        r"model\.norm\.weight in '\.\./other\.safetensors', and a shard is a file of the checkpoint's own directory",
    ),
    "index names an absolute path": (
        "int4",
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "/tmp/other.safetensors"})),
        "a shard is a file of the checkpoint's own directory",
    ),
    "index names no text": (
        "int4",
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": None})),
        "has model.norm.weight in None",
    ),
    "index without a shard": (
        "fp32",
        edit_index(
            lambda index: index.update(
                weight_map=dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")
            )
        ),
        r"lacks tensor layers\.0\.\S+ and 1\d more",
    ),
    "index names a .bin file": (
        "fp32",
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "pytorch_model.bin"})),
        r"pytorch_model\.bin is not a safetensors file",
    ),
    "tensor in both shards": (
        "int4",
        store_twice("model.norm.weight", "model.norm.weight"),
        r"safetensors holds model\.norm\.weight a second time",
    ),
    "tensor under two names": (
        "fp32",
        store_twice("model.norm.weight", "norm.weight"),
        r"safetensors holds (model\.)?norm\.weight a second time",
    ),
    # The output head, which the embedding is.
    "another head": ("fp32", add("lm_head.weight", torch.ones(512, 64)), r"lm_head\.weight and it differs"),
    "another head of another dtype": ("fp32", add("lm_head.weight", torch.ones(512, 64).half()), r"lm_head\.weight"),
    "head of another shape": ("fp32", add("lm_head.weight", torch.ones(500, 64)), r"lm_head\.weight"),
    "integers as the head": ("fp32", add("lm_head.weight", torch.ones(512, 64).int()), r"lm_head\.weight"),
    "a head beside a packed embedding": ("int4", add("lm_head.weight", torch.ones(512, 64)), r"lm_head\.weight"),
    "bias of the head": ("fp32", add("lm_head.bias", torch.zeros(512)), r"unknown tensor lm_head\.bias"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_checkpoint_is_named(case: str, tiny_checkpoint: Path, int4_checkpoint: Path, tmp_path: Path):
    base, damage, named = MALFORMED[case]
    path = tmp_path / "checkpoint"
    shutil.copytree({"fp32": tiny_checkpoint, "int4": int4_checkpoint}[base], path)
    damage(path)
    with pytest.raises((ValueError, OSError), match=named) as error:
        AutoModelForCausalLM.from_pretrained(path)
    assert len(str(error.value).splitlines()) == 1


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_transformers_still_has_the_private_method_that_the_checks_hook_into():
    expected = ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
    assert list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters) == expected
    assert list(inspect.signature(MobileMoEForCausalLM._load_pretrained_model).parameters) == expected


@torch.no_grad()
def test_adapter_loads_through_transformers(tiny_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs the `train` extra")
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapted.save_pretrained(tmp_path)
    base.load_adapter(tmp_path)
    assert torch.equal(base(input_ids).logits, adapted(input_ids).logits)


@pytest.fixture
def trapped_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a `pytorch_model.bin` beside its safetensors file."""
    path, marker = tmp_path / "checkpoint", tmp_path / "unpickled"
    shutil.copytree(tiny_checkpoint, path)
    torch.save({"model.norm.weight": Trap(marker)}, path / "pytorch_model.bin")
    # The trap works.
    torch.load(path / "pytorch_model.bin", weights_only=False)
    marker.unlink()
    return path


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}], ids=str)
@pytest.mark.parametrize(
    "damage",
    [
        remove("model.safetensors"),
        lambda path: (path / "pytorch_model.bin").replace(path / "model.safetensors"),
        cut(lambda header, data: 8 + header),
        sharded(
            edit_config(
                lambda index: index["weight_map"].update({"model.norm.weight": "pytorch_model.bin"}),
                "model.safetensors.index.json",
            )
        ),
    ],
    ids=["alone", "under the other name", "beside a damaged file", "in the index"],
)
@pytest.mark.parametrize("dtype_in_config", [True, False])
def test_pickle_is_never_read(damage: Damage, options: dict, dtype_in_config: bool, trapped_checkpoint: Path):
    damage(trapped_checkpoint)
    if not dtype_in_config:
        # transformers then looks for the dtype in the weights, before it loads them.
        edit_config(lambda config: config.pop("dtype"))(trapped_checkpoint)
    with pytest.raises((ValueError, OSError), match=r"\.bin|safetensors"):
        AutoModelForCausalLM.from_pretrained(trapped_checkpoint, **options)
    assert not (trapped_checkpoint.parent / "unpickled").exists()


@torch.no_grad()
def test_pickle_beside_safetensors_is_not_read(
    trapped_checkpoint: Path, tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor
):
    model = AutoModelForCausalLM.from_pretrained(trapped_checkpoint)
    assert torch.equal(model(input_ids).logits, tiny_model(input_ids).logits)
    assert not (trapped_checkpoint.parent / "unpickled").exists()
    with pytest.raises(ValueError, match="use_safetensors=False asks for a pickle"):
        AutoModelForCausalLM.from_pretrained(trapped_checkpoint, use_safetensors=False)
    assert not (trapped_checkpoint.parent / "unpickled").exists()


def test_mismatched_sizes_are_never_ignored(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True would put random numbers"):
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint, vocab_size=520, ignore_mismatched_sizes=True)


def in_every_layer(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change_all(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: change(tensor) for name, tensor in tensors.items() if name.endswith(suffix)})

    return edit_tensors(change_all)


# Other ways to store the same numbers.
EQUIVALENT: dict[str, tuple[str, Damage]] = {
    "expert bias F32": ("int4", in_every_layer("expert_bias", torch.Tensor.float)),
    "tied head stored": (
        "fp32",
        edit_tensors(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})),
    ),
    "experts as modules": ("fp32", rename(r"(experts\.(gate_up|down)_proj)$", r"\1.weight")),
    "experts as modules in shards": (
        "fp32",
        lambda path: (rename(r"(experts\.(gate_up|down)_proj)$", r"\1.weight")(path), shard(path)),
    ),
    "shards": ("fp32", shard),
    "packed shards": ("int4", shard),
    "base model": ("fp32", rename(r"^model\.", "")),
    "packed base model": ("int4", rename(r"^model\.", "")),
    "without metadata": ("int4", edit_header(lambda header: header.replace('"__metadata__":{"format":"pt"},', ""))),
    "padded header": ("int4", edit_header(lambda header: header + 200 * " ")),
}


@torch.no_grad()
@pytest.mark.parametrize("case", EQUIVALENT)
def test_other_ways_to_store_the_same_load_equal(
    case: str, tiny_checkpoint: Path, int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path
):
    base, change = EQUIVALENT[case]
    original = {"fp32": tiny_checkpoint, "int4": int4_checkpoint}[base]
    path = shutil.copytree(original, tmp_path / "changed")
    change(path)
    model, loading_info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert loading_info["missing_keys"] == set()
    expected = AutoModelForCausalLM.from_pretrained(original)
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)
    # Saving brings back the usual file, byte for byte.
    model.save_pretrained(tmp_path / "saved")
    assert filecmp.cmp(tmp_path / "saved" / "model.safetensors", original / "model.safetensors", shallow=False)


@torch.no_grad()
@pytest.mark.parametrize("base", ["fp32", "int4"])
def test_router_may_be_bf16(
    base: str, tiny_checkpoint: Path, int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path
):
    original = {"fp32": tiny_checkpoint, "int4": int4_checkpoint}[base]
    path = shutil.copytree(original, tmp_path / "checkpoint")
    in_every_layer("router.weight", torch.Tensor.bfloat16)(path)
    model, expected = (AutoModelForCausalLM.from_pretrained(folder) for folder in (path, original))
    unrounded = expected(input_ids).logits
    for layer in expected.model.layers:
        layer.feed_forward.router.weight.copy_(layer.feed_forward.router.weight.bfloat16())
    assert model.model.layers[0].feed_forward.router.weight.dtype == torch.float32
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)
    assert not torch.equal(model(input_ids).logits, unrounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_bias_in_f32_is_not_rounded(int4_checkpoint: Path, tmp_path: Path, dtype: torch.dtype):
    path = shutil.copytree(int4_checkpoint, tmp_path / "checkpoint")
    in_every_layer("expert_bias", lambda bias: bias.float() + 1e-5)(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for name, bias in load_file(path / "model.safetensors").items():
        if name.endswith("expert_bias"):
            assert not torch.equal(bias, bias.bfloat16().float())
            assert torch.equal(model.state_dict()[name], bias), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype_is_the_loaded_one(
    dtype: torch.dtype, tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, tmp_path: Path
):
    tiny_model.to(dtype).save_pretrained(tmp_path)
    # transformers writes `dtype`, the releases have `torch_dtype`.
    edit_config(lambda config: config.update(torch_dtype=config.pop("dtype")))(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        fixed = name.endswith(("router.weight", "expert_bias"))
        assert tensor.dtype == (torch.float32 if fixed else dtype), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    assert model.model.layers[0].feed_forward.router.weight.dtype == torch.float32
    assert torch.equal(model(input_ids).logits, tiny_model(input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("base", ["fp32", "int4"])
def test_saved_base_model_gets_its_head_back(
    base: str, tiny_checkpoint: Path, int4_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path
):
    original = {"fp32": tiny_checkpoint, "int4": int4_checkpoint}[base]
    AutoModel.from_pretrained(original).save_pretrained(tmp_path)
    model, loading_info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loading_info["missing_keys"] == set()
    expected = AutoModelForCausalLM.from_pretrained(original)
    assert torch.equal(model(input_ids).logits, expected(input_ids).logits)


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


def fail_in_second_shard(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    calls = []

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise error

    monkeypatch.setattr(modeling_utils, "safe_save_file", save)


def fail_in_config(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def save(config: MobileMoEConfig, path: Path) -> None:
        (Path(path) / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(MobileMoEConfig, "save_pretrained", save)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fail", [fail_in_second_shard, fail_in_config])
@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_leaves_everything_as_it_was(
    existing: bool,
    fail: Callable[[pytest.MonkeyPatch, BaseException], None],
    error: BaseException,
    tiny_checkpoint: Path,
    tiny_model: MobileMoEForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    path = tmp_path / "checkpoint"
    if existing:
        shutil.copytree(tiny_checkpoint, path)
        (path / "tokenizer.json").write_text("{}")
    before = contents(tmp_path)
    fail(monkeypatch, error)
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
    with pytest.raises(type(error)):
        tiny_model.save_pretrained(path, max_shard_size="50KB")
    assert contents(tmp_path) == before


def test_full_disk_leaves_everything_as_it_was(
    tiny_checkpoint: Path, tiny_model: MobileMoEForCausalLM, tmp_path: Path
):
    resource = pytest.importorskip("resource", reason="file size limits are those of Unix")
    path = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            tiny_model.save_pretrained(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_killed_save_does_not_block_the_next(
    tiny_checkpoint: Path, tiny_model: MobileMoEForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    expected = contents(tmp_path)
    with monkeypatch.context() as patch:
        # A killed process cleans nothing up.
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        fail_in_second_shard(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tiny_model.save_pretrained(path, max_shard_size="50KB")
    assert contents(tmp_path) != expected
    tiny_model.save_pretrained(path)
    assert contents(tmp_path) == expected


def test_saving_removes_the_weights_of_the_save_before(
    tiny_model: MobileMoEForCausalLM, input_ids: torch.Tensor, tmp_path: Path
):
    for max_shard_size in ("50KB", "200KB", "50GB", "50KB"):
        tiny_model.save_pretrained(tmp_path / "over", max_shard_size=max_shard_size)
        tiny_model.save_pretrained(tmp_path / max_shard_size, max_shard_size=max_shard_size)
        assert contents(tmp_path / "over") == contents(tmp_path / max_shard_size)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "over")
        with torch.no_grad():
            assert torch.equal(model(input_ids).logits, tiny_model(input_ids).logits)
    counts = [len(list((tmp_path / size).glob("model-*.safetensors"))) for size in ("50KB", "200KB", "50GB")]
    assert counts[0] > counts[1] > counts[2] == 0


def test_saving_keeps_unrelated_files(tiny_model: MobileMoEForCausalLM, tmp_path: Path):
    unrelated = ["tokenizer.json", "README.md", "optimizer.pt", "logs/run.txt", "adapter_model.safetensors"]
    # A variant is another model, and transformers reads it only when asked to.
    unrelated += ["model.fp16.safetensors", "model.fp16.safetensors.index.json", "model-before-sft.safetensors"]
    for name in unrelated:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for max_shard_size in ("50KB", "50GB"):
        tiny_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert {name: (tmp_path / name).read_text() for name in unrelated} == {name: name for name in unrelated}
    tiny_model.save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "model.safetensors").is_file()
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "model.bf16.safetensors", shallow=False)


def test_saving_through_a_link_to_another_file_system(
    tiny_checkpoint: Path, tiny_model: MobileMoEForCausalLM, tmp_path: Path
):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is not another file system here")
    with tempfile.TemporaryDirectory(dir=memory) as target:
        (tmp_path / "checkpoint").symlink_to(target)
        tiny_model.save_pretrained(tmp_path / "checkpoint")
        assert contents(Path(target)) == contents(tiny_checkpoint)
    assert (tmp_path / "checkpoint").is_symlink()


# The dimensions that differ between the sizes, and what their INT4 releases measure: tensors, bytes of data, of the
# file. S is the published size of facebook/MobileMoE-S-QAT (integrallis/models, MobileMoE RAG benchmark README);
# M and L are predictions by the arithmetic that gives S exactly, published are "1.6 GB" and "3.0 GB".
RELEASES = {
    "S": ({}, 443, 713_863_008, 713_916_240),
    "M": (
        {
            "hidden_size": 1024,
            "intermediate_size": 512,
            "intermediate_size_mlp": 2048,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
        },
        575,
        1_590_916_144,
        1_590_986_088,
    ),
    "L": (
        {
            "hidden_size": 1280,
            "intermediate_size": 640,
            "intermediate_size_mlp": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
        },
        707,
        3_004_279_040,
        3_004_365_448,
    ),
}
# Of S: 53,223 bytes of JSON and one of padding.
S_HEADER_BYTES = 53_224
# As safetensors orders them in a file.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def packed_skeleton(config: MobileMoEConfig) -> MobileMoEForCausalLM:
    """A packed model on the meta device: all shapes and dtypes, no numbers."""
    config = MobileMoEConfig(**config.to_dict() | {"quantization": dict(INT4_BLOCK)})
    with torch.device("meta"):
        model = MobileMoEForCausalLM(config)
        config.quantization_config = MobileMoEInt4Config(**INT4_BLOCK)
        model.hf_quantizer = MobileMoEInt4Quantizer(config.quantization_config)
        model.hf_quantizer._process_model_before_weight_loading(model)
    return model


def serialized_header(state_dict: dict[str, torch.Tensor]) -> bytes:
    """The header as safetensors writes it: by dtype, then by name, compact JSON, padded to 8 bytes."""
    dtypes, end = list(DTYPE_NAMES), 0
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for name in sorted(state_dict, key=lambda name: (dtypes.index(state_dict[name].dtype), name)):
        tensor = state_dict[name]
        start, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header.ljust(-(-len(header) // 8) * 8)


def stored_header(path: Path) -> bytes:
    with open(path / "model.safetensors", "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_header_arithmetic_equals_the_file(tiny_config: MobileMoEConfig, int4_checkpoint: Path):
    model = packed_skeleton(tiny_config)
    state_dict, metadata = model.hf_quantizer.get_state_dict_and_metadata(model)
    assert metadata == {}
    header = serialized_header(state_dict)
    assert header == stored_header(int4_checkpoint)
    data_bytes = sum(tensor.nbytes for tensor in state_dict.values())
    assert 8 + len(header) + data_bytes == (int4_checkpoint / "model.safetensors").stat().st_size


@pytest.mark.parametrize("size", RELEASES)
def test_released_sizes(size: str):
    overrides, num_tensors, data_bytes, file_bytes = RELEASES[size]
    model = packed_skeleton(MobileMoEConfig(**overrides))
    state_dict, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    assert len(state_dict) == num_tensors
    assert sum(tensor.nbytes for tensor in state_dict.values()) == data_bytes
    header = serialized_header(state_dict)
    assert 8 + len(header) + data_bytes == file_bytes
    if size == "S":
        assert len(header) == S_HEADER_BYTES
        assert len(header.rstrip()) == S_HEADER_BYTES - 1


@pytest.mark.slow
def test_saved_s_model_is_the_released_file(tmp_path: Path):
    _, num_tensors, data_bytes, file_bytes = RELEASES["S"]
    model = packed_skeleton(MobileMoEConfig()).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.uniform_(0.5, 1.5)
    # Not in `tmp_path` itself, which pytest keeps.
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        model.save_pretrained(first)
        header = stored_header(first)
        assert len(header) == S_HEADER_BYTES
        assert (first / "model.safetensors").stat().st_size == file_bytes
        tensors = json.loads(header)
        assert tensors.pop("__metadata__") == {"format": "pt"}
        assert len(tensors) == num_tensors
        assert max(entry["data_offsets"][1] for entry in tensors.values()) == data_bytes
        assert {name: (entry["dtype"], entry["shape"]) for name, entry in tensors.items()} == released_tensors()
        config = json.loads((first / "config.json").read_text())
        assert config["quantization"] == INT4_BLOCK
        assert "quantization_config" not in config
        assert json.loads((first / "generation_config.json").read_text())["eos_token_id"] == [128001, 128008]
        AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
        assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
        for file in first.iterdir():
            assert filecmp.cmp(file, second / file.name, shallow=False), file.name


def released_tensors() -> dict[str, tuple[str, list[int]]]:
    """The tensors of MobileMoE-S-QAT in numbers (its table in the loader of integrallis/models)."""
    tensors = {
        "model.embed_tokens.qweight": ("U8", [128256, 384]),
        "model.embed_tokens.weight_scale": ("F16", [128256, 24]),
        "model.norm.weight": ("BF16", [768]),
    }
    for layer in range(20):
        for name, dtype, shape in (
            ("input_layernorm.weight", "BF16", [768]),
            ("post_attention_layernorm.weight", "BF16", [768]),
            ("self_attn.q_proj.qweight", "U8", [768, 384]),
            ("self_attn.q_proj.weight_scale", "F16", [768, 24]),
            ("self_attn.k_proj.qweight", "U8", [256, 384]),
            ("self_attn.k_proj.weight_scale", "F16", [256, 24]),
            ("self_attn.v_proj.qweight", "U8", [256, 384]),
            ("self_attn.v_proj.weight_scale", "F16", [256, 24]),
            ("self_attn.o_proj.qweight", "U8", [768, 384]),
            ("self_attn.o_proj.weight_scale", "F16", [768, 24]),
            ("feed_forward.router.weight", "F32", [60, 768]),
            ("feed_forward.expert_bias", "BF16", [60]),
            ("feed_forward.experts.gate_up_qweight", "U8", [60, 768, 384]),
            ("feed_forward.experts.gate_up_scale", "F16", [60, 768, 24]),
            ("feed_forward.experts.down_qweight", "U8", [60, 384, 384]),
            ("feed_forward.experts.down_scale", "F16", [60, 384, 24]),
            ("feed_forward.shared_expert.gate_proj.qweight", "U8", [1536, 384]),
            ("feed_forward.shared_expert.gate_proj.weight_scale", "F16", [1536, 24]),
            ("feed_forward.shared_expert.up_proj.qweight", "U8", [1536, 384]),
            ("feed_forward.shared_expert.up_proj.weight_scale", "F16", [1536, 24]),
            ("feed_forward.shared_expert.down_proj.qweight", "U8", [768, 768]),
            ("feed_forward.shared_expert.down_proj.weight_scale", "F16", [768, 48]),
        ):
            tensors[f"model.layers.{layer}.{name}"] = (dtype, shape)
    return tensors


@torch.no_grad()
def test_quantized_and_dequantized_is_a_plain_bf16_checkpoint(
    tiny_checkpoint: Path, input_ids: torch.Tensor, tmp_path: Path
):
    model = quantize(AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16))
    dequantize(model)
    model.save_pretrained(tmp_path)
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(tiny_checkpoint / "model.safetensors")
    assert stored.keys() == original.keys()
    for name, tensor in stored.items():
        kept = name.endswith(("router.weight", "expert_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert tensor.shape == original[name].shape, name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_table_of_quantize_counts_what_the_file_holds(
    tiny_model: MobileMoEForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    num_parameters = tiny_model.config.num_total_parameters
    with caplog.at_level("INFO", "modeling_mobilemoe.quantization_mobilemoe"):
        quantize(tiny_model).save_pretrained(tmp_path)
    table = quantization_table(tiny_model)
    assert caplog.messages == [f"Quantised to INT4:\n{table}"]
    assert capsys.readouterr().out == ""
    _, *rows, total = table.splitlines()
    printed = {}
    for row in (*rows, total):
        kind, *numbers, _ = re.split(r"\s{2,}", f"{row}  ", maxsplit=4)
        printed[kind] = [int(number.replace(",", "")) for number in numbers]
    expected: dict[str, list[int]] = {}
    entries = json.loads(stored_header(tmp_path))
    del entries["__metadata__"]
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        kind = expected.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0, 0])
        kind[:] = kind[0] + 1, kind[1] + end - start
    data_bytes = (tmp_path / "model.safetensors").stat().st_size - 8 - len(stored_header(tmp_path))
    assert printed.pop("total") == [len(entries), num_parameters, data_bytes]
    assert {kind: [count, num_bytes] for kind, (count, _, num_bytes) in printed.items()} == expected


@pytest.mark.parametrize(
    ("config_ends", "generation_ends", "ends"),
    [
        (1, 1, [1]),
        (1, 5, [1, 5]),
        (1, [5, 6], [1, 5, 6]),
        ([1, 2], 5, [1, 2, 5]),
        ([1, 5], [5, 2], [1, 2, 5]),
        (None, 5, [5]),
        (1, None, [1]),
        (0, None, [0]),
        (None, None, None),
    ],
    ids=str,
)
def test_generation_ends_at_every_stored_end(
    config_ends: int | list[int] | None,
    generation_ends: int | list[int] | None,
    ends: list[int] | None,
    int4_checkpoint: Path,
    tmp_path: Path,
):
    path = shutil.copytree(int4_checkpoint, tmp_path / "checkpoint")
    set_config(eos_token_id=config_ends)(path)
    edit_config(lambda config: config.update(eos_token_id=generation_ends), "generation_config.json")(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.generation_config.eos_token_id == ends
    # The next reader finds them where it looks first.
    model.save_pretrained(path)
    assert json.loads((path / "generation_config.json").read_text()).get("eos_token_id") == ends


def test_generation_ends_without_a_generation_config(int4_checkpoint: Path, tmp_path: Path):
    path = shutil.copytree(int4_checkpoint, tmp_path / "checkpoint")
    (path / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id == [1]


def test_released_vocabulary_ends_at_the_end_of_a_turn(tiny_config: MobileMoEConfig, tmp_path: Path):
    overrides = {"vocab_size": 128256, "hidden_size": 8, "eos_token_id": 128001}
    MobileMoEForCausalLM(MobileMoEConfig(**tiny_config.to_dict() | overrides)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    # <|end_of_text|> and <|eot|>.
    assert model.generation_config.eos_token_id == [128001, 128008]
