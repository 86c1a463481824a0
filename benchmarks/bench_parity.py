"""
How exactly a program computes its model: the demo's, and random weights at the width and at the depth of S.

    python benchmarks/bench_parity.py [--models demo wide S] [--moe-op mobilemoe]
    python benchmarks/bench_parity.py --models demo S --activations

Every model is exported by `mobilemoe export`, whose comparison with PyTorch is shown. The demo's checkpoint comes from
`make demo`; the others are initialised at random and quantised: four layers as wide as S, and all of S. With
`--activations`, nothing is exported: PyTorch rounds the activations to INT8 in some places only, or in finer groups,
and the table says how far the logits move and how many tokens get another set of experts. Prints one JSON line last.
"""

import argparse
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe.artifacts import read_export
from mobilemoe.display import show, table
from mobilemoe.export.exporter import export_checkpoint
from mobilemoe.export.parity import compare, encode_prompts, layers_recorded, reference_logits, rounded_as
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize
from modeling_mobilemoe.kernels import reference


DEMO = Path("out/demo/4-qat")
LAYERS = {"wide": 4, "S": 20}
ROWS = {
    ".pte to PyTorch, same roundings": lambda parity: parity.pte_to_pytorch_with_the_same_roundings,
    "INT8 activations alone, PyTorch": lambda parity: parity.sources["INT8 activations"],
    ".pte to the checkpoint": lambda parity: parity.pte_to_checkpoint,
    "prefill to token by token, .pte": lambda parity: parity.prefill_to_token_by_token,
}
# What FP64 makes of logits with equal bits.
EQUAL_DB = 300


def checkpoint(name: str, directory: Path) -> Path:
    """The demo's, or a random one, which is made once."""
    if name == "demo":
        if not DEMO.is_dir():
            raise SystemExit(f"There is no {DEMO}. Run `make demo` first, or leave the demo out of --models.")
        return DEMO
    path = directory / name
    if not path.is_dir():
        torch.manual_seed(0)
        model = MobileMoEForCausalLM(MobileMoEConfig(num_hidden_layers=LAYERS[name]))
        # As the weights of the other kinds, or balancing would not show.
        for layer in model.model.layers:
            layer.feed_forward.expert_bias.normal_(std=0.02)
        quantize(model).save_pretrained(path)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(path)
    return path


def finer(group_size: int) -> Callable:
    """The reference's rounding of activations, in groups of at most this size."""
    round_to_int8 = reference.round_to_int8

    def rounded(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = inputs.unflatten(-1, (-1, min(group_size, inputs.shape[-1])))
        integers, steps = round_to_int8(groups)
        # As multiples of one step for all, which is what the operators multiply by.
        step = steps.amax(dim=-1).clamp(min=reference.SMALLEST)
        return (integers * steps[..., None]).flatten(-2) / step[..., None], step

    return rounded


def compare_activations(source: Path, max_seq_len: int) -> dict[str, dict]:
    """What every rounding does to the logits and to the choice of experts."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompts = encode_prompts(AutoTokenizer.from_pretrained(source), model.config.vocab_size, max_seq_len)
    linears, experts = {"INT8 activations"}, {"INT8 expert activations"}
    exact = reference.round_to_int8
    variants = {
        "none": (set(), exact),
        "linears": (linears, exact),
        "routed experts": (experts, exact),
        "both": (linears | experts, exact),
        "both, groups of 16": (linears | experts, finer(16)),
        "both, groups of 8": (linears | experts, finer(8)),
    }
    found: dict[str, dict] = {}
    first: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    for name, (sources, rounding) in variants.items():
        reference.round_to_int8 = rounding
        with rounded_as(model, sources, 4, on_kernels=True), layers_recorded(model, prompts) as layers:
            logits = reference_logits(model, prompts)
        chosen = [record.experts.sort(dim=-1).values for record in layers]
        first = first or (logits, chosen)
        moved = [(one != other).any(dim=-1) for one, other in zip(first[1], chosen, strict=True)]
        found[name] = compare(first[0], logits).model_dump()
        found[name]["tokens_with_other_experts"] = round(torch.cat(moved).float().mean().item(), 4)
    reference.round_to_int8 = exact
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--models", nargs="+", default=["demo", *LAYERS], choices=("demo", *LAYERS))
    parser.add_argument("--moe-op", default="mobilemoe", choices=("mobilemoe", "llama"))
    parser.add_argument("--max-seq-len", type=int, default=128, help="context of the programs in tokens")
    parser.add_argument("--directory", type=Path, default=Path("out/bench-parity"))
    parser.add_argument("--activations", action="store_true", help="compare roundings of activations instead")
    arguments = parser.parse_args()
    if arguments.activations:
        show_activations(arguments)
        return

    result = {"benchmark": "parity", "machine": platform.machine(), "moe_op": arguments.moe_op, "models": {}}
    for name in arguments.models:
        output = arguments.directory / f"{name}-{arguments.moe_op}"
        shutil.rmtree(output, ignore_errors=True)
        source = checkpoint(name, arguments.directory)
        export_checkpoint(source, output, max_seq_len=arguments.max_seq_len, moe_op=arguments.moe_op)
        parity = read_export(output).parity
        result["models"][name] = {row: read(parity).model_dump() for row, read in ROWS.items()}
        shutil.rmtree(output)

    def cell(agreement: dict) -> str:
        decibel = agreement["sqnr_db"]
        return "equal" if decibel > EQUAL_DB else f"{agreement['cosine_median']:.5f} / {decibel:.0f} dB"

    rows = [(row, *(cell(model[row]) for model in result["models"].values())) for row in ROWS]
    show(table(("median cosine / SQNR", *result["models"]), rows))
    print(json.dumps(result))


def show_activations(arguments: argparse.Namespace) -> None:
    result = {"benchmark": "activations", "machine": platform.machine(), "models": {}}
    for name in arguments.models:
        found = compare_activations(checkpoint(name, arguments.directory), arguments.max_seq_len)
        result["models"][name] = found
        rows = [
            (
                rounded,
                f"{row['sqnr_db']:.1f}",
                f"{row['cosine_median']:.6f}",
                f"{row['kl_nats']:.1e}",
                f"{row['top1_agreement']:.3f}",
                f"{row['tokens_with_other_experts']:.1%}",
            )
            for rounded, row in found.items()
            if rounded != "none"
        ]
        columns = ("rounded", "SQNR dB", "cosine", "KL nats", "top-1", "other experts")
        show(table(columns, rows, f"{name}: INT8 activations against none"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
