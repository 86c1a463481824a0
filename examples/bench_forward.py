"""
Forward speed of a few layers of the S shape on the CPU, beside transformers' OLMoE and Qwen3-MoE at the same sizes.

    python examples/bench_forward.py [--tokens 512] [--layers 4] [--repeats 15] [--dtype bfloat16]

The three models take turns in one run, so that a slow spell of the machine hits all of them. OLMoE and Qwen3-MoE have
no shared expert: they get eight active experts out of 64, which is the same number of multiplications per token.
Random weights; one JSON line last.
"""

import argparse
import json
import platform
import time

import torch
from tqdm import tqdm
from transformers import AutoModel, OlmoeConfig, Qwen3MoeConfig

from modeling_mobilemoe import MobileMoEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()

    shape = {
        "vocab_size": 1024,
        "hidden_size": 768,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    }
    configs = {
        "mobilemoe": MobileMoEConfig(**shape),
        "olmoe": OlmoeConfig(
            **shape, intermediate_size=384, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True, pad_token_id=0
        ),
        "qwen3_moe": Qwen3MoeConfig(
            **shape, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8, head_dim=64, norm_topk_prob=True
        ),
    }
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
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
    print(f"{'model':12s} {'ms/layer':>9s} {'10 %':>8s} {'90 %':>8s} {'tokens/s/layer':>15s}")
    for name, values in seconds.items():
        per_layer = sorted(1e3 * value / arguments.layers for value in values)
        low, median, high = (per_layer[round(q * (len(per_layer) - 1))] for q in (0.1, 0.5, 0.9))
        result[name] = {"ms_per_layer": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}
        print(f"{name:12s} {median:9.2f} {low:8.2f} {high:8.2f} {1e3 * arguments.tokens / median:15.0f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
