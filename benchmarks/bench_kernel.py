"""
Time of the routed experts of an S layer: the kernel, the memory floor, and PyTorch dequantising the same weights.

    python benchmarks/bench_kernel.py [--tokens 1 128 512] [--threads 2] [--repeats 15]

As in a model, decoding reads the weights from memory: the calls iterate over 20 layers, which exceed any cache. The
memory floor is the time to read the weights of the router and of the selected experts once, at the bandwidth of a
plain loop measured in the same run. The measurements are interleaved. One JSON line last.
"""

import argparse
import json
import platform
import time

import torch
from torch import nn
from tqdm import tqdm

from mobilemoe.display import number, show, table, with_spread
from modeling_mobilemoe import kernels
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.packed_mobilemoe import Int4Experts


DIM, EXPERT_DIM, NUM_EXPERTS, TOP_K = 768, 384, 60, 4
# As many as the model has, so that the weights exceed any cache, as in decoding.
NUM_LAYERS = 20


def random_experts(
    generator: torch.Generator, num_experts: int = NUM_EXPERTS, expert_dim: int = EXPERT_DIM
) -> Int4Experts:
    experts = Int4Experts(num_experts, DIM, expert_dim, nn.SiLU())
    for name, buffer in experts.named_buffers():
        if name.endswith("qweight"):
            buffer.random_(generator=generator)
        else:
            buffer.uniform_(0.002, 0.006, generator=generator)
    return experts


def in_tiles(experts: Int4Experts) -> list[torch.Tensor]:
    return [experts.tiles_of(name) for name in experts.layouts]


def expert_bytes(num_experts: int) -> int:
    weights = 3 * DIM * EXPERT_DIM
    return num_experts * (weights // 2 + weights // Int4Format.group_size * 2)


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line of a benchmark of the kernels, which then are there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not kernels.available():
        raise SystemExit("The kernels are not available; the warning above says why.")
    return arguments


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[1])
    generator = torch.Generator().manual_seed(0)
    weights = [in_tiles(random_experts(generator)) for _ in range(NUM_LAYERS)]
    dequantising = random_experts(generator)
    router = torch.randn(NUM_EXPERTS, DIM, generator=generator) * 0.05
    bias = torch.randn(NUM_EXPERTS, generator=generator) * 0.1
    result = {
        "benchmark": "kernel",
        "threads": arguments.threads,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "ms_per_layer": {},
    }
    rows = []
    with torch.inference_mode():
        for num_tokens in arguments.tokens:
            x = torch.randn(num_tokens, DIM, generator=generator)
            scores = (x @ router.T).sigmoid()
            top_k_index = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :TOP_K]
            top_k_weights = scores.gather(1, top_k_index)
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True) * 2.5
            used = weights if num_tokens < 64 else weights[:3]

            def kernel(x=x, used=used):
                for packed in used:
                    torch.ops.mobilemoe.moe_ffn(x, router, bias, *packed, TOP_K, 2.5)

            times: dict[str, list[float]] = {"kernel": [], "packed": []}
            rates = []
            for repeat in tqdm(range(arguments.repeats + 2), desc=f"{num_tokens} tokens", leave=False):
                rounds = {"kernel": seconds(kernel) / len(used)}
                rates.append(kernels.memory_read_rate(arguments.threads))
                if repeat < 4:
                    rounds["packed"] = seconds(lambda: dequantising(x, top_k_index, top_k_weights))  # noqa: B023
                # The first two rounds warm up.
                if repeat >= 2:
                    for way, value in rounds.items():
                        times[way].append(value)
            kernel_times = sorted(times["kernel"])
            p10, median, p90 = (1e3 * kernel_times[round(q * (len(kernel_times) - 1))] for q in (0.1, 0.5, 0.9))
            bandwidth = sorted(rates)[len(rates) // 2]
            num_used = top_k_index.unique().numel()
            floor = 1e3 * (expert_bytes(num_used) + router.nbytes) / bandwidth
            packed = 1e3 * min(times["packed"])
            result["ms_per_layer"][num_tokens] = {
                "kernel": round(median, 4),
                "min": round(1e3 * kernel_times[0], 4),
                "p10": round(p10, 4),
                "p90": round(p90, 4),
                "memory_floor": round(floor, 4),
                "read_gb_per_s": round(bandwidth / 1e9, 1),
                "packed_torch": round(packed, 2),
                "multiply_adds_per_s": round(num_tokens * TOP_K * 3 * DIM * EXPERT_DIM / median * 1e3),
            }
            row = (with_spread(median, p10, p90), number(floor), f"{floor / median:.2f}", number(packed))
            rows.append((num_tokens, *row))
    columns = ("tokens", "kernel", "memory floor", "of floor", "packed torch")
    show(table(columns, rows, "Milliseconds per layer, median (10-90 %)"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
