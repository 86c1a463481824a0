"""
Speed and memory of models on this machine, measured in turns: `mobilemoe bench --device host`.

Every model runs in a process of its own (bench_worker.py). A round takes every model through one prompt length, and
the next round starts over, so that a machine that slows down slows all of them. What is read from memory at best is
measured in the same rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ..machine import cpu_name, memory_read_rate, spread
from ..shapes import shapes


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
    return [sys.executable, "-m", "mobilemoe.bench.worker", str(model), "--threads", str(num_threads)]


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
    from ..export.random_program import random_packed_model, write_random_program

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
