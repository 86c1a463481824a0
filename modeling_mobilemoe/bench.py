"""
Speed and memory of models on this machine, measured in turns: `mobilemoe bench --device host`.

Every model runs in a process of its own (bench_worker.py). A round takes every model through one prompt length, and
the next round starts over, so that a machine that slows down slows all of them. What is read from memory at best is
measured in the same rounds.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm


class Worker:
    """
    A model's process, see bench_worker.py.

    Args:
        command (`list[str]`): that starts it.

    Raises:
        ValueError: with what the process says is wrong.
        ChildProcessError: when it ends without a word.
    """

    def __init__(self, command: Sequence[str | Path], num_threads: int):
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(num_threads), "TRANSFORMERS_VERBOSITY": "error"},
        )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def measure(self, prompt_length: int, new_tokens: int, seed: int, text: str | None, profile: bool = False) -> dict:
        request = {"prompt_length": prompt_length, "new_tokens": new_tokens, "seed": seed, "text": text}
        if profile:
            request["profile"] = True
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"The process of the model ended with status {self._process.wait()}; see above.")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def worker_command(model: str | Path, num_threads: int) -> list[str]:
    return [sys.executable, "-m", "modeling_mobilemoe.bench_worker", str(model), "--threads", str(num_threads)]


def model_files(model: str | Path) -> list[Path]:
    """The files that hold weights; none of a built-in shape."""
    return [path for path in sorted(Path(model).glob("*")) if path.suffix in (".safetensors", ".pte", ".ptd")]


def evict(files: list[Path]) -> bool:
    """Drops files from the page cache, where the system has a way to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return bool(files)


def spread(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    p10, p90 = (ranked[round(q * (len(ranked) - 1))] for q in (0.1, 0.9))
    numbers = {"median": statistics.median(ranked), "p10": p10, "p90": p90, "min": ranked[0], "max": ranked[-1]}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()} | {"repeats": len(ranked)}


def memory_read_rate(memory: torch.Tensor) -> float:
    """Bytes per second of a plain sum, on all threads."""
    started = time.perf_counter()
    memory.sum()
    return memory.nbytes / (time.perf_counter() - started)


