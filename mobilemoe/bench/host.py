"""
Benchmarks speed and memory of models on this machine: `mobilemoe bench --device host`.

Every model runs in a separate process (worker.py). The models are interleaved: each round runs every model at every
prompt length, so that a slow phase of the machine affects all models. Each round also measures the read bandwidth of
the memory.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from modeling_mobilemoe.kernels import BuildError, memory_read_rate

from ..artifacts import is_shape, local_checkpoint
from ..machine import cpu_name, spread
from ..results import Benchmark, BenchmarkedModel, BenchmarkMachine, LengthResult, Spread, StartSeconds
from ..shapes import shapes


logger = logging.getLogger(__name__)

# Of a module whose imports would say the same again for every model.
START_WORKER = """
from mobilemoe.console import quiet_libraries
quiet_libraries()
from mobilemoe.bench.worker import main
main()
"""


class Worker:
    """
    The process of a model, see worker.py.

    Args:
        command (`list[str]`): the command that starts it.
        num_threads (`int`): OpenMP threads of the process.

    Raises:
        ValueError: when the process reports an error.
        ChildProcessError: when the process ends without an answer.
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
        return self.ask(request)

    def ask(self, request: dict) -> dict:
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
    return [sys.executable, "-c", START_WORKER, str(model), "--threads", str(num_threads)]


def model_files(model: str | Path) -> list[Path]:
    """The weight files of a model; empty for a built-in shape."""
    return [path for path in sorted(Path(model).glob("*")) if path.suffix in (".safetensors", ".pte", ".ptd")]


def evict(files: list[Path]) -> bool:
    """Drops files from the page cache where the system supports it; returns whether any were dropped."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return bool(files)


@dataclass
class Times:
    """Seconds to the first token and decoded tokens per second of a model at a prompt length, one value per round."""

    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def check_counts(prompt_lengths: Sequence[int], counts: dict[str, int]) -> None:
    """
    Raises:
        ValueError: when there is nothing to measure, naming the option.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} leaves nothing to measure. Set 1 or more.")
    if not prompt_lengths or min(prompt_lengths) < 1:
        raise ValueError(f"prompt_lengths={list(prompt_lengths)} must name lengths of 1 or more tokens.")


@dataclass(frozen=True)
class Rounds:
    """
    What is measured of every model.

    Args:
        prompt_lengths (`Sequence[int]`): prompt lengths in tokens; decoding starts at these context lengths.
        new_tokens (`int`): tokens to decode after each prompt, at least 1.
        repeats (`int`): measured rounds; one warm-up round runs first.
        num_threads (`int`): threads of each model.
        text (`str`, *optional*): text for the prompts; random tokens by default.
    """

    prompt_lengths: Sequence[int]
    new_tokens: int
    repeats: int
    num_threads: int
    text: str | None = None

    def __post_init__(self) -> None:
        counts = {"new_tokens": self.new_tokens, "repeats": self.repeats, "threads": self.num_threads}
        check_counts(self.prompt_lengths, counts)

    @property
    def context(self) -> int:
        return max(self.prompt_lengths) + self.new_tokens


def start_model(
    name: str, command: list[str], files: list[Path], rounds: Rounds
) -> tuple[Worker, dict[str, StartSeconds]]:
    """
    Starts the process of a model and times the start: "warm" and, where files can be dropped from the page cache,
    "cold".

    Raises:
        ValueError: when the model cannot be loaded or its context is too short.
    """
    starts = {}
    for state in ("cold", "warm"):
        if state == "cold" and not evict(files):
            continue
        worker = Worker(command, rounds.num_threads)
        try:
            if rounds.context > worker.loaded["context"]:
                raise ValueError(
                    f"{name} has a context of {worker.loaded['context']} tokens and {rounds.context} are needed. "
                    "Give shorter prompt lengths."
                )
            first = worker.measure(min(rounds.prompt_lengths), 1, 0, rounds.text)
        except BaseException:
            worker.close()
            raise
        starts[state] = StartSeconds(load=round(worker.loaded["load"], 4), first_token=round(first["first_token"], 4))
        if state == "cold":
            worker.close()
    return worker, starts


def run_rounds(
    workers: dict[str, Worker], models: dict[str, BenchmarkedModel], rounds: Rounds
) -> tuple[dict[tuple[str, int], Times], list[float]]:
    """
    Runs all rounds; returns times by model and prompt length, and the read bandwidth in bytes/s of each round.

    Without a compiler there are no bandwidths, and a warning.
    """
    try:
        memory_read_rate(rounds.num_threads)
        measures_memory = True
    except BuildError as error:
        warnings.warn(f"The read bandwidth of the memory is not measured. {error}", stacklevel=2)
        measures_memory = False
    times = {(name, length): Times() for name in workers for length in rounds.prompt_lengths}
    rates = []
    # The first round warms up.
    with tqdm(total=(rounds.repeats + 1) * len(times), desc="measure", leave=False) as bar:
        for repeat in range(rounds.repeats + 1):
            if measures_memory:
                rate = memory_read_rate(rounds.num_threads)
                if repeat > 0:
                    rates.append(rate)
            for length in rounds.prompt_lengths:
                for name, worker in workers.items():
                    answer = worker.measure(length, rounds.new_tokens, repeat, rounds.text)
                    models[name].peak_memory_bytes = answer["peak_memory_bytes"]
                    if repeat > 0:
                        times[name, length].first_token.append(answer["first_token"])
                        times[name, length].decode.append(rounds.new_tokens / sum(answer["decode"]))
                    bar.update()
    return times, rates


