"""
The whole road at toy scale: four training stages, packed INT4, an INT4 `.pte`, and what each of them writes.

    python examples/demo.py        # or: make demo

Trains on the Python standard library and writes everything to `out/demo/`: checkpoints, `pte/`, `report.json` and
`demo.png`.
"""

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

from modeling_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.runtime import CheckpointModel, LanguageModel, PteModel
from modeling_mobilemoe.training import train_tokenizer


OUT = Path("out/demo")
STAGES = {"1-pretrain": "pretrain", "2-midtrain": "pretrain", "3-sft": "sft", "4-qat": "qat"}
NUM_HELDOUT_PAIRS = 96
NUM_HELDOUT_WINDOWS = 8
SAMPLE_PROMPT = "Write the function `def get(self, key, default=None):`"


def run(*command: str) -> None:
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def heldout(kind: str) -> list[dict]:
    return [json.loads(line) for line in (OUT / "data" / f"{kind}.heldout.jsonl").read_text().splitlines()]


def bits_per_byte(model: LanguageModel, sequences: list[tuple[list[int], int, int]]) -> float:
    """Mean over sequences of (token ids, number of unscored leading tokens, bytes of the scored text)."""
    nats = sum(
        torch.nn.functional.cross_entropy(
            model.all_logits(tokens)[skipped - 1 : -1], torch.tensor(tokens[skipped:]), reduction="sum"
        ).item()
        for tokens, skipped, _ in sequences
    )
    return nats / math.log(2) / sum(num_bytes for _, _, num_bytes in sequences)


def heldout_sequences(model: LanguageModel) -> dict[str, list[tuple[list[int], int, int]]]:
    """Answers given their question, and windows of code; from files that no stage has seen."""
    answers, code = [], []
    pairs = heldout("chat")
    for pair in pairs[:: len(pairs) // NUM_HELDOUT_PAIRS]:
        prompt, answer = pair["prompt"][0]["content"], pair["completion"][0]["content"]
        tokens = model.encode(prompt, chat=True)
        answer_tokens = model.tokenizer(answer + "<|eot|>", add_special_tokens=False).input_ids
        answers.append((tokens + answer_tokens, len(tokens), len(answer.encode())))
    for row in heldout("code")[:NUM_HELDOUT_WINDOWS]:
        tokens = model.encode(row["text"])[:256]
        code.append((tokens, 1, len(model.decode(tokens).encode())))
    return {"answers": answers, "code": code}


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
    """Loss over the steps of every stage, and the share of tokens of every expert at the end of pre-training."""
    figure, (loss_axis, load_axis) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    offset = 0
    for stage in STAGES:
        history = json.loads((OUT / stage / "trainer_state.json").read_text())["log_history"]
        steps = [(row["step"], row["loss"]) for row in history if "loss" in row]
        loss_axis.plot([offset + step for step, _ in steps], [loss for _, loss in steps], label=stage)
        offset += steps[-1][0]
    loss_axis.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title="Four stages")
    loss_axis.legend()
    load = torch.tensor(json.loads((OUT / "1-pretrain" / "expert_load.json").read_text())["load"])
    image = load_axis.imshow(load / load.mean(dim=1, keepdim=True), vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    load_axis.set(xlabel="expert", ylabel="layer", title="Expert load, last pre-training step (1 = even)")
    figure.colorbar(image, ax=load_axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Data and tokenizer from the standard library of Python {platform.python_version()}")
    for name, size in write_data(OUT / "data").items():
        print(f"  {name:20s} {size / 1e6:6.2f} MB")
    texts = (source for name, source in standard_library_files() if not is_heldout(name))
    vocab_size = MobileMoEConfig.from_pretrained("recipes/tiny").vocab_size
    train_tokenizer(texts, vocab_size).save_pretrained(OUT / "tokenizer")

    for stage, script in STAGES.items():
        run(f"recipes/{script}.py", "--config", f"recipes/tiny/{stage.split('-')[1]}.yaml")
    run("-m", "modeling_mobilemoe.cli", "export", "--model", str(OUT / "4-qat"), "--output", str(OUT / "pte"))

    print("\nHeld-out text", flush=True)
    models = {
        "bf16 SFT, PyTorch": CheckpointModel(OUT / "3-sft", dtype=torch.bfloat16),
        "INT4 QAT, PyTorch": CheckpointModel(OUT / "4-qat"),
        "INT4 QAT, .pte": PteModel(OUT / "pte"),
    }
    report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "models": {}}
    for name, model in models.items():
        sequences = heldout_sequences(model)
        report["models"][name] = {
            f"{kind}_bits_per_byte": bits_per_byte(model, sequences[kind]) for kind in ("answers", "code")
        }
    pte = models["INT4 QAT, .pte"]
    report |= speed(pte, heldout_sequences(pte)["code"][0][0])
    for stage in STAGES:
        log = json.loads((OUT / stage / "trainer_state.json").read_text())["log_history"]
        losses = [row["loss"] for row in log if "loss" in row]
        fifth = max(1, len(losses) // 5)
        report[stage] = {"first_loss": statistics.mean(losses[:fifth]), "last_loss": statistics.mean(losses[-fifth:])}
        load = json.loads((OUT / stage / "expert_load.json").read_text())["history"]
        report[stage]["last_load_imbalance"] = max(load[-1]["imbalance"])
    report["pte_bytes"] = (OUT / "pte" / "model.pte").stat().st_size
    sample = pte.generate(pte.encode(SAMPLE_PROMPT, chat=True), 120)
    report["sample"] = pte.decode(list(sample))
    report["seconds"] = time.perf_counter() - started
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(OUT / "demo.png")

    print("\nMean loss over the first and the last fifth of each stage; busiest expert over the mean at the end")
    print(f"{'stage':20s} {'first loss':>10s} {'last loss':>10s} {'imbalance':>10s}")
    for stage in STAGES:
        row = report[stage]
        print(f"{stage:20s} {row['first_loss']:10.3f} {row['last_loss']:10.3f} {row['last_load_imbalance']:10.2f}")
    print(f"\n{'held-out bits per byte':24s} {'answers':>8s} {'code':>8s}")
    for name, row in report["models"].items():
        print(f"{name:24s} {row['answers_bits_per_byte']:8.3f} {row['code_bits_per_byte']:8.3f}")
    print(
        f"\n.pte: {report['pte_bytes'] / 1e6:.2f} MB, prefill {report['prefill_tokens_per_s']:.0f} tokens/s, "
        f"decode {report['decode_tokens_per_s']:.0f} tokens/s\n\n{SAMPLE_PROMPT}\n\n{report['sample']}\n"
    )
    print(f"Everything is in {OUT}/ (report.json, demo.png); {report['seconds'] / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
