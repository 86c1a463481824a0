"""Damaged recipes, training data, results and tables of runs."""

import csv
import json
import random
from io import StringIO
from pathlib import Path

import yaml

from mobilemoe.train.data import DataSource, Source
from mobilemoe.train.recipe import RecipeArguments, parse_arguments

from .grammar import damage_json, damage_text, damage_value, is_finite
from .inputs import Inputs, command
from .server import ROOT, Case, WrongResult


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


def result_file(rng: random.Random, inputs: Inputs, directory: Path) -> Case:
    """Results of evaluations and benchmarks, devices and tables of runs, in the commands that read them."""
    card = ["card", "--model", inputs.packed, "--license", "apache-2.0", "--output", directory / "README.md"]
    shape = ["card", "--model", "S", "--output", directory / "README.md"]
    plan = ["plan", "--memory-gb", 0.05, "--tokens", 1e9, "--context", 512, "--vocab-size", 4096, "--extrapolate"]
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
    # An end of an interval that the table does not determine is infinite.
    limits = ("--memory-gb", 0.05, "--tokens", 1e9, "--context", 512, "--extrapolate")
    plan = command("plan", *limits, "--law", file, may_print=("inf",))
    return Case("results", f"plan --law {file.name}: {damage}", plan)
