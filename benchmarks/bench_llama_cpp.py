"""
Compares `.pte` programs, from Python and in the C++ runner, with llama.cpp: same integers and scales, same tokens.

    pip install gguf && pip install --no-binary :all: llama-cpp-python
    python benchmarks/bench_llama_cpp.py [--prompt-lengths 16 512 2048 4096 8000] [--json FILE] [--picture FILE]

MobileMoE shapes run in llama.cpp as `exaone-moe`, which computes the same function. The dense shape runs as `llama`,
with the same matrices but without our norm of queries and keys. Weights are Q4_0, with an FP16 scale per 32 weights
like ours. All other settings are the defaults of each runtime.

An invocation starts every model in a new process, and runs all of them in every round, in alternating order. A speed
is the median of its rounds, and a ratio is of two speeds of one invocation; both are reported with their extremes
over the invocations. Prompts of more than 1,024 tokens run once per invocation, and the rounds decode after them. The
read bandwidth of the memory is that of a loop in C++ on as many threads, in the same rounds. One JSON line last.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

from comparison_report import draw, tables
from random_gguf import write_random_gguf
from tqdm import tqdm

from mobilemoe.artifacts import PROGRAM_FILE, replace_file
from mobilemoe.bench.host import Worker, check_counts
from mobilemoe.bench.worker import cache_bits
from mobilemoe.costs import kv_cache_bytes, weight_bytes_read
from mobilemoe.display import show
from mobilemoe.export.random_program import write_random_program
from mobilemoe.machine import cpu_name, package_versions, spread
from mobilemoe.results import BenchmarkMachine, RuntimeComparison, RuntimeTrial, Spread
from mobilemoe.shapes import program_config, shapes
from modeling_mobilemoe.kernels import build_hash, build_runner, memory_read_rate
from modeling_mobilemoe.kernels.modules import MoEFFN


DENSE = "MobileLLM-Pro"
# Longer prompts take minutes, so they run once per process.
LONG_PROMPT = 1024
# Both runtimes round activations to 8 bits, at other places, which exchanges experts: S agrees at three of four
# positions. A function without the norm of queries and keys agrees at one of forty.
MIN_AGREEMENT = 0.3
# Tokens that are decoded in the warm-up, whose predictions are compared.
WARM_UP = 32
WORKER = Path(__file__).with_name("speed_worker.py")
# Ends by itself when its parent is gone.
COMPUTE = "import os\nparent = os.getppid()\nprint(flush=True)\nwhile os.getppid() == parent: sum(range(100_000))"


class Condition(NamedTuple):
    prompt_length: int
    busy_processes: int


class Trial(NamedTuple):
    shape: str
    runtime: str
    condition: Condition


@dataclass
class Turn:
    """Seconds of a prompt, `None` where it was in the cache, and of each token after it; the predicted tokens."""

    prefill: float | None
    decode: list[float]
    predicted: list[int]
    peak_memory_bytes: int


# Takes tokens and the length of the prompt, and whether the same prompt ran before; `None` if it has nothing to do.
Model = Callable[[list[int], int, bool], Turn | None]


@dataclass
class Options:
    shapes: Sequence[str]
    prompt_lengths: Sequence[int]
    busy: Sequence[int]
    busy_prompt_length: int
    busy_new_tokens: int
    new_tokens: int
    repeats: int
    invocations: int
    threads: int

    def __post_init__(self) -> None:
        names = ("busy_prompt_length", "busy_new_tokens", "new_tokens", "repeats", "invocations", "threads")
        check_counts(self.prompt_lengths, {name: self.__dict__[name] for name in names})
        if any(count < 0 for count in self.busy):
            raise ValueError(f"busy={list(self.busy)} are numbers of processes. Set 0 or more.")

    @property
    def conditions(self) -> list[Condition]:
        """By length, so that the peak memory at a length is not that of a longer prompt."""
        found = {Condition(length, 0) for length in self.prompt_lengths}
        return sorted(found | {Condition(self.busy_prompt_length, count) for count in self.busy})

    def num_new_tokens(self, condition: Condition) -> int:
        return self.busy_new_tokens if condition.prompt_length == self.busy_prompt_length else self.new_tokens

    @property
    def context(self) -> int:
        needed = [condition.prompt_length + self.num_new_tokens(condition) for condition in self.conditions]
        return max(*needed, min(self.prompt_lengths) + WARM_UP)


def process_model(worker: Worker) -> Model:
    """A model in a process of speed_worker.py."""

    def run(tokens: list[int], length: int, again: bool) -> Turn | None:
        prefill, predicted = None, []
        if not (again and length > LONG_PROMPT):
            answer = worker.ask({"tokens": tokens[:length], "start": 0, "one_by_one": False})
            (prefill,), predicted = answer["seconds"], answer["predicted"]
        answer = worker.ask({"tokens": tokens[length:], "start": length, "one_by_one": True})
        return Turn(prefill, answer["seconds"], predicted + answer["predicted"], answer["peak_memory_bytes"])

    return run


def runner_model(program: Path, tokens_file: Path, threads: int) -> Model:
    """A program in the C++ runner: a new process each time, whose first pass is a warm-up."""
    command = [str(build_runner()), "--model", str(program / PROGRAM_FILE), "--tokens", str(tokens_file)]
    command += ["--threads", str(threads), "--repeats", "1"]

    def run(tokens: list[int], length: int, again: bool) -> Turn | None:
        if again and length > LONG_PROMPT:
            return None
        tokens_file.write_text(" ".join(map(str, tokens)))
        lengths = ["--prompt-lengths", str(length), "--new-tokens", str(len(tokens) - length)]
        result = subprocess.run([*command, *lengths], capture_output=True, text=True)
        if result.returncode != 0:
            said = (result.stdout + result.stderr)[-500:]
            raise ValueError(f"{shlex.join([*command, *lengths])} ended with {result.returncode}: {said}")
        events = [json.loads(line) for line in result.stdout.splitlines()]
        measured = next(event for event in events if event["event"] == "measure" and event["repeat"] == 0)
        return Turn(measured["first_token_s"], measured["decode_s"], measured["tokens"], events[-1]["peak_rss_bytes"])

    return run


@contextmanager
def computing(count: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTE], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def write_models(name: str, directory: Path, context: int) -> tuple[Path, Path]:
    """The program and the GGUF file of a shape, written in another process unless they exist."""
    # Another version of the kernels may want its weights in another order.
    program, gguf = directory / f"{name}-{context}-{build_hash()}", directory / f"{name}.gguf"
    directory.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        if not program.exists():
            partial = directory / f"{program.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            pool.submit(write_random_program, shapes()[name], partial, context).result()
            partial.rename(program)
        if not gguf.exists():
            with replace_file(gguf) as partial:
                pool.submit(write_random_gguf, shapes()[name], partial).result()
    return program, gguf


def random_tokens(vocab_size: int, count: int, seed: str) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


def agreement(turns: Sequence[Turn], others: Sequence[Turn]) -> float:
    """Share of equal predictions in turns with the same tokens."""
    pairs = [(turn.predicted, other.predicted) for turn, other in zip(turns, others, strict=True)]
    same = [a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def warm_up(models: dict[tuple[str, str], Model], options: Options) -> None:
    """
    Runs every model once.

    Raises:
        ValueError: when llama.cpp and our program compute another function.
    """
    turns, length = {}, min(options.prompt_lengths)
    for (shape, runtime), model in models.items():
        vocab_size = shapes()[shape].vocab_size
        turns[shape, runtime] = model(random_tokens(vocab_size, length + WARM_UP, "warm-up"), length, False)
    for shape, runtime in turns:
        if runtime == "llama.cpp" and shape != DENSE:
            share = agreement([turns[shape, "executorch"]], [turns[shape, runtime]])
            if not share >= MIN_AGREEMENT:
                raise ValueError(
                    f"{shape}: llama.cpp predicts the same token as our program at {share:.0%} of positions, so they "
                    "compute different functions. Delete the GGUF file in --directory, or install another version."
                )


def run_invocation(
    files: dict[str, tuple[Path, Path]], options: Options, invocation: int
) -> tuple[dict[Trial, list[Turn]], list[float]]:
    """Starts every model, runs all conditions, and returns the turns of each and the read bandwidths in bytes/s."""
    turns: dict[Trial, list[Turn]] = {}
    rates: list[float] = []
    with ExitStack() as stack:
        models: dict[tuple[str, str], Model] = {}
        arguments = ["--threads", options.threads, "--context", options.context]
        for name, (program, gguf) in files.items():
            for runtime, path in (("executorch", program), ("llama.cpp", gguf)):
                worker = Worker([sys.executable, WORKER, path, *arguments], options.threads)
                stack.callback(worker.close)
                models[name, runtime] = process_model(worker)
            models[name, "runner"] = runner_model(program, program.with_suffix(".tokens"), options.threads)
        warm_up(models, options)
        for condition in tqdm(options.conditions, desc=f"invocation {invocation + 1}", leave=False):
            length, busy = condition
            new_tokens = options.num_new_tokens(condition)
            with computing(busy):
                for repeat in range(options.repeats):
                    if busy == 0:
                        rates.append(memory_read_rate(options.threads))
                    # The same prompt in all rounds where it runs once.
                    seed = f"{invocation} {length} {0 if length > LONG_PROMPT else repeat}"
                    for name, runtime in list(models)[:: -1 if repeat % 2 else 1]:
                        tokens = random_tokens(shapes()[name].vocab_size, length + new_tokens, seed)
                        # The threads of the model before spin for a while.
                        time.sleep(0.05)
                        turn = models[name, runtime](tokens, length, repeat > 0)
                        if turn is not None:
                            turns.setdefault(Trial(name, runtime, condition), []).append(turn)
    return turns, rates


def prefill_rate(length: int, turns: Sequence[Turn]) -> float:
    return length / median(turn.prefill for turn in turns if turn.prefill is not None)


def decode_rate(turns: Sequence[Turn]) -> float:
    return median(len(turn.decode) / sum(turn.decode) for turn in turns)


def over(trial: Trial, reference: Trial, invocations: Sequence[dict[Trial, list[Turn]]]) -> tuple[Spread, Spread]:
    """Prefill and decode speed of a trial as multiples of another's, of each invocation."""
    length = trial.condition.prompt_length
    pairs = [(turns[trial], turns[reference]) for turns in invocations]
    prefill = [prefill_rate(length, ours) / prefill_rate(length, theirs) for ours, theirs in pairs]
    decode = [decode_rate(ours) / decode_rate(theirs) for ours, theirs in pairs]
    return Spread(**spread(prefill)), Spread(**spread(decode))


