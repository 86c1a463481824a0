"""
Memory and speed of loading and decoding an S-size INT4 checkpoint: kept packed, and expanded to BF16.

    python benchmarks/bench_load.py [--directory out/s-random] [--new-tokens 16]

The weights are random. Each variant runs in a separate process. A baseline process only imports torch and
transformers; memory is the resident (VmRSS) and peak (VmHWM) memory above this baseline. One JSON line last.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from mobilemoe.display import show, table


WAYS = ("import", "packed", "expanded")


def status_bytes(field: str) -> int:
    """A memory field of this process, from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def write_random_checkpoint(directory: Path, **config_json: object) -> None:
    """Writes a packed checkpoint with random weights, of the S shape by default."""
    from mobilemoe.export.random_program import random_packed_model
    from modeling_mobilemoe import MobileMoEConfig

    random_packed_model(MobileMoEConfig.from_dict(config_json)).save_pretrained(directory)


def measure(way: str, directory: Path, new_tokens: int) -> dict[str, float]:
    import torch
    import transformers

    if way == "import":
        return {"resident": status_bytes("VmRSS"), "transformers": transformers.__version__}
    import modeling_mobilemoe

    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    if way == "expanded":
        modeling_mobilemoe.dequantize(model)
    loaded = time.perf_counter() - started
    resident = status_bytes("VmRSS")
    prompt = torch.randint(0, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=2, **options)
    times = []
    for length in (1, 1 + new_tokens):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=length, min_new_tokens=length, **options)
        times.append(time.perf_counter() - started)
    return {
        "load_s": loaded,
        "resident": resident,
        "peak": status_bytes("VmHWM"),
        "prefill_64_s": times[0],
        "decode_tokens_per_s": new_tokens / (times[1] - times[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--directory", type=Path, default=Path("out/s-random"))
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.directory, arguments.new_tokens)))
        return
    if not (arguments.directory / "model.safetensors").exists():
        write_random_checkpoint(arguments.directory)
    result = {
        "benchmark": "load",
        "machine": platform.machine(),
        "file": (arguments.directory / "model.safetensors").stat().st_size,
    }
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--directory", str(arguments.directory)]
        command += ["--new-tokens", str(arguments.new_tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result[way] = json.loads(output.splitlines()[-1])
    baseline = result["import"]["resident"]
    columns = ("load s", "resident MB", "x file", "peak MB", "64 tokens s", "tokens/s")
    rows = []
    for way in WAYS[1:]:
        row = result[way]
        resident, peak = row["resident"] - baseline, row["peak"] - baseline
        row["resident_over_file"] = round(resident / result["file"], 3)
        rows.append((way, f"{row['load_s']:.2f}", f"{resident / 1e6:.0f}", f"{row['resident_over_file']:.2f}"))
        rows[-1] += (f"{peak / 1e6:.0f}", f"{row['prefill_64_s']:.2f}", f"{row['decode_tokens_per_s']:.2f}")
    show(table(("weights", *columns), rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