def run_benchmark(
    commands: dict[str, list[str]],
    files: dict[str, list[Path]],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    num_threads: int,
    prompt_file: str | Path | None = None,
    profile: bool = False,
) -> dict:
    """
    Measures models in turns.

    Args:
        commands (`dict[str, list[str]]`): the command of each model's process by the model's name.
        files (`dict[str, list[Path]]`): the weights of each; a model without files has no cold start.
        prompt_lengths (`Sequence[int]`): in tokens; the lengths of the contexts that are decoded after, too.
        new_tokens (`int`): to decode after each prompt, 1 or more.
        repeats (`int`): rounds, after one that warms up.
        num_threads (`int`): of each model.
        prompt_file (`str` or `Path`, *optional*): text to take tokens from; random tokens when absent.
        profile (`bool`, defaults to `False`): afterwards, time programs by operator.

    Returns:
        `dict`: rates in tokens per second, times in seconds unless named otherwise, memory in bytes.

    Raises:
        ValueError: for numbers that cannot be measured, or a model that cannot be loaded or lacks the context.
        OSError: for a file that cannot be read, or a process that ends.
    """
    for name, value in (("new_tokens", new_tokens), ("repeats", repeats), ("threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name}={value} leaves nothing to measure. Set 1 or more.")
    if not prompt_lengths or min(prompt_lengths) < 1:
        raise ValueError(f"prompt_lengths={list(prompt_lengths)} must name lengths of 1 or more tokens.")
    text = None if prompt_file is None else Path(prompt_file).read_text()
    torch.set_num_threads(num_threads)
    # Larger than any cache; as FP64, few and wide additions for every byte.
    memory = torch.zeros(2**25, dtype=torch.float64)
    first_length = min(prompt_lengths)
    models: dict[str, dict] = {}
    workers: dict[str, Worker] = {}
    raw: dict[tuple[str, int], dict[str, list[float]]] = {}
    rates: list[float] = []
    try:
        for name, command in commands.items():
            starts = {}
            for state in ("cold", "warm"):
                if state == "cold" and not evict(files[name]):
                    continue
                workers[name] = worker = Worker(command, num_threads)
                needed = max(prompt_lengths) + new_tokens
                if needed > worker.loaded["context"]:
                    raise ValueError(
                        f"{name} has a context of {worker.loaded['context']} tokens and {needed} are needed. "
                        "Give shorter prompt lengths."
                    )
                first = worker.measure(first_length, 1, 0, text)
                times = {"load": worker.loaded["load"], "first_token": first["first_token"]}
                starts[state] = {key: round(value, 4) for key, value in times.items()}
                if state == "cold":
                    worker.close()
            models[name] = {
                "runtime": worker.loaded["runtime"],
                "file_bytes": sum(path.stat().st_size for path in files[name]) or None,
                "start_seconds": starts,
                **{name: worker.loaded[name] for name in ("weight_bytes_per_token", "kv_bits", "config")},
            }
        # The first round warms up.
        for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False):
            rate = memory_read_rate(memory)
            for length in prompt_lengths:
                for name, worker in workers.items():
                    answer = worker.measure(length, new_tokens, repeat, text)
                    models[name]["peak_memory_bytes"] = answer["peak_memory_bytes"]
                    if repeat > 0:
                        row = raw.setdefault((name, length), {"first_token": [], "decode": []})
                        row["first_token"].append(answer["first_token"])
                        row["decode"].append(new_tokens / sum(answer["decode"]))
            if repeat > 0:
                rates.append(rate)
        if profile:
            for name, worker in workers.items():
                if worker.loaded["runtime"] == "executorch":
                    models[name]["operator_ms"] = {
                        str(length): worker.measure(length, new_tokens, 0, text, profile=True)
                        for length in prompt_lengths
                    }
    finally:
        for worker in workers.values():
            worker.close()
    for name, model in models.items():
        model["lengths"] = {}
        for length in prompt_lengths:
            row = raw[name, length]
            model["lengths"][str(length)] = {
                "prefill_tokens_per_s": spread([length / seconds for seconds in row["first_token"]]),
                "first_token_ms": spread([1e3 * seconds for seconds in row["first_token"]]),
                "decode_tokens_per_s": spread(row["decode"]),
            }
            if model["weight_bytes_per_token"]:
                limit = statistics.median(rates) / model["weight_bytes_per_token"]
                share = statistics.median(row["decode"]) / limit
                model["lengths"][str(length)]["decode_of_memory_limit"] = round(share, 3)
    return {
        "benchmark": "host",
        "prompt": "random tokens" if prompt_file is None else str(prompt_file),
        "new_tokens": new_tokens,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": num_threads},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "read_gb_per_s": spread([rate / 1e9 for rate in rates]),
        "models": models,
    }


