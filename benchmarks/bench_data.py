r"""
Tokens per second of a recipe's data, tokenized during training and from shards, and the start of a resumed run.

    python benchmarks/bench_data.py [--kinds code docstrings chat] [--copies 4] [--length 2048] [--sequences 256] \
        [--repeats 5] [--vocab-size 8192]

The data are of the Python standard library: whole files, docstrings, or prompts with answers, each measured by itself.
A round reads the same sequences both ways, as batches of 8, and compares them. Then runs resume from shards, at a
quarter of the data and near their end: seconds from opening the directory to the first batch. One JSON line last.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from mobilemoe.display import number, show, table, with_spread
from mobilemoe.machine import machine, spread
from mobilemoe.train.data import DataSource, Mixture, collate
from mobilemoe.train.recipe import CHAT_TEMPLATE
from mobilemoe.train.shards import Shards, prepare


sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import standard_library_files, write_data  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


BATCH = 8


def read(mixture: Mixture, num_sequences: int) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Batches of the first sequences, and the seconds that they take."""
    started, sequences = time.perf_counter(), mixture.sequences([0])
    batches = [collate(list(islice(sequences, BATCH))) for _ in range(num_sequences // BATCH)]
    seconds = time.perf_counter() - started
    # Ends the thread that makes the next block.
    sequences.close()
    return batches, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--kinds", nargs="+", choices=("code", "docstrings", "chat"), default=["code", "chat"])
    parser.add_argument("--copies", type=int, default=4, help="of the standard library")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=256, help="read in a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    result = vars(arguments) | {"benchmark": "data"} | machine()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        write_data(root)
        texts = (text for _, text in islice(standard_library_files(), 300))
        tokenizer = train_tokenizer(texts, arguments.vocab_size)
        tokenizer.chat_template = CHAT_TEMPLATE
        for kind in arguments.kinds:
            file = root / f"{kind}.jsonl"
            file.write_text((root / f"{kind}.train.jsonl").read_text() * arguments.copies)
            result[kind] = measure(DataSource("json", data_files=str(file)), tokenizer, root / "shards", arguments)
            measured = result[kind]
            rates = [
                with_spread(*(measured[way][name] for name in ("median", "p10", "p90")))
                for way in ("online", "shards")
            ]
            rows.append(
                (kind, number(measured["tokens_per_document"]), *rates, number(measured["times"]["median"]))
                + tuple(number(value) for value in measured["resume_seconds"].values())
            )
    columns = (
        "data",
        "tokens per document",
        "tokenized, tokens/s",
        "shards, tokens/s",
        "times",
        *measured["resume_seconds"],
    )
    show(table(columns, rows, caption="Median (10-90 %)"))
    print(json.dumps(result))


def measure(source: DataSource, tokenizer, directory: Path, arguments: argparse.Namespace) -> dict:
    def mixture(shards: Shards | None, state: dict | None = None) -> Mixture:
        return Mixture(
            [source],
            tokenizer,
            arguments.length,
            0,
            1,
            state=state,
            open_source=None if shards is None else shards.source,
        )

    def opened() -> Shards:
        return Shards(str(directory), tokenizer, arguments.length, 0)

    (prepared,) = prepare([source], tokenizer, arguments.length, 0, directory)
    tokens = arguments.sequences // BATCH * BATCH * arguments.length
    rates: dict[str, list[float]] = {"online": [], "shards": []}
    for _ in tqdm(range(arguments.repeats), desc="rounds"):
        online, seconds = read(mixture(None), arguments.sequences)
        rates["online"].append(tokens / seconds)
        mapped, seconds = read(mixture(opened()), arguments.sequences)
        rates["shards"].append(tokens / seconds)
        for batch, other in zip(online, mapped, strict=True):
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    resume = {}
    for share in (0.25, 0.95):
        num_sequences = int(share * prepared.total("tokens") / arguments.length) // BATCH * BATCH
        reading = mixture(opened())
        read(reading, num_sequences)
        state = json.loads(json.dumps(reading.state(num_sequences)))
        started = time.perf_counter()
        read(mixture(opened(), state), BATCH)
        resume[f"s to resume at {share:.0%}"] = float(f"{time.perf_counter() - started:.3g}")
    return {name: spread(values) for name, values in rates.items()} | {
        "times": spread([b / a for a, b in zip(rates["online"], rates["shards"], strict=True)]),
        "tokens_per_document": round(prepared.total("tokens") / prepared.total("documents"), 1),
        "resume_seconds": resume,
    }


if __name__ == "__main__":
    main()
