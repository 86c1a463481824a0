"""
How exactly a program computes its model: the demo's, and random weights at the width and at the depth of S.

    python benchmarks/bench_parity.py [--models demo wide S] [--moe-op mobilemoe]

Every model is exported by `mobilemoe export`, whose comparison with PyTorch is shown. The demo's checkpoint comes from
`make demo`; the others are initialised at random and quantised: four layers as wide as S, and all of S. Prints one
JSON line last.
"""

import argparse
import json
import platform
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from mobilemoe.artifacts import read_export
from mobilemoe.display import show, table
from mobilemoe.export.exporter import export_checkpoint
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--models", nargs="+", default=["demo", *LAYERS], choices=("demo", *LAYERS))
    parser.add_argument("--moe-op", default="mobilemoe", choices=("mobilemoe", "llama"))
    parser.add_argument("--max-seq-len", type=int, default=128, help="context of the programs in tokens")
    parser.add_argument("--directory", type=Path, default=Path("out/bench-parity"))
    arguments = parser.parse_args()

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


if __name__ == "__main__":
    main()
