"""
End to end at toy scale: four training stages, packed INT4 weights, an INT4 `.pte`, and a report on each.

    python examples/demo.py [--max-steps N]        # or: make demo

Trains on the Python standard library and writes everything to `out/demo/`: checkpoints, `pte/`, `report.json` and
`demo.png`.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from stdlib_data import is_heldout, standard_library_files, write_data
from toy_tokenizer import train_tokenizer
from transformers import AutoTokenizer

from mobilemoe.generation import LanguageModel
from mobilemoe.runtime import CheckpointModel, PteModel
from mobilemoe.train.recipe import CHAT_TEMPLATE
from mobilemoe.train.routing import read_routing
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize


OUT = Path("out/demo")
# By stage: its script, and the kind of held-out text that it is evaluated on.
STAGES = {
    "1-pretrain": ("pretrain", "code"),
    "2-midtrain": ("pretrain", "docstrings"),
    "3-sft": ("sft", "answers"),
    "4-qat": ("qat", "answers"),
}
NUM_HELDOUT = {"answers": 48, "docstrings": 48, "code": 8}
SAMPLE_PROMPT = "Write the function `def get(self, key, default=None):`"


def run(*command: str) -> None:
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def heldout(kind: str) -> list[dict]:
    return [json.loads(line) for line in (OUT / "data" / f"{kind}.heldout.jsonl").read_text().splitlines()]


def bits_per_byte(model: LanguageModel, sequences: list[tuple[list[int], int, int]]) -> float:
    """Bits per byte over sequences of (token ids, number of unscored leading tokens, bytes of the scored text)."""
    nats = sum(
        torch.nn.functional.cross_entropy(
            model.all_logits(tokens)[skipped - 1 : -1], torch.tensor(tokens[skipped:]), reduction="sum"
        ).item()
        for tokens, skipped, _ in sequences
    )
    return nats / math.log(2) / sum(num_bytes for _, _, num_bytes in sequences)


def heldout_sequences(model: LanguageModel, kind: str) -> list[tuple[list[int], int, int]]:
    """Answers with their questions, docstrings, or windows of code, from files that no stage trains on."""
    rows = heldout("chat" if kind == "answers" else kind)
    sequences = []
    for row in rows[:: max(1, len(rows) // NUM_HELDOUT[kind])]:
        if kind == "answers":
            question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
            messages = [{"role": "user", "content": question}]
            prompt = model.tokenizer.apply_chat_template(
                messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
            )
            tokens = prompt + model.tokenizer(answer + "<|eot|>", add_special_tokens=False).input_ids
            sequences.append((tokens, len(prompt), len(answer.encode())))
        else:
            tokens = model.encode(row["text"])[:256]
            sequences.append((tokens, 1, len(model.decode(tokens).encode())))
    return sequences


def stage_start(stage: str) -> CheckpointModel:
    """The model before a stage: random weights, the previous stage, or for QAT the previous stage rounded to INT4."""
    if stage == "1-pretrain":
        torch.manual_seed(0)
        MobileMoEForCausalLM(MobileMoEConfig.from_pretrained("recipes/tiny")).save_pretrained(OUT / "0-random")
        AutoTokenizer.from_pretrained(OUT / "tokenizer").save_pretrained(OUT / "0-random")
        return CheckpointModel(OUT / "0-random")
    before = CheckpointModel(OUT / list(STAGES)[list(STAGES).index(stage) - 1])
    if stage == "4-qat":
        quantize(before.model)
    return before


def speed(model: PteModel, tokens: list[int]) -> dict[str, float]:
    """Median tokens per second over five repeats: one prefill of all tokens, then 32 decode steps."""
    prefill, decode = [], []
    for _ in range(5):
        started = time.perf_counter()
        logits = model.forward(tokens, 0)
        prefill.append(len(tokens) / (time.perf_counter() - started))
        started = time.perf_counter()
        for position in range(len(tokens), len(tokens) + 32):
            logits = model.forward([logits.argmax().item()], position)
        decode.append(32 / (time.perf_counter() - started))
    return {"prefill_tokens_per_s": statistics.median(prefill), "decode_tokens_per_s": statistics.median(decode)}


def plot(path: Path) -> None:
    """Plots the loss before QAT, whose loss is a divergence, and the expert load at the end of pre-training."""
    figure, (loss_axis, load_axis) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    offset = 0
    for stage in list(STAGES)[:-1]:
        history = json.loads((OUT / stage / "trainer_state.json").read_text())["log_history"]
        steps = [(row["step"], row["loss"]) for row in history if "loss" in row]
        loss_axis.plot([offset + step for step, _ in steps], [loss for _, loss in steps], label=stage)
        offset += steps[-1][0]
    loss_axis.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title="Stages before QAT")
    loss_axis.legend()
    load = torch.tensor(json.loads((OUT / "1-pretrain" / "expert_load.json").read_text())["load"])
    image = load_axis.imshow(load / load.mean(dim=1, keepdim=True), vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    load_axis.set(
        yticks=range(len(load)),
        xlabel="expert",
        ylabel="layer",
        title="Expert load, last pre-training step (1 = even)",
    )
    figure.colorbar(image, ax=load_axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--max-steps", help="steps of every stage, for a quick test")
    max_steps = parser.parse_args().max_steps
    overrides = [] if max_steps is None else ["--max_steps", max_steps]

    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Data and tokenizer from the standard library of Python {platform.python_version()}")
    for name, size in write_data(OUT / "data").items():
        print(f"  {name:20s} {size / 1e6:6.2f} MB")
    texts = (source for name, source in standard_library_files() if not is_heldout(name))
    vocab_size = MobileMoEConfig.from_pretrained("recipes/tiny").vocab_size
    train_tokenizer(texts, vocab_size).save_pretrained(OUT / "tokenizer")

    for stage, (script, _) in STAGES.items():
        run(f"recipes/{script}.py", "--config", f"recipes/tiny/{stage.split('-')[1]}.yaml", *overrides)
    run("-m", "mobilemoe.cli", "export", "--model", str(OUT / "4-qat"), "--output", str(OUT / "pte"))

    print("\nHeld-out text", flush=True)
    models = {
        "bf16 SFT, PyTorch": CheckpointModel(OUT / "3-sft", dtype=torch.bfloat16),
        "INT4 QAT, PyTorch": CheckpointModel(OUT / "4-qat"),
        "INT4 QAT, .pte": PteModel(OUT / "pte"),
    }
    report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "models": {}}
    for name, model in models.items():
        report["models"][name] = {
            kind: bits_per_byte(model, heldout_sequences(model, kind)) for kind in ("answers", "code")
        }
    pte = models["INT4 QAT, .pte"]
    report |= speed(pte, heldout_sequences(pte, "code")[0][0])
    report["stages"] = {}
    for stage, (_, kind) in STAGES.items():
        start, end = stage_start(stage), CheckpointModel(OUT / stage)
        report["stages"][stage] = {
            "heldout": kind,
            "bits_per_byte_at_start": bits_per_byte(start, heldout_sequences(start, kind)),
            "bits_per_byte_at_end": bits_per_byte(end, heldout_sequences(end, kind)),
            "load_imbalance_at_end": max(read_routing(OUT / stage)[-1]["imbalance"]),
        }
    report["pte_bytes"] = (OUT / "pte" / "model.pte").stat().st_size
    sample = pte.generate(pte.encode(SAMPLE_PROMPT, chat=True), 120, temperature=0.6, seed=0)
    report["sample"] = pte.decode(list(sample))
    report["seconds"] = time.perf_counter() - started
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(OUT / "demo.png")

    print(
        "\nBits per byte of held-out text, before and after each stage (before QAT: rounded to INT4 without training),"
    )
    print("and the load of the busiest expert over the mean at its end")
    print(f"{'stage':24s} {'text':12s} {'before':>8s} {'after':>8s} {'load':>8s}")
    for stage, row in report["stages"].items():
        print(
            f"{stage:24s} {row['heldout']:12s} {row['bits_per_byte_at_start']:8.3f} "
            f"{row['bits_per_byte_at_end']:8.3f} {row['load_imbalance_at_end']:8.2f}"
        )
    print(f"\n{'bits per byte':24s} {'answers':>8s} {'code':>8s}")
    for name, row in report["models"].items():
        print(f"{name:24s} {row['answers']:8.3f} {row['code']:8.3f}")
    print(
        f"\n.pte: {report['pte_bytes'] / 1e6:.2f} MB, prefill {report['prefill_tokens_per_s']:.0f} tokens/s, "
        f"decode {report['decode_tokens_per_s']:.0f} tokens/s\n\n{SAMPLE_PROMPT}\n\n{report['sample']}\n"
    )
    print(f"Everything is in {OUT}/ (report.json, demo.png); {report['seconds'] / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
