"""
Ends a writer before each of its file operations, and says what a reader finds then.

    LD_PRELOAD=crash_points.so python crash_worker.py SCENARIO DIRECTORY

Run by test_crash_consistency.py, with crash_points.cpp preloaded. Prints one JSON line: the number of operations, and
each state that is neither the old nor the new one, or that the next run of the writer does not end as an undisturbed
one.
"""

import argparse
import copy
import ctypes
import hashlib
import importlib
import inspect
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import build_tiny_model
from toy_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM

from mobilemoe.artifacts import Export, RuntimeExport, local_checkpoint, write_json
from modeling_mobilemoe import MobileMoEConfig, quantize
from modeling_mobilemoe import saving_mobilemoe as saving


ROOT = Path(__file__).parents[1]
KILLED = 137
SHARDS = {"max_shard_size": "100KB"}
shim = ctypes.CDLL(None)


def in_child(function: Callable[[], Any], root: Path, last: int = 0) -> tuple[int, Any]:
    """Exit status and result of a function in a process that ends before its operation number `last`, if not 0."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.close(reader)
            shim.crash_at(os.fsencode(root), ctypes.c_long(last))
            result = function()
            answer = {"result": result, "count": shim.crash_count()}
            with open(writer, "w") as file:
                json.dump(answer, file)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(text) if text else None


def model_of(seed: int, packed: bool = False):
    config = MobileMoEConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=seed,
    )
    model = build_tiny_model(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(seed)
    model.generation_config.eos_token_id = [seed]
    return quantize(model) if packed else model


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read_model(path: Path) -> str:
    """What loads from there: weights, configuration and generation configuration."""
    if not (path / "config.json").exists():
        return "no model"
    model = AutoModelForCausalLM.from_pretrained(path)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_weights")}
    generation = model.generation_config.to_dict() | {"_from_model_config": None}
    tensors = [
        name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in sorted(model.state_dict().items())
    ]
    other = [file.read_bytes() for file in sorted(path.iterdir()) if file.name in ("README.md", "tokenizer.json")]
    return digest(*tensors, *other, json.dumps([config, generation], default=str, sort_keys=True).encode())


def read_files(path: Path) -> str:
    """All visible files below it, or of it, bit for bit; times and memory in an export report do not count."""
    if path.is_file():
        return digest(path.read_bytes())
    parts = []
    for file in sorted(path.rglob("*")):
        if saving.MARK in str(file.relative_to(path)):
            continue
        if file.name == "export.json":
            report = json.loads(file.read_text())
            kind = RuntimeExport if "to" in report else Export
            kind.load(file)
            report = {k: v for k, v in report.items() if k not in ("seconds", "peak_memory_bytes")}
            parts.append(json.dumps(report).encode())
        elif file.is_file():
            parts.append(f"{file.relative_to(path)}".encode() + file.read_bytes())
    return digest(*parts) if parts else "nothing"


def leftovers(parent: Path) -> list[str]:
    return [str(path) for path in parent.rglob("*") if saving.MARK in path.name]


class Scenario:
    """
    Args:
        prepare (`Callable`): makes the old state of a path.
        write (`Callable`): the writer.
        read (`Callable`): what a reader finds there; equal states have equal results.
    """

    def __init__(self, prepare: Callable[[Path], Any], write: Callable[[Path], Any], read: Callable[[Path], str]):
        self.prepare, self.write, self.read = prepare, write, read

    def run(self, root: Path) -> dict:
        old = root / "old"
        old.mkdir()
        self.prepare(old / "out")
        work, path = root / "work", root / "work/out"

        def begin() -> None:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(old, work)

        def look() -> str:
            return self.read(path)

        def write() -> None:
            self.write(path)

        def end_save() -> None:
            if path.is_dir():
                local_checkpoint(path)

        begin()
        states = [in_child(look, work)[1]["result"]]
        status, answer = in_child(write, work)
        assert status == 0, "the writer fails"
        count = answer["count"]
        states.append(in_child(look, work)[1]["result"])
        complete = read_files(path)
        assert states[0] != states[1] and not leftovers(work)
        problems, found = [], []
        for last in range(1, count + 1):
            begin()
            status, _ = in_child(write, work, last)
            status_of_look, answer = in_child(look, work)
            state = states.index(answer["result"]) if answer and answer["result"] in states else None
            # Once the new state is there, it stays.
            if status != KILLED or status_of_look or state is None or (state == 0 and 1 in found):
                problems.append(f"operation {last} of {count}: exit {status}, {answer}")
                continue
            found.append(state)
            # A reader that knows files and no `transformers_weights` finds the same once the save was ended.
            ended, _ = in_child(end_save, work)
            if ended or (state == 1 and read_files(path) != complete):
                problems.append(f"operation {last} of {count}: not whole for other readers")
            # Exports refuse to replace one another.
            if not (state == 1 and self.read is read_files and path.is_dir()):
                again, _ = in_child(write, work)
                if again or read_files(path) != complete or leftovers(work):
                    problems.append(f"operation {last} of {count}: not mended by the next run, {leftovers(work)}")
        return {"count": count, "old": found.count(0), "new": found.count(1), "problems": problems}


def save(seed: int, packed: bool = False, **options) -> Callable[[Path], None]:
    model = model_of(seed, packed)
    return lambda path: copy.deepcopy(model).save_pretrained(path, **options)


def over(*saves: Callable[[Path], None]) -> Callable[[Path], None]:
    """An old state: these saves, a tokenizer of somebody else and a text."""

    def prepare(path: Path) -> None:
        path.mkdir()
        for write in saves:
            write(path)
        (path / "README.md").write_text("Kept.")
        (path / "checkpoint-1").mkdir()
        (path / "checkpoint-1/trainer_state.json").write_text("{}")

    return prepare


def without_links(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def refuse(*_, **__):
        raise OSError("no hard links here")

    def run(path: Path) -> None:
        saving.os.link = refuse
        write(path)

    return run


def nothing(path: Path) -> None:
    pass


def checkpoint_of(root: Path) -> Path:
    path = root / "checkpoint"
    # The tokenizer's end of a text.
    save(497, packed=True)(path)
    train_tokenizer((inspect.getsource(module) for module in (argparse, inspect)), 512).save_pretrained(path)
    return path


def export_scenario(runtime: str, root: Path) -> Scenario:
    from mobilemoe.export import source

    export = getattr(importlib.import_module(f"mobilemoe.export.{runtime}"), f"export_{runtime}")
    checkpoint = checkpoint_of(root)
    source.Source.parity = lambda *_: "not compared here"
    return Scenario(nothing, lambda path: export(checkpoint, path), read_files)


def pte_scenario(root: Path) -> Scenario:
    """The program is lowered once; what is repeated begins where it is written."""
    from mobilemoe.export import exporter

    checkpoint = checkpoint_of(root)
    loaded, lowered = [], []
    load, lower = exporter.load, exporter.lower

    def load_once(*arguments):
        loaded[:] = loaded or load(*arguments)
        return tuple(loaded)

    def lower_once(*arguments):
        lowered[:] = lowered or [lower(*arguments)]
        return lowered[0]

    exporter.load, exporter.lower = load_once, lower_once
    exporter.PteModel = lambda path: None
    exporter.check_absent = lambda path: None
    config = exporter.check_config(checkpoint, 64)
    options = {"max_seq_len": 64, "moe_op": "llama", "expert_bits": 8}
    # Fills both, before any process is forked.
    module = exporter.choose_operator(config, "int4", 8, "llama")
    program_options = exporter.ProgramOptions(64, "int4", 8, embedding_bits=4, kv_cache="fp32", all_logits=False)
    stages = exporter.Stages()
    exportable, reference, _, source_config, ends = load_once(checkpoint, config, program_options, *module, stages)
    lower_once(exportable, exporter.metadata(source_config, program_options, ends), False, stages)
    reference.report = lambda program: None
    return Scenario(nothing, lambda path: exporter.export_checkpoint(checkpoint, path, **options), read_files)


def recipe_save(seed: int) -> Callable[[Path], None]:
    """The end of recipes/qat.py."""
    model = model_of(seed, packed=True)
    tokenizer = train_tokenizer([inspect.getsource(argparse)], 512)

    def write(path: Path) -> None:
        with saving.replace_when_complete(path) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)

    return write


def card_scenario(root: Path) -> Scenario:
    from mobilemoe.card.card import write_card

    results = [ROOT / "model_cards/results/s-bench.json"]
    return Scenario(text_of("Old."), lambda path: write_card("S", path, results, overwrite=True), read_files)


def text_of(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def save_files(tag: str, num_shards: int) -> Callable[[Path], None]:
    """As a model is saved, with texts for weights, which takes a hundredth of the time."""

    def write(path: Path) -> None:
        with saving.replace_when_complete(path) as partial:
            shards = [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
            for name in shards or ["model.safetensors"]:
                (partial / name).write_text(tag)
            if shards:
                (partial / saving.INDEX_FILE).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
            (partial / "config.json").write_text(json.dumps({"model_type": "text", "tag": tag}))

    return write


def read_saved_files(path: Path) -> str:
    """As transformers finds the weights."""
    config = json.loads((path / "config.json").read_text())
    single = "model.safetensors" if (path / "model.safetensors").is_file() else saving.INDEX_FILE
    weights = config.get("transformers_weights", single)
    files = {weights}
    if weights.endswith("index.json"):
        files = set(json.loads((path / weights).read_text())["weight_map"].values())
    return " ".join(sorted({(path / file).read_text() for file in files} | {config["tag"], "of", str(len(files))}))


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "files: one over shards": lambda root: Scenario(over(save_files("a", 3)), save_files("b", 0), read_saved_files),
    "files: shards over one": lambda root: Scenario(over(save_files("a", 0)), save_files("b", 3), read_saved_files),
    "files: shards over shards": lambda root: Scenario(over(save_files("a", 3)), save_files("b", 3), read_saved_files),
    "packed over full precision": lambda root: Scenario(over(save(3)), save(5, packed=True, **SHARDS), read_model),
    "full precision over packed": lambda root: Scenario(over(save(3, packed=True)), save(5, **SHARDS), read_model),
    "shards over as many shards": lambda root: Scenario(over(save(3, **SHARDS)), save(5, **SHARDS), read_model),
    "one file over shards": lambda root: Scenario(over(save(3, **SHARDS)), save(5), read_model),
    "one file over one file": lambda root: Scenario(over(save(3)), save(5), read_model),
    "a new directory": lambda root: Scenario(nothing, save(5, **SHARDS), read_model),
    "a directory without a model": lambda root: Scenario(over(), save(5, **SHARDS), read_model),
    "no hard links": lambda root: Scenario(over(save(3)), without_links(save(5, **SHARDS)), read_model),
    "recipe": lambda root: Scenario(over(), recipe_save(5), read_model),
    "recipe again": lambda root: Scenario(over(recipe_save(5)), recipe_save(7), read_model),
    "pte": pte_scenario,
    "gguf": lambda root: export_scenario("gguf", root),
    "mlx": lambda root: export_scenario("mlx", root),
    "glm4_moe": lambda root: export_scenario("glm4_moe", root),
    # Evaluations, checks and benchmarks.
    "JSON": lambda root: Scenario(text_of("{}"), lambda path: write_json(path, {"a": [1] * 9999}), read_files),
    "card": card_scenario,
}


def main(name: str, root: str) -> None:
    # Forked children have no threads of the parent.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Nor do threads of PyTorch work in them.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    print(json.dumps(SCENARIOS[name](Path(root)).run(Path(root))))


if __name__ == "__main__":
    main(*sys.argv[1:])
