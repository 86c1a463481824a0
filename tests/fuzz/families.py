"""What is damaged, by family: a good input, its damaged copies, and what a command makes of them."""

import argparse
import csv
import inspect
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe import cli
from mobilemoe.bench.runners import PhoneOptions, Program, run_own
from mobilemoe.device.adb import find_adb_device
from mobilemoe.export.exporter import export_checkpoint
from mobilemoe.integrity import verify_model
from mobilemoe.runtime import PteModel
from mobilemoe.train.data import DataSource, Source
from mobilemoe.train.recipe import RecipeArguments, parse_arguments
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize

from .grammar import WEIRD, damage_bytes, damage_json, damage_text, damage_value, is_finite
from .server import ROOT, Case, WrongResult


TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 496,
    "eos_token_id": [497, 504],
}


class Inputs:
    """
    Good inputs in a directory: checkpoints with a tokenizer, a program, results.

    Args:
        directory (`Path`): where [`make_inputs`] was called.
    """

    def __init__(self, directory: Path):
        self.packed, self.full, self.program = (directory / name for name in ("packed", "full", "pte"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.packed)
        self.logits = {path.name: logits_of(path) for path in (self.full, self.packed)}
        self.evaluation = directory / "report.json"
        self.benchmark = next((ROOT / "model_cards/results").glob("*-bench.json"))
        self.device = next((ROOT / "mobilemoe/plan/devices").glob("*.json"))


def make_inputs(directory: Path) -> None:
    """In a process of its own: an export leaves threads behind, which a forked child would miss."""
    sources = (inspect.getsource(module) for module in (argparse, inspect))
    tokenizer = train_tokenizer(sources, SIZES["vocab_size"])
    tokenizer.chat_template = (ROOT / "modeling_mobilemoe/chat_template.jinja").read_text()
    torch.manual_seed(0)
    model = MobileMoEForCausalLM(MobileMoEConfig(**SIZES)).eval()
    model.save_pretrained(directory / "full", max_shard_size="100KB")
    quantize(model).save_pretrained(directory / "packed")
    for name in ("full", "packed"):
        tokenizer.save_pretrained(directory / name)
    export_checkpoint(directory / "packed", directory / "pte", max_seq_len=32, moe_op="llama")
    config = json.loads((directory / "packed/config.json").read_text())
    (directory / "report.json").write_text(json.dumps(evaluation(config)))


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(TOKENS).logits.float()


def evaluation(config: dict) -> dict:
    task = {"score": 0.5, "stderr": 0.01, "title": "ARC-Easy", "task": "arc_easy", "category": "commonsense"}
    task |= {"task_versions": {"arc_easy": 1}, "num_fewshot": 0, "metric": "acc", "num_documents": 10}
    task |= {"num_truncated": 0, "tokens_per_batch": 512, "seconds": 1.5, "all_metrics": {"acc": 0.5}, "subtasks": {}}
    task |= {"sources": {"metric": "paper"}, "fingerprint": "0" * 64, "data_revision": None}
    model = {"name": "model", "kind": "int4", "sha256": "0" * 64, "bytes": 1, "config": config}
    versions = {"torch": "2", "lm_eval": "0.4"}
    settings = {"suite": "foundation", "limit": None, "dtype": "auto", "apply_chat_template": False}
    report = {"created": "2026-01-01", "model": model, "tasks": {"arc_easy": task}, "left_out": [], "mean": 0.5}
    report |= {"settings": settings | {"seeds": {"random": 0}, "versions": versions}, "mean_stderr": 0.01}
    return report | {"machine": {"processor": "x", "cores": 2, "threads": 2}}


def command(*words: object) -> Callable[[], None]:
    """A command line of ours, whose output is to have finite numbers."""

    def run() -> None:
        printed = StringIO()
        with redirect_stdout(printed):
            cli.main([str(word) for word in words])
        for word in printed.getvalue().replace(",", " ").split():
            if word.strip("-+%:[]{}()").lower() in ("nan", "inf", "infinity"):
                raise WrongResult(f"prints {word}: {printed.getvalue()[:300]}")

    return run


def generate_with(path: Path) -> Callable[[], None]:
    return command("run", "--model", path, "--prompt", "import os", "--max-new-tokens", 4)


def copied(path: Path, into: Path) -> Path:
    shutil.copytree(path, into / path.name)
    return into / path.name


# A family makes a case from random numbers, the good inputs, and the empty directory of the case.


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
    good = {name: value for name, value in MobileMoEConfig(**SIZES).to_dict().items() if name != "architectures"}
    changed, words = damage_value(rng, good)

    def run() -> None:
        config = MobileMoEConfig.from_dict(changed)
        if not is_finite(config.to_dict()):
            raise WrongResult("accepted, and is not finite")
        with torch.device("meta"):
            MobileMoEForCausalLM(config)

    return Case("config", f"MobileMoEConfig: {words}", run)


def recipe_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """A recipe's YAML: its syntax, its keys and its values, as far as they are known before training."""
    from trl import SFTConfig

    source = rng.choice(sorted((ROOT / "recipes").glob("*.yaml")) + sorted((ROOT / "recipes/tiny").glob("*.yaml")))
    good = yaml.safe_load(source.read_text()) | {"model": str(inputs.full), "output_dir": str(directory / "out")}
    good |= {"use_cpu": True, "bf16": False}
    file = directory / "recipe.yaml"
    if rng.random() < 0.75:
        changed, words = damage_value(rng, good)
        # What YAML cannot write is a case of the text.
        file.write_text(yaml.safe_dump(changed))
    else:
        content, words = damage_text(rng, yaml.safe_dump(good).encode())
        file.write_bytes(content)

    def run() -> None:
        recipe, training = parse_arguments(ROOT / "recipes", (RecipeArguments, SFTConfig), ["--config", str(file)])
        numbers = {**recipe.__dict__, "data": [source.__dict__ for source in recipe.data]}
        if not is_finite(numbers) or not is_finite(training.to_dict()):
            raise WrongResult("accepted, and is not finite")

    return Case("recipe", f"{source.relative_to(ROOT)}: {words}", run)


def data_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Training data: damaged lines, columns and bytes."""
    text = {"text": "def f(x):\n    return x\n" * 8}
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]
    good = rng.choice((text, {"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}))
    lines = [json.dumps(good)] * 12
    row, words = damage_value(rng, good)
    if rng.random() < 0.5:
        place = rng.choice((0, 5, 11))
        lines[place] = json.dumps(row)
        words = f"row {place}: {words}"
        content = "\n".join(lines).encode()
    else:
        content, words = damage_text(rng, "\n".join(lines).encode())
    file = directory / "data.jsonl"
    file.write_bytes(content)
    source = DataSource(path="json", data_files=str(file), streaming=True)

    def run() -> None:
        opened = Source(source, inputs.tokenizer, 128, 0)
        documents = opened.encode(opened.draw(iter(opened.dataset), 100), 0)
        if not any(documents):
            raise WrongResult("accepted, and has no documents")

    return Case("data", f"{', '.join(good)}: {words}", run)


def program_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """`model.pte`: whatever its size, a damaged program that is verified may not run."""
    path = copied(inputs.program, directory)
    content, words = damage_bytes(rng, (path / "model.pte").read_bytes())
    (path / "model.pte").write_bytes(content)
    verified = rng.random() < 0.5

    def run() -> None:
        if verified:
            verify_model(path)
        logits = PteModel(path).forward([3, 4, 5], 0)
        if not logits.isfinite().all():
            raise WrongResult("runs, and its logits are not finite")

    return Case("program", f"model.pte{', verified' if verified else ''}: {words}", run, is_wrong=verified)


def export_report(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """`export.json` beside a program."""
    path = copied(inputs.program, directory)
    file = path / "export.json"
    content, words = damage_json(rng, json.loads(file.read_text()))
    file.write_bytes(content)
    return Case("results", f"export.json: {words}", generate_with(path))


def result_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Results of evaluations and benchmarks, devices and tables of runs, in the commands that read them."""
    card = ["card", "--model", inputs.packed, "--license", "apache-2.0", "--output", directory / "README.md"]
    shape = ["card", "--model", "S", "--output", directory / "README.md"]
    plan = ["plan", "--memory-gb", 0.05, "--tokens", 1e9, "--context", 512, "--vocab-size", 4096]
    file = directory / "result.json"
    source, words = rng.choice(
        (
            (inputs.benchmark, [*shape, "--results", file]),
            (inputs.program / "export.json", [*card, "--results", file]),
            (inputs.evaluation, [*card, "--results", file]),
            (inputs.evaluation, ["eval", "compare", "--results", file, "--output", directory / "compared"]),
            (inputs.device, [*plan, "--device", file]),
            (inputs.benchmark, [*plan, "--device", file]),
        )
    )
    content, damage = damage_json(rng, json.loads(source.read_text()))
    file.write_bytes(content)
    return Case("results", f"{' '.join(map(str, words[:2]))} of {source.name}: {damage}", command(*words))


def runs_table(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """The table of runs of `plan --law`."""
    columns = ("active_parameters", "tokens", "expansion", "loss")
    rows = [
        {"active_parameters": n, "tokens": d, "expansion": e, "loss": 1.7 + (n / 1e6) ** -0.3 + (d / 1e8) ** -0.3}
        for n in (1e7, 1e8, 1e9)
        for d in (1e9, 1e10, 1e11)
        for e in (1.0, 4.0, 8.0)
    ]
    row = rng.randrange(len(rows))
    rows[row], damage = damage_value(rng, rows[row])
    if rng.random() < 0.5:
        file = directory / "runs.jsonl"
        content = "\n".join(map(json.dumps, rows)).encode()
    else:
        file, printed = directory / "runs.csv", StringIO()
        table = csv.DictWriter(printed, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        content = printed.getvalue().encode()
    damage = f"row {row}: {damage}"
    if rng.random() < 0.3:
        content, damage = damage_text(rng, content)
    file.write_bytes(content)
    plan = command("plan", "--memory-gb", 0.05, "--tokens", 1e9, "--context", 512, "--law", file)
    return Case("results", f"plan --law {file.name}: {damage}", plan)


def command_line(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Options of every command with values of every kind."""
    parsers = cli.make_parser()._subparsers._group_actions[0].choices
    verb = rng.choice(("plan", "run", "run", "card", "eval", "bench", "export"))
    required = {
        "plan": ["--memory-gb", "0.05", "--tokens", "1e9", "--context", "512"],
        "run": ["--model", inputs.packed, "--prompt", "import os", "--max-new-tokens", "3"],
        "card": ["--model", inputs.packed, "--license", "mit", "--output", directory / "README.md"],
        "eval": ["check", "--model", inputs.packed, "--text", f"code={inputs.packed / 'config.json'}"],
        # No process is started for a model that is not there.
        "bench": ["--model", directory / "none"],
        "export": ["--model", inputs.packed, "--output", directory / "out", "--to", "gguf"],
    }[verb]
    parser = parsers[verb]
    if verb == "eval":
        parser = parser._subparsers._group_actions[0].choices["check"]
    left_out = ("help", "text")
    actions = [action for action in parser._actions if action.option_strings and action.dest not in left_out]
    words = [str(word) for word in required]
    wrong = False
    for action in rng.sample(actions, rng.choice((1, 1, 2))):
        words.append(action.option_strings[0])
        if action.nargs == 0:
            continue
        value = rng.choice(WEIRD)
        value = str(value).replace("\0", "")
        words.append(value)
        # Every number of ours is finite and not negative.
        number = action.type in (int, float) and action.dest != "seed"
        wrong |= number and value in ("nan", "inf", "-inf", "-1", "-1000000000.0", str(-(2**63)))
    shown = " ".join(words).replace(str(directory), ".")
    return Case("command line", f"{verb} {shown}"[:300], command(verb, *words), wrong)


RUNNER_LINES = (
    {"event": "loaded", "isa": "neon", "load_s": 0.5},
    {"event": "measure", "repeat": 0, "prompt_length": 16, "first_token_s": 0.1, "decode_s": [0.02, 0.02]},
    {
        "event": "done",
        "operators": {"llama::quantized_moe_ffn.out": 40},
        "cores": [4, 5],
        "peak_rss_bytes": 10**8,
        "pss_bytes": 10**8,
    },
)
ADB_ANSWERS = {
    "devices": "List of devices attached\nemulator-5554\tdevice\n\n",
    "getprop": "[ro.product.model]: [Pixel]\n[ro.soc.model]: [Tensor]\n[ro.product.cpu.abi]: [arm64-v8a]\n",
    "df": "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/x 100000 50000 50000 50% /data\n",
    "meminfo": "MemTotal:  8000000 kB\n",
    "battery": "  level: 80\n  temperature: 301\n",
    "thermalservice": "Thermal Status: 0\n",
    "max_freq": "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq:1800000\n",
    "runner": "\n".join(map(json.dumps, RUNNER_LINES)) + "\n",
}


def adb_answer(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """What `adb` prints, and with which status: one answer is damaged."""
    answers = dict(ADB_ANSWERS)
    key = rng.choice((*answers, "runner", "runner"))
    if key == "runner" and rng.random() < 0.7:
        lines = list(RUNNER_LINES)
        place = rng.randrange(len(lines))
        lines[place], words = damage_value(rng, lines[place])
        answers["runner"] = "\n".join(map(json.dumps, lines)) + "\n"
    else:
        content, words = damage_text(rng, answers[key].encode())
        answers[key] = content.decode(errors="replace")
    for name, answer in answers.items():
        (directory / name).write_text(answer.replace("\0", ""))
    status = rng.choice((0, 0, 0, 1, 255))
    script = directory / "adb"
    script.write_text(
        f'#!/bin/sh\nfor name in {" ".join(answers)}; do case "$*" in *$name*) cat "{directory}/$name"; '
        f"test $name = {key} && exit {status}; exit 0;; esac; done; echo device\n"
    )
    script.chmod(0o755)

    def run() -> None:
        os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
        device = find_adb_device()
        fingerprint, free = device.fingerprint(), device.free_bytes("/data")
        program = Program("model", inputs.program)
        options = PhoneOptions((16,), 2, 1, runner_binary=script)
        run_own(device, program, options, [3] * 18, 0)
        measured = json.loads(program.result().model_dump_json())
        if free < 0 or not is_finite(json.loads(fingerprint.model_dump_json())) or not is_finite(program.rows):
            raise WrongResult("accepted, and a number is negative or not finite")
        if any(value <= 0 for row in program.rows.values() for values in row.values() for value in values):
            raise WrongResult(f"accepted, and a speed is not positive: {program.rows}")
        if not measured["lengths"]:
            raise WrongResult("accepted, and nothing was measured")

    return Case("adb", f"{key}: {words}, status {status}", run)


FAMILIES: tuple[tuple[Callable[[random.Random, Inputs, Path], Case], int], ...] = (
    (checkpoint_file, 5),
    (config_file, 4),
    (config_values, 4),
    (recipe_file, 4),
    (data_file, 3),
    (program_file, 3),
    (export_report, 2),
    (result_file, 4),
    (runs_table, 2),
    (command_line, 5),
    (adb_answer, 3),
)


def make_case(seed: int, number: int, inputs: Inputs, directory: Path) -> Case:
    """The case of a number, the same whatever ran before it."""
    rng = random.Random(f"{seed} {number}")
    (family,) = rng.choices([family for family, _ in FAMILIES], [share for _, share in FAMILIES])
    return family(rng, inputs, directory)
