"""
Seconds to the first token of a conversation's second turn, with the cache of the first and without.

    python benchmarks/bench_turns.py [--model DIR] [--threads 2] [--tokens 2000] [--repeats 3]

Without `--model`, a program with random weights of the shape S. The tokens are random: a first prompt of `--tokens`,
32 generated ones, then 32 more as the second message. With and without the cache are timed in a random order, and have
to give the same tokens where the program is exact. One JSON line last.
"""

import argparse
import json
import random
import tempfile
import time

from transformers import AutoConfig

from mobilemoe.bench.worker import random_tokens, set_threads
from mobilemoe.display import show, table, with_spread
from mobilemoe.export.random_program import write_random_program
from mobilemoe.generation import LanguageModel
from mobilemoe.machine import machine, spread
from mobilemoe.runtime import load_language_model
from mobilemoe.shapes import shapes


ANSWER = MESSAGE = 32


def second_turn(model: LanguageModel, first: list[int], message: list[int], cached: bool) -> tuple[float, list[int]]:
    """Seconds to its first token, and its tokens."""
    answer = list(model.generate(first, ANSWER))
    if not cached:
        model.reset()
    started = time.perf_counter()
    tokens = model.generate([*first, *answer, *message], ANSWER)
    found = [next(tokens)]
    return time.perf_counter() - started, found + list(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint or directory with model.pte (default: S with random weights)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2000, help="of the first turn (default: 2000)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    set_threads(arguments.threads, executorch=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.model or f"{scratch}/S"
        if arguments.model is None:
            write_random_program(shapes()["S"], directory, arguments.tokens + 256)
        model = load_language_model(directory)
        # All answers have the same length.
        model.eos_ids = []
        vocab_size = AutoConfig.from_pretrained(directory).vocab_size
        tokens = random_tokens(vocab_size, arguments.tokens + MESSAGE, 0)
        first, message = tokens[:-MESSAGE], tokens[-MESSAGE:]
        # Fills the cache, and warms up.
        second_turn(model, first, message, cached=True)
        order, seconds, answers = random.Random(0), {True: [], False: []}, []
        for _ in range(arguments.repeats):
            for cached in order.sample((True, False), 2):
                elapsed, answer = second_turn(model, first, message, cached)
                seconds[cached].append(elapsed)
                answers.append(answer)
    equal = all(answer == answers[0] for answer in answers)
    if model.is_exact and not equal:
        raise ValueError("The tokens differ with the cache.")
    result = {"cached": spread(seconds[True]), "without": spread(seconds[False]), "equal_tokens": equal}
    ratio = result["cached"]["median"] / result["without"]["median"]
    cells = [with_spread(values["median"], values["p10"], values["p90"]) for values in list(result.values())[:2]]
    columns = ("tokens before", "s with the cache", "s without", "share")
    show(table(columns, [(arguments.tokens, *cells, f"{ratio:.3f}")]))
    about = {"machine": machine(), "threads": arguments.threads, "model": arguments.model or "S, random weights"}
    print(json.dumps(about | {"tokens": arguments.tokens, "share": ratio} | result))


if __name__ == "__main__":
    main()
