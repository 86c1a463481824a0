"""
Compares exports of `mobilemoe export --to` in llama.cpp, MLX and transformers' Glm4Moe with the checkpoint.

    pip install 'mobilemoe[gguf,mlx]' llama-cpp-python
    python benchmarks/bench_anywhere.py --model out/demo/3-sft out/demo/4-qat --text out/demo/data/chat.heldout.jsonl

For every checkpoint and every installed runtime it reports: the largest difference of logits over 512 positions,
relative to the largest logit; bits per byte of the text in the runtime and in PyTorch (FP32); and how many of five
continuations of 100 tokens are equal, two of them chats. The runtimes use an FP32 cache, and FP32 activations where
possible. One JSON line last.
"""

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from mobilemoe.artifacts import EXPORT_FILE, RuntimeExport
from mobilemoe.eval.agreement import text_agreement
from mobilemoe.export.gguf import export_gguf
from mobilemoe.export.glm4_moe import export_glm4_moe
from mobilemoe.export.mlx import export_mlx
from mobilemoe.generation import LanguageModel
from mobilemoe.machine import machine, package_versions
from mobilemoe.runtime import CheckpointModel


POSITIONS, NEW_TOKENS, MAX_TOKENS = 512, 100, 8192
PROMPTS = (
    ("import json", False),
    ("def read(self):\n    ", False),
    ("Return a list of", False),
    ("Write the docstring of `def close(self):`", True),
    ("Write the function `def add(self, item):`", True),
)


class LlamaCppModel(LanguageModel):
    """A GGUF file with the checkpoint's tokenizer; FP32 cache."""

    def __init__(self, directory: Path, reference: CheckpointModel):
        import llama_cpp

        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        options = {"n_ctx": reference.max_seq_len, "logits_all": True, "n_gpu_layers": 0, "verbose": False}
        self.llama = llama_cpp.Llama(str(directory / "model.gguf"), **options, **cache)
        self.tokenizer, self.max_seq_len, self.eos_ids = reference.tokenizer, reference.max_seq_len, reference.eos_ids

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        if start == 0:
            self.llama.reset()
        self.llama.eval(tokens)
        return torch.from_numpy(self.llama.scores[: self.llama.n_tokens][-num_positions:].copy())

    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        self.llama.reset()
        self.llama.eval(tokens)
        return torch.from_numpy(self.llama.scores[: len(tokens)].copy())


class MlxModel(LanguageModel):
    """An MLX directory with FP32 activations."""

    def __init__(self, directory: Path, reference: CheckpointModel):
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self.mx, self.make_cache = mx, make_prompt_cache
        self.model, _ = load_model(directory, trust_remote_code=True)
        self.model.set_dtype(mx.float32)
        self.tokenizer, self.max_seq_len, self.eos_ids = reference.tokenizer, reference.max_seq_len, reference.eos_ids

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        if start == 0:
            self.cache = self.make_cache(self.model)
        return torch.tensor(self.model(self.mx.array([tokens]), cache=self.cache)[0, -num_positions:].tolist())

    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(self.model(self.mx.array([tokens]))[0].tolist())


def compare(model: LanguageModel, reference: CheckpointModel, text: str) -> dict:
    length = min(POSITIONS, reference.max_seq_len)
    tokens = reference.encode(text)[:length]
    expected, actual = reference.all_logits(tokens), model.all_logits(tokens)
    row = {
        "positions": len(tokens),
        "difference": ((actual - expected).abs().max() / expected.abs().max()).item(),
    }
    agreement = text_agreement(model, reference, text, MAX_TOKENS)
    row |= agreement.model_dump(include={"bits_per_byte", "reference_bits_per_byte", "top1"})
    equal = 0
    for prompt, chat in PROMPTS:
        prompt_tokens = reference.encode(prompt, chat=chat and reference.tokenizer.chat_template is not None)
        continuations = [list(either.generate(prompt_tokens, NEW_TOKENS)) for either in (model, reference)]
        equal += continuations[0] == continuations[1]
    return row | {"equal_continuations": equal, "of": len(PROMPTS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="checkpoint directories with a chat template")
    parser.add_argument("--text", required=True, help="held-out text file")
    parser.add_argument(
        "--gguf-weights", nargs="+", default=[None], help="quantisation types to export in addition to the default"
    )
    arguments = parser.parse_args()
    text = Path(arguments.text).read_text()
    rows = {}
    for name in arguments.model:
        reference = CheckpointModel(name, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as scratch:
            if find_spec("llama_cpp"):
                for weights in dict.fromkeys([None, *arguments.gguf_weights]):
                    directory = export_gguf(name, Path(scratch) / f"gguf-{weights}", weights)
                    kind = RuntimeExport.load(directory / EXPORT_FILE).weights
                    rows[f"{name} gguf {kind}"] = compare(LlamaCppModel(directory, reference), reference, text)
            if find_spec("mlx_lm"):
                directory = export_mlx(name, Path(scratch) / "mlx")
                rows[f"{name} mlx"] = compare(MlxModel(directory, reference), reference, text)
            directory = export_glm4_moe(name, Path(scratch) / "glm4_moe")
            rows[f"{name} glm4_moe"] = compare(CheckpointModel(directory, torch.float32), reference, text)
    for name, row in rows.items():
        print(f"{name:40s} {row}")
    versions = package_versions(("torch", "transformers", "llama_cpp_python", "gguf", "mlx", "mlx-lm"))
    print(json.dumps({"rows": rows, "versions": versions, "machine": machine()}))


if __name__ == "__main__":
    main()
