"""
Decodes with a stack of `mobilemoe::decoder_layer` of one shape and cold random weights, without a model around it.

    python benchmarks/bench_layer.py [--threads 1 2] [--contexts 16 512 4096 8000] [--kv-cache int8] [--isa avx2]

Every round runs every choice once. CPU seconds, of all threads, tell what a token costs also where other processes
take the cores; with one thread they are its time on a quiet machine. The read rate is that of a plain loop on as many
threads in the same rounds.
"""

import argparse
import ctypes
import json
import time
from statistics import median

import torch

from mobilemoe.costs import kv_cache_bytes, parameter_counts, weight_bytes_read
from mobilemoe.export.random_program import random_packed_model
from mobilemoe.shapes import shapes
from modeling_mobilemoe import kernels
from modeling_mobilemoe.cache_mobilemoe import CACHE_BITS
from modeling_mobilemoe.kernels.modules import DEFAULT_CACHE, DecoderLayer, MoEFFN


def fill(layer: DecoderLayer, config, length: int) -> None:
    """Random keys and values."""
    shape = (1, length, config.num_key_value_heads, config.head_dim)
    torch.ops.mobilemoe.update_cache(torch.randn(shape), torch.randn(shape), layer.kv_cache, 0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=("S", "M", "L"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 512, 4096, 8000])
    parser.add_argument("--kv-cache", default=DEFAULT_CACHE, choices=tuple(CACHE_BITS))
    parser.add_argument("--isa", nargs="+", help="instruction sets (default: the best of this machine)")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    library = ctypes.CDLL(str(kernels.build_torch_library()))
    library.mobilemoe_isa.restype = ctypes.c_char_p
    config = shapes()[arguments.shape]
    model = random_packed_model(config)
    assert kernels.available()
    length = max(arguments.contexts) + 1
    layers = [DecoderLayer(layer, length, arguments.kv_cache, MoEFFN(layer)) for layer in model.model.layers]
    for layer in layers:
        fill(layer, config, length)
    angles = torch.randn(1, 1, config.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    isas = arguments.isa or [library.mobilemoe_isa().decode()]
    choices = [
        (isa, threads, context) for isa in isas for threads in arguments.threads for context in arguments.contexts
    ]
    wall, cpu = ({choice: [] for choice in choices} for _ in range(2))
    rates = {threads: [] for threads in arguments.threads}
    for _ in range(arguments.rounds + 1):
        for threads in arguments.threads:
            rates[threads].append(kernels.memory_read_rate(threads))
        for isa, threads, context in choices:
            if library.mobilemoe_set_isa(isa.encode()):
                parser.error(f"--isa {isa}: this machine lacks it")
            torch.set_num_threads(threads)
            x = torch.randn(1, 1, config.hidden_size)
            start, start_cpu = time.perf_counter(), time.process_time()
            for layer in layers:
                x = layer(x, cos, sin, context)
            wall[isa, threads, context].append(time.perf_counter() - start)
            cpu[isa, threads, context].append(time.process_time() - start_cpu)
    head = parameter_counts(config)["embedding"] * 4.5 / 8
    rows = []
    for choice in choices:
        isa, threads, context = choice
        size = weight_bytes_read(config) - head + kv_cache_bytes(config, context, CACHE_BITS[arguments.kv_cache])
        times, cpu_times = sorted(wall[choice][1:]), cpu[choice][1:]
        rows.append(
            {
                "isa": isa,
                "threads": threads,
                "context": context,
                "ms": round(1e3 * median(times), 3),
                "min_ms": round(1e3 * times[0], 3),
                "max_ms": round(1e3 * times[-1], 3),
                "cpu_ms": round(1e3 * median(cpu_times), 3),
                "gb_per_s": round(size / median(times) / 1e9, 1),
                "read_gb_per_s": round(median(rates[threads][1:]) / 1e9, 1),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    print(json.dumps({"shape": arguments.shape, "kv_cache": arguments.kv_cache, "layers": rows}))


if __name__ == "__main__":
    main()
