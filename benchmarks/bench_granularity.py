"""
Kernel time by granularity: the routed experts of an S layer, split into more and narrower ones, interleaved.

    python benchmarks/bench_granularity.py [--tokens 1 128 512] [--threads 2] [--repeats 15]

Granularity g splits each of the E = 8 experts, four times as wide as the model, into g. Of the 8g experts, the shared
expert replaces g / 2, and g / 2 are active per token. Apart from the router, parameters, bytes and FLOPs are constant.
The paper uses 8. One JSON line last.
"""

import json
import statistics
import time

import torch
from bench_kernel import DIM, NUM_LAYERS, in_tiles, parse_arguments, random_experts
from tqdm import tqdm

from mobilemoe.display import show, table, with_spread


EXPANSION = 8
GRANULARITIES = (2, 4, 8, 16)


def random_layer(granularity: int, generator: torch.Generator) -> tuple:
    """Arguments of `moe_ffn` after the activations: router, expert bias, packed experts, top-k, scale."""
    top_k = granularity // 2
    num_experts = granularity * EXPANSION - top_k
    experts = random_experts(generator, num_experts, 4 * DIM // granularity)
    router = torch.randn(num_experts, DIM, generator=generator) * 0.05
    return router, torch.zeros(num_experts), *in_tiles(experts), top_k, 2.5


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[1])
    generator = torch.Generator().manual_seed(0)
    layers = {g: [random_layer(g, generator) for _ in range(NUM_LAYERS)] for g in GRANULARITIES}
    result: dict = {"benchmark": "granularity", "threads": arguments.threads, "us_per_token": {}}
    table_rows = []
    with torch.inference_mode():
        for num_tokens in arguments.tokens:
            hidden_states = torch.randn(num_tokens, DIM, generator=generator)
            times: dict[int, list[float]] = {g: [] for g in GRANULARITIES}
            # Long prompts are compute-bound, so fewer layers are enough.
            used = NUM_LAYERS if num_tokens < 64 else 3
            # The first two rounds warm up.
            for repeat in tqdm(range(arguments.repeats + 2), desc=f"{num_tokens} tokens", leave=False):
                for g, members in layers.items():
                    started = time.perf_counter()
                    for layer in members[:used]:
                        torch.ops.mobilemoe.moe_ffn(hidden_states, *layer)
                    if repeat >= 2:
                        times[g].append(1e6 * (time.perf_counter() - started) / used / num_tokens)
            rows = {
                g: [statistics.median(values), *(sorted(values)[round(q * (len(values) - 1))] for q in (0.1, 0.9))]
                for g, values in times.items()
            }
            result["us_per_token"][num_tokens] = {g: [round(value, 2) for value in row] for g, row in rows.items()}
            table_rows.append((num_tokens, *(with_spread(*row) for row in rows.values())))
    columns = ("tokens", *(f"g = {g}" for g in GRANULARITIES))
    show(table(columns, table_rows, "Microseconds per token, median (10-90 %)"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