def bench(
    models: Sequence[str],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    num_threads: int,
    prompt_file: str | Path | None = None,
    runtime: str = "pte",
    profile: bool = False,
) -> dict:
    """
    As [`run_benchmark`], of checkpoints, directories with `model.pte`, and the shapes S, M, L and MobileLLM-Pro, which
    are exported first, or packed models in PyTorch with `runtime="pytorch"`.
    """
    from .bench_programs import random_packed_model, shapes, write_random_program

    if len(set(models)) < len(models):
        raise ValueError(f"models={list(models)} names one twice. Raise the repeats instead.")
    if prompt_file is not None and any(name in shapes() for name in models):
        raise ValueError(
            "A built-in shape has random weights and no tokenizer, so it reads no prompt file. Leave the file out for "
            "random tokens, or name a checkpoint."
        )
    context = max(prompt_lengths, default=0) + new_tokens
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for name in models:
            paths[name] = name
            config = shapes().get(name)
            if config is None:
                continue
            path = os.path.join(directory, name)
            if runtime == "pte":
                if not 1 <= context <= config.max_position_embeddings:
                    raise ValueError(
                        f"{name} has a context of {config.max_position_embeddings} tokens and {context} are needed. "
                        "Give shorter prompt lengths."
                    )
                write_random_program(config, path, context)
                paths[name] = path
            elif config.model_type == "mobilemoe":
                # As a checkpoint, so that loading it can be measured. The dense shape is not in a format that we load.
                random_packed_model(config).save_pretrained(path)
                paths[name] = path
        return run_benchmark(
            {name: worker_command(path, num_threads) for name, path in paths.items()},
            {name: model_files(path) for name, path in paths.items()},
            prompt_lengths,
            new_tokens,
            repeats,
            num_threads,
            prompt_file,
            profile,
        )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(result: dict, paper: bool = False) -> None:
    """Prints the medians with their spread; with `paper`, the paper's phones below."""
    from rich.console import Console
    from rich.table import Table

    def with_spread(row: dict | None) -> str:
        if row is None:
            return ""
        return f"{row['median']:.4g} ({row['p10']:.4g}-{row['p90']:.4g})"

    machine = result["machine"]
    table = Table(
        title=f"{machine['cpu']}, {machine['threads']} threads, {result['prompt']}: median (10-90 %)",
        caption=f"Memory read rate {with_spread(result['read_gb_per_s'])} GB/s" if "read_gb_per_s" in result else None,
    )
    for column in ("model", "prompt", "prefill tok/s", "first token ms", "decode tok/s", "of limit", "load s", "MB"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for name, model in result["models"].items():
        load = " ".join(f"{state} {start['load']:.2f}" for state, start in model["start_seconds"].items())
        for length, row in model["lengths"].items():
            share = row.get("decode_of_memory_limit")
            table.add_row(
                name,
                length,
                *map(with_spread, map(row.get, ("prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s"))),
                "" if share is None else f"{share:.0%}",
                load,
                "" if model["peak_memory_bytes"] is None else f"{model['peak_memory_bytes'] / 1e6:,.0f}",
            )
            # Once per model.
            name, load = "", ""
    # Wide enough for every number, also when the output is a file.
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    for name, model in result["models"].items():
        for length, times in model.get("operator_ms", {}).items():
            for phase, operators in times.items():
                table = Table("operator", "ms", title=f"{name}, {phase}, {length} tokens")
                for operator, milliseconds in operators.items():
                    table.add_row(operator, f"{milliseconds:.3f}")
                console.print(table)
    if paper:
        table = Table("the paper's", "model", "context", "prefill tok/s", "first token ms", "decode tok/s")
        measured = {"S", "MobileLLM-Pro", *result["models"]}
        for device, name, length, row in (row for row in published_speeds() if row[1] in measured):
            cells = (f"{row[key]:.4g}" if key in row else "" for key in MEASURES)
            table.add_row(device, name, str(length), *cells)
        console.print(table)


MEASURES = ("prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s")


def published_speeds() -> Iterator[tuple[str, str, int, dict[str, float]]]:
    """Device, model, tokens, and what the paper measured there; from `published.yaml`."""
    import yaml

    numbers = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    for device, tables in numbers["devices"].items():
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for key, factor, name in (
            ("prefill_tokens_per_s", 1, "prefill_tokens_per_s"),
            ("first_token_s", 1e3, "first_token_ms"),
            ("decode_tokens_per_s", 1, "decode_tokens_per_s"),
        ):
            for model, values in tables.get(key, {}).items():
                for length, value in values.items():
                    rows.setdefault((model, length), {})[name] = factor * value
                    if key == "first_token_s":
                        rows[model, length]["prefill_tokens_per_s"] = length / value
        for (model, length), row in sorted(rows.items()):
            yield device, model, length, row


def draw(result: dict, path: str | Path, paper: bool = False) -> None:
    """
    Writes prefill and decode rates by length, with their spread, as a picture; its suffix names the format. With
    `paper`, those of the paper's phones for the same shapes are dashed lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (("prefill_tokens_per_s", "prompt, tokens"), ("decode_tokens_per_s", "context, tokens"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for name, model in result["models"].items():
            measured = {int(length): row[key] for length, row in model["lengths"].items() if key in row}
            lengths, rows = list(measured), list(measured.values())
            medians = [row["median"] for row in rows]
            errors = [[row["median"] - row["p10"] for row in rows], [row["p90"] - row["median"] for row in rows]]
            axis.errorbar(lengths, medians, yerr=errors, marker="o", capsize=3, label=name)
        published: dict[str, list[tuple[int, float]]] = {}
        for device, name, length, row in published_speeds() if paper else ():
            if key in row and name in ("S", "MobileLLM-Pro"):
                published.setdefault(f"{name}, {device.split(' (')[0]}, paper", []).append((length, row[key]))
        for name, points in published.items():
            axis.plot(*zip(*points, strict=True), linestyle="--", marker=".", linewidth=1, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_title(f"{key.split('_')[0]}, tokens/s")
    # Decoding has all lines; of prefill some sources say nothing.
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{result['machine']['cpu']}, {result['machine']['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
