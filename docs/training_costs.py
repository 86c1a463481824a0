"""
Prints the table of GPU hours and money in docs/training-s.md, from the recipe files and the configs of the sizes.

    python docs/training_costs.py [--mfu 0.3 0.08] [--peak 989e12] [--price 2.5]

GPU hours are FLOPs / (peak x MFU x 3600). The FLOPs of a token are 6 x N_active, 8 in QAT, whose teacher runs forward,
and attention over a whole sequence as if it were one document, which is an upper bound. All MFUs are assumed: none was
measured on a GPU.
"""

import argparse
from pathlib import Path

import yaml

from mobilemoe.costs import attention_flops, training_flops
from mobilemoe.display import markdown
from modeling_mobilemoe import MobileMoEConfig


RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = {"pretrain": "pre-training", "midtrain": "mid-training", "sft": "fine-tuning", "qat": "INT4 QAT"}
SIZES = ("s", "m", "l")
# GPUs that the batch sizes of the recipes are for.
NUM_GPUS = 8


def stage_tokens(recipe: dict) -> float:
    sequences = NUM_GPUS * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    return float(recipe["max_steps"] * sequences * recipe["max_length"])


def stage_flops(config: MobileMoEConfig, stage: str, recipe: dict) -> float:
    tokens, length = stage_tokens(recipe), recipe["max_length"]
    matrices = training_flops(config, tokens)
    # Forward, and twice that backward.
    attention = 3 * attention_flops(config, length) * tokens / length
    return (matrices + attention) * (8 / 6 if stage == "qat" else 1)


def costs(mfus: list[float], peak: float, price: float) -> list[tuple[str, ...]]:
    rows = []
    for size in SIZES:
        config = MobileMoEConfig.from_pretrained(RECIPES / f"mobilemoe-{size}")
        flops = {}
        for stage in STAGES:
            recipe = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
            flops[stage] = (stage_tokens(recipe), stage_flops(config, stage, recipe))
        for name, stage in [*((name, [stage]) for stage, name in STAGES.items()), ("all", list(STAGES))]:
            tokens, total = (sum(flops[each][place] for each in stage) for place in (0, 1))
            cells = []
            for mfu in mfus:
                hours = total / (peak * mfu * 3600)
                cells += [f"{hours:,.0f}", f"${hours * price:,.0f}"]
            rows.append((size.upper(), name, f"{tokens / 1e9:,.0f}B", f"{total:.2e}", *cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.3, 0.08], help="shares of the peak, assumed")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU (default: H100, dense BF16)")
    parser.add_argument("--price", type=float, default=2.5, help="dollars per GPU hour, assumed")
    arguments = parser.parse_args()
    for value in (*arguments.mfu, arguments.peak, arguments.price):
        # NaN is not more than nothing either.
        if not 0 < value < float("inf"):
            parser.error(f"{value} cannot work. Set finite numbers above 0.")
    columns = [name for mfu in arguments.mfu for name in (f"GPU hours, MFU {mfu:g}", f"at ${arguments.price:g}")]
    rows = costs(arguments.mfu, arguments.peak, arguments.price)
    print(markdown(("size", "stage", "tokens", "FLOPs", *columns), rows))


if __name__ == "__main__":
    main()
