"""
Cost of quantization-aware training: time and memory of a training step, compared with plain training.

    python benchmarks/bench_qat.py [--shape s tiny] [--tokens 2048] [--repeats 9] [--dtype float32|bfloat16]

The variants are plain training, QAT with groups of expert weights along either axis, and QAT without activation
quantization. They are interleaved in one run, so that a slow phase of the machine affects all of them. A step is
forward, backward and AdamW on random tokens. `s` is one layer of the S shape, `tiny` the model of the demo. The `s`
layer has a small vocabulary, or the head would dominate the step of a single layer. `bfloat16` is autocast with FP32
weights. Memory is the peak above that before the first step, measured in a separate process. One JSON line last.
"""

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mobilemoe.display import show, table, with_spread
from mobilemoe.train.qat import prepare
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM
from modeling_mobilemoe.int4_mobilemoe import Int4Format


VARIANTS = {
    "plain": None,
    "qat": ("output", "mobilemoe"),
    "qat, inputs per token": ("output", "per_token"),
    "qat, experts along the input": ("input", "per_token"),
    "qat, weights only": ("output", "none"),
}


class Step:
    """One variant with its optimizer. A call trains one step and returns its seconds."""

    def __init__(self, shape: str, variant: str, tokens: int, dtype: str):
        torch.manual_seed(0)
        if shape == "s":
            config = MobileMoEConfig(num_hidden_layers=1, vocab_size=2048, bos_token_id=0)
        else:
            config = MobileMoEConfig.from_pretrained("recipes/tiny")
        self.model = MobileMoEForCausalLM(config).train()
        if VARIANTS[variant] is not None:
            axis, activations = VARIANTS[variant]
            prepare(self.model, Int4Format(axis), activations)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        length = min(256, tokens)
        self.input_ids = torch.randint(3, config.vocab_size, (tokens // length, length))
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self) -> float:
        started = time.perf_counter()
        with self.autocast:
            loss = self.model(self.input_ids, labels=self.input_ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def status_megabytes(field: str) -> float:
    """A memory field of this process, from /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def peak_memory(shape: str, variant: str, tokens: int, dtype: str, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    step = Step(shape, variant, tokens, dtype)
    before = status_megabytes("VmRSS")
    # Reset the peak (VmHWM), which building the model has raised.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    pipe.send(status_megabytes("VmHWM") - before)


def measure_memory(*arguments) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_memory, args=(*arguments, torch.get_num_threads(), sender))
    process.start()
    megabytes = receiver.recv()
    process.join()
    return megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--shape", nargs="+", default=["s", "tiny"], choices=("s", "tiny"))
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()

    result = {
        "benchmark": "qat",
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    rows = []
    for shape in arguments.shape:
        steps = {variant: Step(shape, variant, arguments.tokens, arguments.dtype) for variant in VARIANTS}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for repeat in tqdm(range(arguments.repeats + 2), desc=f"rounds, {shape}"):
            for variant, step in steps.items():
                elapsed = step()
                # The first two rounds warm up.
                if repeat >= 2:
                    seconds[variant].append(elapsed)
        del steps
        result[shape] = {}
        for variant, values in seconds.items():
            # Compare each step with the plain one of the same round.
            ratios = sorted(value / plain for value, plain in zip(values, seconds["plain"], strict=True))
            ordered = sorted(1e3 * value for value in values)
            low, median, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9))
            row = {
                "ms_per_step": round(median, 2),
                "p10": round(low, 2),
                "p90": round(high, 2),
                "of_plain": round(ratios[len(ratios) // 2], 3),
                "peak_mb": round(measure_memory(shape, variant, arguments.tokens, arguments.dtype), 1),
            }
            result[shape][variant] = row
            times = (with_spread(median, low, high), f"{row['of_plain']:.2f}", f"{row['peak_mb']:.0f}")
            rows.append((shape, variant, *times))
    columns = ("shape", "variant", "ms/step", "of plain", "peak MB")
    show(table(columns, rows, caption="Median (10-90 %)"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
