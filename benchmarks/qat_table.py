"""
What INT4 costs the demo's fine-tuned model, and what each loss of QAT wins back, over seeds.

    python benchmarks/qat_table.py [--model out/demo/3-sft] [--seeds 1 2 3] [--max-steps 300] [--output out/qat_table]

Needs `make demo`. Every row is an INT4 model made from `--model`: by rounding alone, or by QAT with one of the losses,
all with the same data, steps and schedule. Held-out answers are predicted with the roundings of the exported program.
Three numbers compare predictions: KL(model before || INT4 model) in nats per token, the share of tokens at which both
find the same token most probable, and bits per byte of the answers. A cell that was measured is not trained again. The
last line is JSON.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe.display import show, table
from mobilemoe.export.roundings import rounded_as
from modeling_mobilemoe import quantize


ROOT = Path(__file__).parents[1]
# By name of the row: the options of the recipe. Cross-entropy also trains at the rate at which it learns most of what
# the fine-tuning, which was short, had left.
LOSSES = {
    "cross-entropy": ["--distill", "0"],
    "cross-entropy, 10 x the rate": ["--distill", "0", "--learning_rate", "5e-4"],
    "half of each": ["--distill", "0.5"],
    "divergence": [],
    "divergence, inputs per token": ["--activation_grid", "per_token"],
}
MEASURES = ("divergence", "agreement", "bits_per_byte")


class Answers:
    """
    Held-out conversations, and the predictions of the model before INT4 at the tokens of their answers.

    Args:
        model (`Path`): its directory.
        file (`Path`): JSON Lines of prompts and completions.
        rows (`int`): about so many of them.
    """

    def __init__(self, model: Path, file: Path, rows: int):
        tokenizer = AutoTokenizer.from_pretrained(model)
        lines = file.read_text().splitlines()
        self.tokens, self.num_bytes = [], 0
        for line in lines[:: max(1, len(lines) // rows)]:
            row = json.loads(line)
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
            # The context of the recipe.
            if len(tokens) <= 256:
                self.tokens.append((torch.tensor([tokens]), len(prompt)))
                self.num_bytes += len(row["completion"][0]["content"].encode())
        self.targets = torch.cat([tokens[0, start:] for tokens, start in self.tokens])
        self.before = self.predictions(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())

    @torch.no_grad()
    def predictions(self, model) -> torch.Tensor:
        """Log-probabilities of the answers' tokens, `(tokens, V)`."""
        found = []
        for tokens, start in tqdm(self.tokens, desc="held-out", leave=False):
            found.append(model(tokens, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1))
        return torch.cat(found)

    def compare(self, after: torch.Tensor) -> dict[str, float]:
        """Compares predictions with those before INT4."""
        nats = -after.gather(1, self.targets[:, None]).sum().item()
        return {
            "divergence": (self.before.exp() * (self.before - after)).sum(-1).mean().item(),
            "agreement": (self.before.argmax(-1) == after.argmax(-1)).float().mean().item(),
            "bits_per_byte": nats / math.log(2) / self.num_bytes,
        }

    def measure(self, packed) -> dict[str, float]:
        """Compares a packed model in FP32, with the roundings of its program."""
        with rounded_as(packed.eval(), {"INT8 activations", "INT8 expert activations"}, 4, on_kernels=True):
            return self.compare(self.predictions(packed))


def train(name: str, seed: int, directory: Path, arguments: argparse.Namespace) -> None:
    command = [sys.executable, ROOT / "recipes/qat.py", "--config", ROOT / "recipes/tiny/qat.yaml", *LOSSES[name]]
    command += ["--model", arguments.model, "--output_dir", directory, "--seed", seed]
    command += ["--max_steps", arguments.max_steps, "--overwrite_output_dir", "true"]
    print(f"$ {' '.join(map(str, command))}", flush=True)
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def cell(name: str, seed: int, answers: Answers, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains and measures one model, or reads the result of an earlier run."""
    directory = arguments.output / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("seeds", "losses")}
    settings["time"] = (arguments.model / "model.safetensors").stat().st_mtime
    file = directory / "cell.json"
    if file.is_file() and (found := json.loads(file.read_text()))["settings"] == settings:
        return found["result"]
    train(name, seed, directory, arguments)
    result = answers.measure(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    file.write_text(json.dumps({"settings": settings, "result": result}) + "\n")
    return result


def mean_and_spread(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", type=Path, default=Path("out/demo/3-sft"), help="fine-tuned checkpoint")
    parser.add_argument("--heldout", type=Path, default=Path("out/demo/data/chat.heldout.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("out/qat_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--max-steps", type=int, default=300, help="steps of every run")
    parser.add_argument("--rows", type=int, default=100, help="approximate number of held-out conversations")
    arguments = parser.parse_args()
    if not (arguments.model / "model.safetensors").is_file() or not arguments.heldout.is_file():
        sys.exit(f"qat_table: {arguments.model} or {arguments.heldout} is missing. Run `make demo` first.")

    answers = Answers(arguments.model, arguments.heldout, arguments.rows)
    before = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    measured = {"before INT4": [answers.compare(answers.before)], "rounding": [answers.measure(quantize(before))]}
    for seed in arguments.seeds:
        for name in arguments.losses:
            measured.setdefault(name, []).append(cell(name, seed, answers, arguments))
    rows, result = [], {}
    for name, cells in measured.items():
        values = {measure: [each[measure] for each in cells] for measure in MEASURES}
        result[name] = values
        rows.append((name, *(mean_and_spread(values[measure], 4) for measure in MEASURES)))
    title = f"INT4 of {arguments.model}, {arguments.max_steps} steps, {len(answers.targets)} tokens, mean ± deviation"
    show(table(("made by", "KL from before, nats", "same top token", "bits per byte"), rows, title))
    print(json.dumps({"benchmark": "qat_table", "seeds": arguments.seeds, "steps": arguments.max_steps} | result))


if __name__ == "__main__":
    main()
