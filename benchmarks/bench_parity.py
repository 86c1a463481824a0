"""
Agreement of `.pte` programs with PyTorch: the demo's model, and random weights with the width and depth of S.

    python benchmarks/bench_parity.py [--models demo wide S] [--moe-op mobilemoe]
    python benchmarks/bench_parity.py --models demo S --activations

Every model is exported with `mobilemoe export`, and its comparison with PyTorch is shown. The demo's checkpoint comes
from `make demo`. The others are randomly initialised and quantised: `wide` has four layers of the width of S, `S` is
the full shape. With `--activations`, nothing is exported. Instead, PyTorch rounds activations to INT8 in selected
places or in finer groups, and the table shows the change of the logits and of the selected experts. One JSON line
last.
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
from mobilemoe.export.parity import compare, encode_prompts, layers_recorded, reference_logits
from mobilemoe.export.roundings import rounded_as
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
# Above this SQNR in FP64, logits are bit-exact.
EQUAL_DB = 300


def checkpoint(name: str, directory: Path) -> Path:
    """The demo's checkpoint, or a random one, which is created once."""
    if name == "demo":
        if not DEMO.is_dir():
            raise SystemExit(f"There is no {DEMO}. Run `make demo` first, or leave the demo out of --models.")
        return DEMO
    path = directory / name
    if not path.is_dir():
        torch.manual_seed(0)
        model = MobileMoEForCausalLM(MobileMoEConfig(num_hidden_layers=LAYERS[name]))
        # Same spread as the initial weights: with zero biases, their effect would not be tested.
        for layer in model.model.layers:
            layer.feed_forward.expert_bias.normal_(std=0.02)
        quantize(model).save_pretrained(path)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(path)
    return path


def finer(group_size: int) -> Callable:
    """The activation rounding of the reference, but in groups of at most this size."""
    round_to_int8 = reference.round_to_int8

    def rounded(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = inputs.unflatten(-1, (-1, min(group_size, inputs.shape[-1])))
        integers, steps = round_to_int8(groups)
        # Expressed in one step size per token, which is what the operators multiply by.
        step = steps.amax(dim=-1).clamp(min=reference.SMALLEST)
        return (integers * steps[..., None]).flatten(-2) / step[..., None], step

    return rounded


def compare_activations(source: Path, max_seq_len: int) -> dict[str, dict]:
    """The effect of each rounding on the logits and on the selected experts."""
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
