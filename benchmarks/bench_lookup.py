"""
Decoding speed with prompt lookup over that without, on edits of given code, repeated text, and text that is new.

    python benchmarks/bench_lookup.py [--model DIR] [--threads 2] [--repeats 3] [--tokens 192]

Time depends on the sizes of a program and acceptance on its text, so both are real: a program with random weights of
the shape S (or `--model DIR`) computes every call, and the text that it writes is given, as if it were its choice.
Random weights send the tokens of a draft to different experts, more than those of a trained model. The texts are:

- edits: functions of the standard library, then the same with a name changed and lines deleted and added
- repeats: a help text of Python, then the same text again
- new code, new prose: sources and help texts of Python, and how they continue

A tokenizer of up to 32,000 tokens is trained on the standard library, apart from the files that the texts are of.
Every text is written with and without prompt lookup in turn, in a random order; seconds are of the tokens after the
first. The tokens are checked to be the same. One JSON line last.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoConfig

from mobilemoe.bench.worker import set_threads
from mobilemoe.display import show, table, with_spread
from mobilemoe.export.random_program import write_random_program
from mobilemoe.machine import machine, spread
from mobilemoe.runtime import PteModel
from mobilemoe.shapes import shapes


sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import functions, is_heldout, standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


TEXTS = 6  # of each kind
PROMPT_TOKENS = 384


class GivenText(PteModel):
    """Computes logits and then raises that of the next token of `text` above all others."""

    text: list[int]
    calls = 0

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        self.calls += 1
        logits = super()._forward(tokens, start, num_positions)
        following = self.text[start + len(tokens) - num_positions + 1 :][:num_positions]
        logits[torch.arange(len(following)), torch.tensor(following, dtype=torch.long)] = logits.max() + 1
        return logits


def edit(source: str, choice: random.Random) -> str:
    """A name changed everywhere, and of every 12 lines about one deleted and one added."""
    names = sorted(set(re.findall(r"\b[a-z_]{4,}\b", source)))
    name = choice.choice(names)
    lines = []
    for line in re.sub(rf"\b{name}\b", f"new_{name}", source).splitlines():
        if choice.random() < 1 / 12:
            continue
        lines.append(line)
        if choice.random() < 1 / 12:
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}{choice.choice(names)} = {choice.choice(names)}")
    return "\n".join(lines)


def pairs(num_tokens: int, vocab_size: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """By kind, prompts and what follows them, as token ids."""
    choice = random.Random(0)
    files = list(standard_library_files())
    tokenizer = train_tokenizer((source for name, source in files if not is_heldout(name)), min(32000, vocab_size))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    sources = [source for name, source in files if is_heldout(name)]
    blocks = [text for source in sources for _, _, text in functions(source) if 600 < len(text) < 1500]
    blocks = choice.sample(blocks, TEXTS)
    long = PROMPT_TOKENS + num_tokens
    prose = choice.sample([ids for ids in map(encode, map(topics.get, sorted(topics))) if len(ids) > long], TEXTS)
    code = choice.sample([ids for ids in map(encode, sources) if len(ids) > long], TEXTS)
    cut = slice(PROMPT_TOKENS, long)
    return {
        "edits": [(encode(block + "\n\n"), encode(edit(block, choice))[:num_tokens]) for block in blocks],
        "repeats": [(ids[:PROMPT_TOKENS], ids[:num_tokens]) for ids in prose],
        "new code": [(ids[:PROMPT_TOKENS], ids[cut]) for ids in code],
        "new prose": [(ids[:PROMPT_TOKENS], ids[cut]) for ids in prose],
    }


def seconds(model: GivenText, prompt: list[int], answer: list[int], prompt_lookup: bool) -> float:
    """Of the tokens after the first."""
    model.text, model.calls = prompt + answer, 0
    tokens = model.generate(prompt, len(answer), prompt_lookup=prompt_lookup)
    written = [next(tokens)]
    started = time.perf_counter()
    written += tokens
    elapsed = time.perf_counter() - started
    if written != answer:
        raise ValueError(f"With prompt_lookup={prompt_lookup} the tokens differ from the given ones.")
    return elapsed


def measure(model: GivenText, vocab_size: int, num_tokens: int, repeats: int) -> list[dict]:
    order = random.Random(1)
    rows = []
    for kind, texts in pairs(num_tokens, vocab_size).items():
        speedups, rates, calls = [], {True: [], False: []}, []
        # The first pass is a warm-up, which also measures how long verifications take.
        for repeat in range(repeats + 1):
            for prompt, answer in texts:
                times = {}
                for prompt_lookup in order.sample((True, False), 2):
                    times[prompt_lookup] = seconds(model, prompt, answer, prompt_lookup)
                    if prompt_lookup:
                        calls.append((len(answer) - 1) / (model.calls - 1))
                if repeat:
                    speedups.append(times[False] / times[True])
                    for prompt_lookup, value in times.items():
                        rates[prompt_lookup].append((len(answer) - 1) / value)
        rows.append(
            {
                "text": kind,
                "speedup": spread(speedups),
                "tokens_per_s": spread(rates[True]),
                "without": spread(rates[False]),
                "tokens_per_call": round(sum(calls) / len(calls), 2),
            }
        )
    return rows


def cell(values: dict[str, float]) -> str:
    return with_spread(values["median"], values["p10"], values["p90"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory with model.pte (default: S with random weights)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=192, help="to write after each prompt (default: 192)")
    arguments = parser.parse_args()
    set_threads(arguments.threads, executorch=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.model or f"{scratch}/S"
        if arguments.model is None:
            write_random_program(shapes()["S"], directory, 2048)
        model = GivenText(directory)
        vocab_size = AutoConfig.from_pretrained(directory).vocab_size
        rows = measure(model, vocab_size, arguments.tokens, arguments.repeats)
        cells = [
            (
                row["text"],
                *(cell(row[name]) for name in ("speedup", "tokens_per_s", "without")),
                row["tokens_per_call"],
            )
            for row in rows
        ]
        show(table(("text", "speedup", "tokens/s", "without", "tokens per call"), cells))
        ratios = [round(ratio, 2) for ratio in model._times.ratios]
        print("running means for drafts of 0 to 7 tokens, in decoding steps, assumed where not measured:", *ratios)
    print(json.dumps({"machine": machine(), "threads": arguments.threads, "ratios": ratios, "texts": rows}))


if __name__ == "__main__":
    main()
