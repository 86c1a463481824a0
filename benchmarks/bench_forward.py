"""
Forward speed of a few layers of the S shape on the CPU, compared with transformers' OLMoE and Qwen3-MoE.

    python benchmarks/bench_forward.py [--tokens 512] [--layers 4] [--repeats 15] [--dtype bfloat16]

The three models have the same sizes and random weights. They are interleaved in one run, so that a slow phase of the
machine affects all of them. One JSON line last.
"""

import argparse
import json
import platform
import time

import torch
from peers import peer_configs
from tqdm import tqdm
from transformers import AutoModel

from mobilemoe.display import number, show, table, with_spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    configs = peer_configs(arguments.layers)
    models = {name: AutoModel.from_config(config, dtype=dtype).eval() for name, config in configs.items()}
    input_ids = torch.randint(3, 1000, (1, arguments.tokens))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in tqdm(range(arguments.repeats + 2), desc="rounds"):
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids, use_cache=False)
                # The first two rounds warm up.
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - started)

    result = {
        "benchmark": "forward",
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    rows = []
    for name, values in seconds.items():
        per_layer = sorted(1e3 * value / arguments.layers for value in values)
        low, median, high = (per_layer[round(q * (len(per_layer) - 1))] for q in (0.1, 0.5, 0.9))
        result[name] = {"ms_per_layer": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}
        rows.append((name, with_spread(median, low, high), number(1e3 * arguments.tokens / median)))
    show(table(("model", "ms/layer", "tokens/s/layer"), rows, caption="Median (10-90 %)"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