def length_result(length: int, times: Times, rates: list[float], weight_bytes: int | None) -> LengthResult:
    result = LengthResult(
        prefill_tokens_per_s=Spread(**spread([length / seconds for seconds in times.first_token])),
        first_token_ms=Spread(**spread([1e3 * seconds for seconds in times.first_token])),
        decode_tokens_per_s=Spread(**spread(times.decode)),
    )
    if weight_bytes and rates:
        limit = statistics.median(rates) / weight_bytes
        result.decode_of_memory_limit = round(statistics.median(times.decode) / limit, 3)
    return result


def run_benchmark(
    commands: dict[str, list[str]],
    files: dict[str, list[Path]],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    num_threads: int,
    prompt_file: str | Path | None = None,
    profile: bool = False,
    command: str | None = None,
) -> Benchmark:
    """
    Measures models, interleaved.

    Args:
        commands (`dict[str, list[str]]`): by model name, the command that starts the model's process.
        files (`dict[str, list[Path]]`): by model name, the weight files; a model without files has no cold start.
        prompt_lengths, new_tokens, repeats, num_threads: as in [`Rounds`].
        prompt_file (`str` or `Path`, *optional*): text for the prompts; random tokens by default.
        profile (`bool`, defaults to `False`): also time `.pte` programs by operator, after the rounds.
        command (`str`, *optional*): the command line, recorded in the result.

    Raises:
        ValueError: for a number below 1, or a model that cannot be loaded or whose context is too short.
        OSError: when a file cannot be read or a process ends.
    """
    text = None if prompt_file is None else Path(prompt_file).read_text()
    rounds = Rounds(prompt_lengths, new_tokens, repeats, num_threads, text)
    workers: dict[str, Worker] = {}
    models: dict[str, BenchmarkedModel] = {}
    try:
        for name, worker_words in commands.items():
            logger.info("load %s", name)
            workers[name], starts = start_model(name, worker_words, files[name], rounds)
            models[name] = BenchmarkedModel(
                runtime=workers[name].loaded["runtime"],
                file_bytes=sum(path.stat().st_size for path in files[name]) or None,
                start_seconds=starts,
                **{key: workers[name].loaded[key] for key in ("weight_bytes_per_token", "kv_bits", "config")},
                lengths={},
            )
        times, rates = run_rounds(workers, models, rounds)
        for name, worker in workers.items() if profile else ():
            if models[name].runtime == "executorch":
                models[name].operator_ms = {
                    str(length): worker.measure(length, new_tokens, 0, text, profile=True) for length in prompt_lengths
                }
    finally:
        for worker in workers.values():
            worker.close()
    for (name, length), measured in times.items():
        weight_bytes = models[name].weight_bytes_per_token
        models[name].lengths[str(length)] = length_result(length, measured, rates, weight_bytes)
    return Benchmark(
        command=command,
        benchmark="host",
        prompt="random tokens" if prompt_file is None else str(prompt_file),
        new_tokens=new_tokens,
        machine=BenchmarkMachine(cpu=cpu_name(), cores=os.cpu_count(), threads=num_threads),
        versions={name: version(name) for name in ("torch", "transformers")},
        read_gb_per_s=Spread(**spread([rate / 1e9 for rate in rates])) if rates else None,
        models=models,
    )


def bench(
    models: Sequence[str],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    repeats: int,
    num_threads: int,
    prompt_file: str | Path | None = None,
    runtime: str = "pte",
    profile: bool = False,
    command: str | None = None,
) -> Benchmark:
    """
    Runs [`run_benchmark`] on checkpoints, directories with `model.pte`, and the shapes S, M, L and MobileLLM-Pro.

    Shapes get random weights. They are exported first, or run as packed models in PyTorch with `runtime="pytorch"`.
    """
    from ..export.random_program import random_packed_model, write_random_program

    if len(set(models)) < len(models):
        raise ValueError(f"models={list(models)} names one twice. Raise the repeats instead.")
    if prompt_file is not None and any(map(is_shape, models)):
        raise ValueError(
            "A built-in shape has random weights and no tokenizer, so it cannot use a prompt file. Leave the file out "
            "for random tokens, or name a checkpoint."
        )
    # Checked before exporting, which takes minutes.
    context = Rounds(prompt_lengths, new_tokens, repeats, num_threads).context
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for name in models:
            if not is_shape(name):
                paths[name] = str(local_checkpoint(name))
                continue
            paths[name] = name
            config = shapes()[name]
            path = os.path.join(directory, name)
            if runtime == "pte":
                if context > config.max_position_embeddings:
                    raise ValueError(
                        f"{name} has a context of {config.max_position_embeddings} tokens and {context} are needed. "
                        "Give shorter prompt lengths."
                    )
                logger.info("export %s with random weights", name)
                write_random_program(config, path, context)
                paths[name] = path
            elif config.model_type == "mobilemoe":
                # Saved, so that loading is measured. There is no checkpoint format for the packed dense shape.
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
            command,
        )
