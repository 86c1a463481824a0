"""
Answers that follow random JSON schemas: whether they match, and the decoding speed over that of free text.

    python benchmarks/bench_structured.py [--model DIR] [--schemas 200] [--threads 2] [--temperature 0.8]

Each schema has a prompt that names its keys. Its answer is parsed, and validated by the package jsonschema. Strings,
arrays and numbers of the schemas are bounded, as a small model may write them without end. After the same prompt, as
many tokens as the last answer had are written freely, before the answer or after it, in random order. Seconds are of
the tokens after the first, decoded one by one unless `--prompt-lookup` is set. Free text ends at no end token.

Without `--model`, a program with random weights of the shape S computes every token, with the logits of all its
128,256 tokens. The tokenizer has up to 32,000, trained on the standard library; the others are never allowed.
One JSON line last.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import jsonschema

from mobilemoe.bench.worker import set_threads
from mobilemoe.display import show, table, with_spread
from mobilemoe.export.random_program import write_random_program
from mobilemoe.generation import LanguageModel
from mobilemoe.machine import machine, spread
from mobilemoe.runtime import load_language_model
from mobilemoe.shapes import shapes


sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


VOCABULARY = 32000
CONTEXT = 1024
NAMES = "name title price is_open tags author year count address city state kind score items unit color".split()
WORDS = "red green blue small large open closed new used north south east west low medium high".split()


def random_schema(choice: random.Random, depth: int = 2) -> dict:
    """A schema of an object at first, then of anything."""
    kinds = ["string", "integer", "number", "boolean", "enum", "pattern", "null", "either"]
    kind = "object" if depth == 2 else choice.choice(kinds + ["object", "array"] * (2 if depth else 0))
    if kind == "object":
        names = choice.sample(NAMES, choice.randrange(2, 5))
        return {
            "type": "object",
            "properties": {name: random_schema(choice, depth - 1) for name in names},
            "required": [name for name in names if choice.random() < 0.8],
            "additionalProperties": False,
        }
    if kind == "array":
        least = choice.randrange(3)
        items = random_schema(choice, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + choice.randrange(1, 4)}
    if kind == "either":
        return {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 12}]}
    return {
        "string": {"type": "string", "minLength": choice.randrange(4), "maxLength": choice.randrange(8, 24)},
        "integer": {"type": "integer", "minimum": -choice.randrange(1000), "maximum": choice.randrange(1, 10**6)},
        "number": {"type": "string", "pattern": "^[0-9]{1,4}[.][0-9]{2}$"},
        "boolean": {"type": "boolean"},
        "enum": {"enum": choice.sample(WORDS, 4)},
        "pattern": {"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]{2,4}$"},
        "null": {"type": "null"},
    }[kind]


def write(
    model: LanguageModel, prompt: list[int], max_new_tokens: int, options: dict
) -> tuple[list[int], list[float]]:
    """New tokens, and the seconds of each after the first."""
    tokens, times = [], []
    for token in model.generate(prompt, max_new_tokens, **options):
        tokens.append(token)
        times.append(time.perf_counter())
    return tokens, [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def measure(model: LanguageModel, num_schemas: int, options: dict) -> dict:
    choice = random.Random(0)
    eos_ids, chat = model.eos_ids, model.tokenizer.chat_template is not None
    ratios, rates, compile_ms, length, total, failed = [], {True: [], False: []}, [], 32, 0, []
    for index in range(num_schemas):
        schema = random_schema(choice)
        prompt = model.encode(f"Write JSON with the keys {', '.join(schema['properties'])}.\n", chat=chat)
        # Nothing that is measured runs the prompt.
        model.sequence_logits(prompt)
        started = time.perf_counter()
        grammar = model.grammars.json_schema(schema)
        compile_ms.append(1e3 * (time.perf_counter() - started))
        answer, times = [], {}
        for structured in choice.sample((True, False), 2):
            if structured:
                room = model.max_seq_len - len(prompt)
                answer, times[True] = write(model, prompt, room, options | {"seed": index, "grammar": grammar})
            else:
                model.eos_ids = []
                times[False] = write(model, prompt, length, options | {"seed": index})[1]
                model.eos_ids = eos_ids
        text = model.decode(answer)
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            failed.append({"schema": schema, "answer": text, "error": str(error)[:200]})
        total, length = total + len(answer), max(8, len(answer))
        if len(answer) >= 8:
            speeds = {kind: len(seconds) / sum(seconds) for kind, seconds in times.items()}
            ratios.append(speeds[True] / speeds[False])
            for kind, speed in speeds.items():
                rates[kind].append(speed)
    return {
        "schemas": num_schemas,
        "valid": num_schemas - len(failed),
        "tokens": total,
        "speed_ratio": spread(ratios),
        "structured_tokens_per_s": spread(rates[True]),
        "free_tokens_per_s": spread(rates[False]),
        "compile_ms": spread(compile_ms),
        "failed": failed[:3],
    }


def cell(values: dict[str, float]) -> str:
    return with_spread(values["median"], values["p10"], values["p90"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint or directory with model.pte (default: S with random weights)")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--prompt-lookup", action="store_true", help="also verify several tokens in one call")
    arguments = parser.parse_args()
    set_threads(arguments.threads, executorch=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.model or f"{scratch}/S")
        if arguments.model is None:
            write_random_program(shapes()["S"], directory, CONTEXT)
            texts = (source for _, source in standard_library_files())
            train_tokenizer(texts, VOCABULARY).save_pretrained(directory)
        model = load_language_model(directory)
        # A program with random weights has none.
        model.eos_ids = model.eos_ids or [model.tokenizer.eos_token_id]
        options = {"temperature": arguments.temperature, "prompt_lookup": arguments.prompt_lookup}
        result = measure(model, arguments.schemas, options)
    names = ("speed_ratio", "structured_tokens_per_s", "free_tokens_per_s", "compile_ms")
    row = [f"{result['valid']} of {result['schemas']}", *(cell(result[name]) for name in names)]
    show(table(("valid", "speed over free", "tokens/s", "free tokens/s", "ms to compile"), [row]))
    about = {"machine": machine(), "threads": arguments.threads, "model": arguments.model or "S, random weights"}
    print(json.dumps(about | options | result))


if __name__ == "__main__":
    main()
