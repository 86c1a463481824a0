"""Checkpoint -> directory for mlx-lm, on a Mac or an iPhone, with the model's code in it.

MLX's affine 4-bit numbers are `scale * q + bias` with q from 0 to 15. Ours count from -8, so `bias = -8 * scale`,
which FP16 holds exactly, and the stored nibbles differ by their top bit. Groups of 32 lie along the last dimension of
what is stored, and MLX multiplies by a matrix or its transpose: both axes of experts go through without rounding.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_mobilemoe.int4_mobilemoe import Int4Format, pack_int4

from ..artifacts import LogitAgreement
from .relayout import Weight
from .source import Rounding, Shards, Source, group_of


MODEL_FILE = "mlx_model.py"


def export_mlx(model: str | Path, output_dir: str | Path, command: str | None = None) -> Path:
    """
    Writes a checkpoint as a directory that mlx-lm loads with `--trust-remote-code`, no number rounded.

    Args:
        model (`str` or `Path`): directory or Hub id, packed or full precision.
        output_dir (`str` or `Path`): created by this call; must not exist.
        command (`str`, *optional*): the command line that asked for this, for `export.json`.

    Raises:
        ValueError: for a request that cannot be met, a damaged checkpoint, or a disk that is too small. Nothing is
            written then.
    """
    source = Source(model, output_dir)
    rope_type = source.config.rope_scaling["rope_type"]
    if rope_type != "llama3":
        raise ValueError(
            f"rope_scaling has rope_type={rope_type!r}, and the model file for MLX knows the rule 'llama3' only. "
            "Use --to gguf or pte."
        )
    config = source.config.to_dict()
    for key in ("auto_map", "quantization", "quantization_config", "architectures"):
        config.pop(key, None)
    config |= {
        "model_file": MODEL_FILE,
        "rope_llama3": config.pop("rope_scaling"),
        # The other axis is also the layout of full-precision experts.
        "expert_axis": source.expert_axis or "input",
        "eos_token_id": source.eos_ids,
    }
    if source.is_int4:
        config["quantization"] = {"group_size": Int4Format.group_size, "bits": Int4Format.bits, "mode": "affine"}

    rounding = Rounding()
    # INT4 grows by its biases: two FP16 numbers for 32 weights in place of one.
    with source.directory(int(1.12 * source.num_bytes)) as partial:
        shards = Shards(partial, {"format": "mlx"})
        for name, weight in source.relayouted("MLX"):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Ones; the model file normalises without a weight.
                continue
            rounding.add(name, weight)
            if not weight.is_int4:
                # FP32 as everywhere, also where the checkpoint has its bias in BF16.
                values = weight.values.float() if group_of(name) == "router" else weight.values
                shards.add(name, values)
                continue
            base = name.removesuffix(".weight")
            for kind, tensor in zip(("weight", "scales", "biases"), affine(weight), strict=True):
                shards.add(f"{base}.{kind}", tensor)
        shards.close()
        shutil.copyfile(Path(__file__).with_name(MODEL_FILE), partial / MODEL_FILE)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        source.save_tokenizer(partial)
        packages = ("mlx", "mlx-lm")
        source.save_report(partial, "mlx", rounding, packages, lambda: mlx_parity(source, partial), command=command)
    return source.output_dir


def affine(weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    An INT4 weight as MLX's words, scales and biases, with groups along the last dimension.

    Experts that are grouped along their output come as `(E, out, in)` and leave as `(E, in, out)`.
    """
    if weight.group_dim == -2:
        weight = weight.transpose()
    words = (pack_int4(weight.values.contiguous()) ^ 0x88).view(torch.uint32)
    return words, weight.scale, Int4Format.qmin * weight.scale


def mlx_parity(source: Source, directory: Path) -> LogitAgreement | str:
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ModuleNotFoundError:
        return "not compared: mlx-lm is not installed"

    def load() -> Callable[[list[int]], torch.Tensor]:
        model, _ = load_model(directory, trust_remote_code=True)
        # In half precision MLX sums in it on a CPU.
        model.set_dtype(mx.float32)
        return lambda tokens: torch.tensor(model(mx.array([tokens]))[0].tolist())

    result = source.parity(sum(path.stat().st_size for path in directory.glob("*.safetensors")), load)
    # Python compiled the model file into the directory.
    shutil.rmtree(directory / "__pycache__", ignore_errors=True)
    return result
