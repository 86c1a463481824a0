"""
The share of the INT4 rounding loss that QAT recovers on the demo's data: held-out loss by format, over seeds.

    python benchmarks/qat_table.py [--demo out/demo] [--output out/qat_table] [--seeds 1 2 3] [--max-steps 120]

Needs the fine-tuned checkpoint of `make demo`. For every seed, training of that checkpoint is continued with
`recipes/sft.py` in full precision and with `recipes/qat.py` in INT4, with the same data, steps and schedule. So the
comparison is fair: neither trained longer. The full-precision result is then rounded to INT4. "Recovered" is the share
of the loss added by rounding that QAT avoids. Every model is evaluated with inputs in full precision and with inputs
rounded to INT8 per token, as with `--moe-op llama`; the default `.pte` kernels round in finer blocks.

Finished cells are kept, so an interrupted command can be run again. Prints a table, and one JSON line last.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mobilemoe.display import show, table
from mobilemoe.train.qat import Int4FakeQuantizer, prepare
from modeling_mobilemoe import dequantize, quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format


AXES = ("output", "input")
# By name of the cell: the recipe and its overrides.
TRAINING = {"bf16": ("sft", [])} | {
    f"qat-{axis}-{inputs}": (
        "qat",
        # Cross-entropy, as in the other cells, which go on with the fine-tuning.
        ["--distill", "0", "--expert_axis", axis, "--quantize_activations", str(inputs == "int8")],
    )
    for axis in AXES
    for inputs in ("plain", "int8")
}


def heldout_loss(model: PreTrainedModel, directory: Path, demo: Path, rows: int) -> float:
    """Mean cross-entropy of the answer tokens over held-out conversations, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = (demo / "data/chat.heldout.jsonl").read_text().splitlines()
    total, count = 0.0, 0
    for line in tqdm(lines[:: max(1, len(lines) // rows)], desc="held-out", leave=False):
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[len(prompt) :]), reduction="sum").item()
        count += len(tokens) - len(prompt)
    return total / count


def losses(directory: Path, demo: Path, rows: int) -> dict[str, dict[str, float]]:
    """Held-out loss of a checkpoint by inputs, "plain" or "int8"; for full precision also after rounding."""
    models = {}
    with contextlib.redirect_stdout(None):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if model.config.quantization is None:
            # BF16 weights, but FP32 arithmetic for all models: BF16 noise would be as large as the differences.
            models["bf16"] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float()
            for axis in AXES:
                plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
                models[f"rounded-{axis}"] = dequantize(quantize(plain, Int4Format(axis)))
        else:
            models["packed"] = dequantize(model)
    result = {}
    for name, model in models.items():
        result[name] = {"plain": heldout_loss(model.eval(), directory, demo, rows)}
        prepare(model)
        for module in model.modules():
            # The weights are already quantised, and quantising again is not idempotent.
            if isinstance(module, Int4FakeQuantizer):
                module.enabled = False
        result[name]["int8"] = heldout_loss(model, directory, demo, rows)
    return result


def cell(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Trains and evaluates one cell, or reads the result of an earlier run."""
    directory = arguments.output / f"seed-{seed}" / name
    settings = {
        "max_steps": arguments.max_steps,
        "rows": arguments.rows,
        "model": (arguments.demo / "3-sft/model.safetensors").stat().st_mtime,
    }
    file = directory / "cell.json"
    if file.is_file() and (found := json.loads(file.read_text()))["settings"] == settings:
        return found["losses"]
    script, overrides = TRAINING[name]
    root = Path(__file__).parents[1]
    command = [sys.executable, root / f"recipes/{script}.py", "--config", root / "recipes/tiny/qat.yaml", *overrides]
    command += ["--model", arguments.demo / "3-sft", "--output_dir", directory, "--seed", str(seed)]
    if arguments.max_steps is not None:
        command += ["--max_steps", str(arguments.max_steps)]
    print(f"$ {' '.join(map(str, command))}", flush=True)
    # Data paths in the recipe are relative to the directory that contains `out/demo`.
    subprocess.run(command, check=True, cwd=arguments.demo.parents[1], stdout=subprocess.DEVNULL)
    result = losses(directory, arguments.demo, arguments.rows)
    file.write_text(json.dumps({"settings": settings, "losses": result}) + "\n")
    return result


def mean_and_spread(values: list[float], digits: int = 4) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--demo", type=Path, default=Path("out/demo"), help="output of `make demo`; must end in out/demo"
    )
    parser.add_argument("--output", type=Path, default=Path("out/qat_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max-steps", type=int, help="steps of every run (default: the recipe's)")
    parser.add_argument("--rows", type=int, default=400, help="approximate number of held-out conversations")
    arguments = parser.parse_args()
    arguments.demo, arguments.output = arguments.demo.resolve(), arguments.output.resolve()
    if not (arguments.demo / "3-sft/model.safetensors").is_file():
        sys.exit(f"qat_table: {arguments.demo} has no fine-tuned checkpoint 3-sft. Run `make demo` first.")

    # Row of the table -> inputs in the evaluation -> loss per seed.
    measured: dict[str, dict[str, list[float]]] = {}
    for seed in arguments.seeds:
        for name in TRAINING:
            for kind, row in cell(name, seed, arguments).items():
                entry = measured.setdefault(name if kind == "packed" else kind, {"plain": [], "int8": []})
                for inputs, loss in row.items():
                    entry[inputs].append(loss)

    result = {"benchmark": "qat_table", "seeds": arguments.seeds, "max_steps": arguments.max_steps, "rows": {}}
    rows = []
    labels = {
        "rounded": "INT4 by rounding",
        "plain": "INT4 by QAT, weights only",
        "int8": "INT4 by QAT, weights and inputs",
    }
    for name, entry in measured.items():
        kind, _, rest = name.partition("-")
        axis, _, trained = rest.partition("-")
        cells = {}
        for inputs, values in entry.items():
            cells[inputs] = {"mean": statistics.mean(values), "per_seed": values}
            if kind == "qat":
                rounded, plain = measured[f"rounded-{axis}"][inputs], measured["bf16"][inputs]
                shares = [(r - v) / (r - p) for r, v, p in zip(rounded, values, plain, strict=True)]
                cells[inputs]["recovered"] = statistics.mean(shares)
                cells[inputs]["recovered_per_seed"] = shares
        result["rows"][name] = cells
        columns = []
        for inputs, values in entry.items():
            shares = cells[inputs].get("recovered_per_seed")
            columns += [mean_and_spread(values), mean_and_spread(shares, 2) if shares else ""]
        rows.append((axis, "BF16" if kind == "bf16" else labels[trained or kind], *columns))
    title = f"Held-out loss, nats per token, mean ± standard deviation over {len(arguments.seeds)} seeds"
    columns = ("experts along", "model", "inputs as they are", "recovered", "inputs INT8", "recovered")
    show(table(columns, rows, title))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
