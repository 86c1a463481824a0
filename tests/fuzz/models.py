"""Damaged checkpoints, configurations and programs."""

import json
import math
import random
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mobilemoe.integrity import verify_model
from mobilemoe.runtime import PteModel
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM

from .grammar import damage_bytes, damage_json, damage_value, is_finite
from .inputs import SIZES, Inputs, copied, generate_with, logits_of
from .server import Case, WrongResult


def checkpoint_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Bytes of a weight file, its header, its tensors, the index of shards."""
    source = rng.choice((inputs.packed, inputs.full))
    path = copied(source, directory)
    file = rng.choice(sorted(path.glob("*.safetensors")))
    kind = rng.choice(("bytes", "header", "tensor", "index", "gone"))
    # Whether a model that loads all the same has to have the weights of the good one.
    same = kind in ("header", "index", "gone")
    if kind == "bytes":
        content, words = damage_bytes(rng, file.read_bytes())
        file.write_bytes(content)
    elif kind == "header":
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header, words = damage_json(rng, json.loads(content[8 : 8 + size]))
        length = len(header) if rng.random() < 0.8 else rng.choice((0, 2**40, 2**63, len(header) + 8))
        file.write_bytes(struct.pack("<Q", length) + header + content[8 + size :])
        words += f", header of {length} bytes"
    elif kind == "tensor":
        words = damage_tensor(rng, file)
        same = "not a number" not in words
    elif kind == "index" and (index := path / "model.safetensors.index.json").exists():
        content, words = damage_json(rng, json.loads(index.read_text()))
        index.write_bytes(content)
    else:
        file.unlink()
        words = "gone"

    def run() -> None:
        logits = logits_of(path)
        if not logits.isfinite().all():
            raise WrongResult("loads, and its logits are not finite")
        if same and not torch.equal(logits, inputs.logits[source.name]):
            raise WrongResult("loads, and computes something else")

    return Case("checkpoint", f"{source.name}/{file.name}: {kind}, {words}", run)


def damage_tensor(rng: random.Random, file: Path) -> str:
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("not a number", "missing", "transposed", "cut", "dtype", "extra", "renamed"))
    if kind == "not a number":
        if not tensor.is_floating_point():
            return damage_tensor(rng, file)
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((math.nan, math.inf, -math.inf))
    elif kind == "missing":
        del tensors[name]
    elif kind == "transposed":
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]:
            # No one could tell.
            return damage_tensor(rng, file)
        tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor[None]
    elif kind == "cut":
        tensors[name] = tensor[:-1].contiguous()
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice((torch.int32, torch.float64, torch.bool)))
    elif kind == "extra":
        tensors["model.layers.7.input_layernorm.weight"] = torch.ones(64)
    else:
        tensors[f"{name}_"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {kind}"


def config_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """`config.json` and the other JSON files of a checkpoint."""
    path = copied(rng.choice((inputs.packed, inputs.full)), directory)
    names = ["config.json"] * 6 + ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    file = path / rng.choice(names)
    content, words = damage_json(rng, json.loads(file.read_text()))
    file.write_bytes(content)
    return Case("config", f"{file.name}: {words}", generate_with(path))


def config_values(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """A configuration in Python. Numbers that are not finite have no meaning anywhere."""
    # Its name may be anything.
    left_out = ("architectures", "_name_or_path")
    good = {name: value for name, value in MobileMoEConfig(**SIZES).to_dict().items() if name not in left_out}
    changed, words = damage_value(rng, good)

    def run() -> None:
        config = MobileMoEConfig.from_dict(changed)
        if not is_finite(config.to_dict()):
            raise WrongResult("accepted, and is not finite")
        with torch.device("meta"):
            MobileMoEForCausalLM(config)

    return Case("config", f"MobileMoEConfig: {words}", run)


def program_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """`model.pte`: whatever its size, a damaged program that is verified may not run."""
    path = copied(inputs.program, directory)
    whole = (path / "model.pte").read_bytes()
    content, words = damage_bytes(rng, whole)
    (path / "model.pte").write_bytes(content)
    verified = rng.random() < 0.5

    def run() -> None:
        if verified:
            verify_model(path)
        logits = PteModel(path).forward([3, 4, 5], 0)
        if not logits.isfinite().all():
            raise WrongResult("runs, and its logits are not finite")

    return Case("program", f"model.pte{', verified' if verified else ''}: {words}", run, is_wrong=content != whole)


def export_report(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """`export.json` beside a program."""
    path = copied(inputs.program, directory)
    file = path / "export.json"
    content, words = damage_json(rng, json.loads(file.read_text()))
    file.write_bytes(content)
    return Case("results", f"export.json: {words}", generate_with(path))
