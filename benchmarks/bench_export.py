"""
Time and memory of exports by `mobilemoe export` and `optimum-cli`, from packed INT4 checkpoints of random weights.

    python benchmarks/bench_export.py [--sizes tiny S M L] [--exports default int4 int8 optimum] [--max-seq-len N]

`default` is `mobilemoe export`. `int4` and `int8` add `--expert-bits`, which selects the stock operator. `optimum` is
`optimum-cli` with INT8 experts. Each export runs in a separate process. Seconds and peak memory are those of the whole
process, including the comparison with PyTorch. One JSON line last.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_load import write_random_checkpoint

from mobilemoe.artifacts import read_export
from mobilemoe.display import show, table


# The data and the tokenizer of the demo.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import is_heldout, standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {"tiny": "tiny", "S": "mobilemoe-s", "M": "mobilemoe-m", "L": "mobilemoe-l"}
# By name: the command, without the directories that it reads and writes, and its output flag.
EXPORTS = {
    "default": (["mobilemoe.cli", "export"], "--output"),
    "int4": (["mobilemoe.cli", "export", "--expert-bits", "4"], "--output"),
    "int8": (["mobilemoe.cli", "export", "--expert-bits", "8"], "--output"),
    "optimum": (
        ["optimum.commands.optimum_cli", "export", "executorch", "--task", "text-generation", "--recipe", "xnnpack"],
        "--output_dir",
    ),
}
# By output flag: the context flag of the same command.
CONTEXT_FLAGS = {"--output": "--max-seq-len", "--output_dir": "--max_seq_len"}


def checkpoint(size: str, directory: Path) -> Path:
    path = directory / f"checkpoint-{size}"
    if not path.exists():
        write_random_checkpoint(path, **json.loads((RECIPES / SIZES[size] / "config.json").read_text()))
        texts = (source for name, source in standard_library_files() if not is_heldout(name))
        # A tokenizer of the tiny model's size is enough for random weights with any vocabulary.
        train_tokenizer(texts, 2048).save_pretrained(path)
    return path


def cpu_seconds() -> float:
    """CPU time of finished child processes, which does not depend on the load of shared cores."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", nargs="+", default=["S"], choices=SIZES)
    parser.add_argument("--exports", nargs="+", default=["default", "optimum"], choices=EXPORTS)
    parser.add_argument("--directory", type=Path, default=Path("out/bench-export"))
    parser.add_argument("--max-seq-len", type=int, help="context of the programs in tokens (default: the model's)")
    parser.add_argument("--keep", action="store_true", help="keep the exported programs")
    arguments = parser.parse_args()

    result = {"benchmark": "export", "machine": platform.machine(), "cores": os.cpu_count(), "exports": []}
    for size in arguments.sizes:
        source = checkpoint(size, arguments.directory)
        for name in arguments.exports:
            output = arguments.directory / f"{size}-{name}"
            shutil.rmtree(output, ignore_errors=True)
            command, output_flag = EXPORTS[name]
            started, cpu_started = time.perf_counter(), cpu_seconds()
            command = [sys.executable, "-m", *command, "--model", str(source), output_flag, str(output)]
            if arguments.max_seq_len:
                command += [CONTEXT_FLAGS[output_flag], str(arguments.max_seq_len)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            seconds = time.perf_counter() - started
            report = read_export(output)
            result["exports"].append(
                {
                    "size": size,
                    "export": name,
                    "moe_op": report.moe_op,
                    "expert_bits": report.expert_bits,
                    "max_seq_len": report.max_seq_len,
                    "checkpoint_bytes": (source / "model.safetensors").stat().st_size,
                    "pte_bytes": report.pte_bytes,
                    "seconds": round(seconds, 1),
                    "cpu_seconds": round(cpu_seconds() - cpu_started, 1),
                    "stage_seconds": report.seconds,
                    "peak_memory_bytes": report.peak_memory_bytes,
                    "cosine": report.parity.pte_to_pytorch_with_the_same_roundings.cosine_median,
                }
            )
            if not arguments.keep:
                shutil.rmtree(output)

    columns = ("checkpoint MB", ".pte MB", "seconds", "lowering s", "CPU s", "peak GB", "cosine")
    rows = [
        (
            row["size"],
            row["export"],
            f"{row['moe_op'].partition(':')[0]} INT{row['expert_bits']}",
            f"{row['checkpoint_bytes'] / 1e6:.1f}",
            f"{row['pte_bytes'] / 1e6:.1f}",
            f"{row['seconds']:.0f}",
            f"{row['stage_seconds']['lower']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
            f"{row['cosine']:.6f}",
        )
        for row in result["exports"]
    ]
    show(table(("size", "export", "experts", *columns), rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
