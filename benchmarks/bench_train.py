r"""
Training speed of the S shape, compared with transformers' OLMoE and Qwen3-MoE at the same sizes.

    python benchmarks/bench_train.py [--layers 2] [--length 512] [--batch 1] [--repeats 9] [--dtype float32] \
        [--compile]
    python benchmarks/bench_train.py --device cuda --layers 20 --vocab-size 128256 --length 2048 --batch 8 \
        --dtype bfloat16 --compile --models mobilemoe

A step is forward, backward and AdamW on packed documents, with FP32 weights; `--dtype bfloat16` uses autocast, as the
recipes do. MobileMoE runs as in the recipes, with the z-loss and counting hooks and the balancing step, both dropless
and with capacity 1.5. The models have random weights and are interleaved in one run. Model FLOPs per token are
6 x active weights plus 6 x layers x document length x query width for causal attention. MFU is the model FLOPs per
second over those of one large matrix multiplication, measured in the same run. All models stay in memory: with whole
models on a GPU, name one at a time, which also makes the peak memory that of this model. One JSON line last.
"""

import argparse
import json
import platform
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from peers import peer_configs
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from mobilemoe.display import show, table, with_spread
from mobilemoe.train.recipe import RecipeArguments, set_up_routing


# By name: model type and capacity factor.
MODELS = {
    "mobilemoe": ("mobilemoe", None),
    "mobilemoe-capacity": ("mobilemoe", 1.5),
    "olmoe": ("olmoe", None),
    "qwen3_moe": ("qwen3_moe", None),
}


def active_parameters(model: PreTrainedModel) -> int:
    """Matrix weights that are active per token. The tied embedding counts once, as the head."""
    total = 0
    for name, parameter in model.named_parameters():
        share = model.config.num_experts_per_tok / model.config.num_experts if ".experts." in name else 1
        total += round(parameter.numel() * share) if parameter.dim() > 1 else 0
    return total


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix multiplication, best of ten."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = now(device)
        a @ b
        best = min(best, now(device) - started)
    return 2 * size**3 / best


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Trainee:
    """One model with its optimizer; `step` is one optimizer step."""

    def __init__(self, config, capacity_factor: float | None, arguments: argparse.Namespace):
        self.device, self.dtype = arguments.device, getattr(torch, arguments.dtype)
        self.model = AutoModelForCausalLM.from_config(config).to(self.device).train()
        self.routing = None
        if config.model_type == "mobilemoe":
            self.routing = set_up_routing(self.model, RecipeArguments("", capacity_factor=capacity_factor), 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.run = torch.compile(self.model) if arguments.compile else self.model

    def step(self, batch: dict[str, torch.Tensor], number: int) -> None:
        lower = torch.autocast(self.device, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()
        with lower:
            loss = self.run(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        if self.routing is not None:
            self.routing.on_optimizer_step(None, SimpleNamespace(global_step=number), None)
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    configs = peer_configs(arguments.layers, arguments.vocab_size)
    trainees = {name: Trainee(configs[MODELS[name][0]], MODELS[name][1], arguments) for name in arguments.models}
    tokens = arguments.length * arguments.batch
    input_ids = torch.randint(3, arguments.vocab_size, (arguments.batch, arguments.length))
    # Two documents per sequence.
    positions = torch.cat(
        [torch.arange(arguments.length - arguments.length // 2), torch.arange(arguments.length // 2)]
    )
    batch = {
        "input_ids": input_ids,
        "labels": input_ids,
        "position_ids": positions.expand_as(input_ids).contiguous(),
    }
    batch = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for repeat in tqdm(range(arguments.repeats + 2), desc="rounds"):
        for name, trainee in trainees.items():
            started = now(arguments.device)
            trainee.step(batch, repeat)
            # The first two rounds warm up.
            if repeat >= 2:
                seconds[name].append(now(arguments.device) - started)

    peak = peak_flops(arguments.device, getattr(torch, arguments.dtype))
    result = vars(arguments) | {
        "benchmark": "train",
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_tflops": round(peak / 1e12, 3),
    }
    print(f"one large matrix multiplication: {peak / 1e12:.2f} TFLOP/s")
    rows = []
    for name, trainee in trainees.items():
        config = trainee.model.config
        width = config.num_attention_heads * 64
        flops = 6 * active_parameters(trainee.model) + 6 * config.num_hidden_layers * arguments.length // 2 * width
        rates = sorted(tokens / value for value in seconds[name])
        low, median, high = (rates[round(q * (len(rates) - 1))] for q in (0.1, 0.5, 0.9))
        result[name] = {"tokens_per_s": round(median, 1), "p10": round(low, 1), "p90": round(high, 1)}
        result[name]["mfu"] = round(median * flops / peak, 4)
        rows.append((name, with_spread(median, low, high), f"{result[name]['mfu']:.1%}"))
    show(table(("model", "tokens/s", "MFU"), rows, caption="Median (10-90 %)"))
    if arguments.device == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(f"peak memory: {result['peak_memory_gb']} GB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