def bytes_per_token(shape: str, context: int, kv_bits: int) -> int:
    config = program_config(shapes()[shape])
    moe_op = None if shape == DENSE else MoEFFN.operator
    return int(weight_bytes_read(config, moe_op=moe_op) + kv_cache_bytes(config, context, kv_bits))


def summarise(
    invocations: Sequence[dict[Trial, list[Turn]]], rates: Sequence[Sequence[float]], kv_bits: dict[str, int]
) -> list[RuntimeTrial]:
    """
    Args:
        invocations: of each, the turns by trial.
        rates: of each, read bandwidths in bytes per second.
        kv_bits (`dict[str, int]`): of an entry of our cache, by shape; llama.cpp's has 16.
    """
    results = []
    for trial in invocations[0]:
        shape, runtime, condition = trial
        length, busy = condition
        all_turns = [turns[trial] for turns in invocations]
        speeds = [decode_rate(turns) for turns in all_turns]
        tokens = [1e3 * seconds for turns in all_turns for turn in turns for seconds in turn.decode]
        # Half of the new tokens are in the cache on average.
        context = length + (len(all_turns[0][0].decode) + 1) // 2
        size = bytes_per_token(shape, context, 16 if runtime == "llama.cpp" else kv_bits[shape])
        result = RuntimeTrial(
            shape=shape,
            runtime=runtime,
            prompt_length=length,
            busy_processes=busy,
            prefill_tokens_per_s=Spread(**spread([prefill_rate(length, turns) for turns in all_turns])),
            decode_tokens_per_s=Spread(**spread(speeds)),
            token_ms=Spread(**spread(tokens)),
            peak_memory_bytes=max(turn.peak_memory_bytes for turns in all_turns for turn in turns),
            bytes_per_token=size,
        )
        if busy == 0:
            shares = [speed * size / median(own) for speed, own in zip(speeds, rates, strict=True)]
            result.decode_of_memory_limit = Spread(**spread(shares))
        reference = trial._replace(runtime="llama.cpp")
        if trial != reference:
            result.prefill_over_llama_cpp, result.decode_over_llama_cpp = over(trial, reference, invocations)
            if shape != DENSE:
                # The runner skips rounds of long prompts.
                shared = [(turns, own[reference]) for turns, own in zip(all_turns, invocations, strict=True)]
                result.top1_agreement = round(
                    sum(agreement(ours, theirs[: len(ours)]) for ours, theirs in shared) / len(shared), 4
                )
        dense = trial._replace(shape=DENSE)
        if trial != dense and dense in invocations[0]:
            result.prefill_over_dense, result.decode_over_dense = over(trial, dense, invocations)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--shapes", nargs="+", default=["S", DENSE], choices=shapes())
    parser.add_argument("--prompt-lengths", nargs="+", type=int, default=[16, 512])
    parser.add_argument("--busy", nargs="*", type=int, default=[0, 1, 2], help="numbers of computing processes")
    parser.add_argument("--busy-prompt-length", type=int, default=128, help="prompt of the trials of --busy")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument(
        "--busy-new-tokens", type=int, default=192, help="of the trials of --busy: a short burst may run before others"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of an invocation")
    parser.add_argument("--invocations", type=int, default=3, help="processes of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--directory", type=Path, default=Path("out/bench-llama-cpp"), help="directory of the models, which are kept"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--picture", type=Path, help="plot the speeds to this file")
    arguments = vars(parser.parse_args())
    directory, json_file, picture_file = (arguments.pop(name) for name in ("directory", "json", "picture"))
    try:
        options = Options(**arguments)
        for name in options.shapes:
            if options.context > shapes()[name].max_position_embeddings:
                raise ValueError(f"{name} has no context of {options.context} tokens. Give shorter prompt lengths.")
    except ValueError as error:
        parser.error(str(error))
    files = {name: write_models(name, directory, options.context) for name in options.shapes}
    measured = [run_invocation(files, options, invocation) for invocation in range(options.invocations)]
    invocations, rates = [turns for turns, _ in measured], [own for _, own in measured]
    result = RuntimeComparison(
        command=shlex.join(["python", *sys.argv]),
        machine=BenchmarkMachine(cpu=cpu_name(), cores=os.cpu_count(), threads=options.threads),
        versions=package_versions(("mobilemoe", "torch", "executorch", "llama_cpp_python")),
        context=options.context,
        new_tokens=options.new_tokens,
        invocations=options.invocations,
        repeats=options.repeats,
        read_gb_per_s=Spread(**spread([rate / 1e9 for own in rates for rate in own])),
        file_bytes={
            name: {"pte": (program / PROGRAM_FILE).stat().st_size, "gguf": gguf.stat().st_size}
            for name, (program, gguf) in files.items()
        },
        trials=summarise(invocations, rates, {name: cache_bits(str(program)) for name, (program, _) in files.items()}),
    )
    show(*tables(result))
    if json_file:
        result.save(json_file)
    if picture_file:
        draw(result, picture_file)
    print(json.dumps(result.as_dict()))


if __name__ == "__main__":
    main()
