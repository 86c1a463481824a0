"""
Time to the first text of the second turn of a conversation, through `mobilemoe serve`, with and without the cache.

    python benchmarks/bench_serve.py [--model DIR] [--tokens 2000] [--repeats 5]

The model is a program of the shape S with random weights and a small vocabulary, trained on the standard library, or
`--model DIR` with a chat template. The first turn has so many tokens of prompt. Before a second turn without the
cache, another prompt takes the cache's place. Both texts are checked to be the same. One JSON line last.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from transformers import AutoTokenizer

from mobilemoe.display import show, table, with_spread
from mobilemoe.export.random_program import write_random_program
from mobilemoe.machine import machine, spread
from mobilemoe.shapes import shapes
from mobilemoe.train.recipe import CHAT_TEMPLATE


sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import is_heldout, standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


ANSWER_TOKENS = 32


def write_program(directory: Path, num_tokens: int) -> None:
    config = shapes()["S"]
    config.vocab_size = 4096
    write_random_program(config, directory, num_tokens + 512)
    tokenizer = train_tokenizer((source for _, source in standard_library_files()), config.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def first_text(client: OpenAI, name: str, messages: list[dict]) -> tuple[float, str, int]:
    """Seconds to the first text, the text, and how many tokens of the prompt were cached."""
    options = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "stream_options": {"include_usage": True}}
    started, seconds, text = time.perf_counter(), None, ""
    for chunk in client.chat.completions.create(model=name, messages=messages, stream=True, **options):
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece and seconds is None:
            seconds = time.perf_counter() - started
        text += piece or ""
    return seconds, text, chunk.usage.prompt_tokens_details.cached_tokens


def measure(address: str, directory: Path, num_tokens: int, repeats: int) -> dict:
    client, name = OpenAI(base_url=address, api_key="none"), directory.name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    source = next(source for file, source in standard_library_files() if is_heldout(file) and len(source) > 50_000)
    text = tokenizer.decode(tokenizer(source, add_special_tokens=False).input_ids[:num_tokens])
    messages = [{"role": "user", "content": text}]
    times, cached = {"with the cache": [], "without": []}, []
    # The first pass is a warm-up.
    for repeat in range(repeats + 1):
        _, answer, _ = first_text(client, name, messages)
        question = {"role": "user", "content": "And what does it return?"}
        second = [*messages, {"role": "assistant", "content": answer}, question]
        texts = []
        for kind in times:
            if kind == "without":
                client.completions.create(model=name, prompt="import os", max_tokens=1)
            seconds, text, num_cached = first_text(client, name, second)
            texts.append(text)
            if repeat:
                times[kind].append(seconds)
                cached.append(num_cached)
        if texts[0] != texts[1]:
            raise ValueError(f"With the cache the model writes {texts[0]!r}, and without it {texts[1]!r}.")
    ratios = [warm / cold for warm, cold in zip(*times.values(), strict=True)]
    return {kind: spread(values) for kind, values in times.items()} | {"ratio": spread(ratios), "cached": cached[:2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory with model.pte or checkpoint (default: S with random weights)")
    parser.add_argument("--tokens", type=int, default=2000, help="of the first prompt (default: 2000)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.model or f"{scratch}/S")
        if arguments.model is None:
            write_program(directory, arguments.tokens)
        command = [sys.executable, "-m", "mobilemoe.cli", "serve", "--model", str(directory), "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            address = None
            while address is None:
                line = server.stderr.readline()
                if not line:
                    raise ValueError(f"{' '.join(command)} ended. Run it to see why.")
                address = re.search(r" at (http://\S+);", line)
            result = measure(address.group(1), directory, arguments.tokens, arguments.repeats)
        finally:
            server.terminate()
            server.wait()
    cells = []
    for name in ("with the cache", "without", "ratio"):
        values = result[name]
        cells.append((name, with_spread(values["median"], values["min"], values["max"])))
    show(table(("second turn", "seconds to the first text"), cells))
    print(json.dumps({"machine": machine(), "tokens": arguments.tokens, **result}))


if __name__ == "__main__":
    main()
