"""Good inputs, which the families damage, and how a case runs a command."""

import argparse
import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from toy_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe import cli
from mobilemoe.export.exporter import export_checkpoint
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, quantize

from .server import ROOT, WrongResult


TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])


SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 496,
    "eos_token_id": [497, 504],
}


class Inputs:
    """
    Good inputs in a directory: checkpoints with a tokenizer, a program, results.

    Args:
        directory (`Path`): where [`make_inputs`] was called.
    """

    def __init__(self, directory: Path):
        self.packed, self.full, self.program = (directory / name for name in ("packed", "full", "pte"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.packed)
        self.logits = {path.name: logits_of(path) for path in (self.full, self.packed)}
        self.evaluation = directory / "report.json"
        self.benchmark = next((ROOT / "model_cards/results").glob("*-bench.json"))
        self.device = next((ROOT / "mobilemoe/plan/devices").glob("*.json"))


def make_inputs(directory: Path) -> None:
    """In a process of its own: an export leaves threads behind, which a forked child would miss."""
    sources = (inspect.getsource(module) for module in (argparse, inspect))
    tokenizer = train_tokenizer(sources, SIZES["vocab_size"])
    tokenizer.chat_template = (ROOT / "modeling_mobilemoe/chat_template.jinja").read_text()
    torch.manual_seed(0)
    model = MobileMoEForCausalLM(MobileMoEConfig(**SIZES)).eval()
    model.save_pretrained(directory / "full", max_shard_size="100KB")
    quantize(model).save_pretrained(directory / "packed")
    for name in ("full", "packed"):
        tokenizer.save_pretrained(directory / name)
    export_checkpoint(directory / "packed", directory / "pte", max_seq_len=32, moe_op="llama")
    config = json.loads((directory / "packed/config.json").read_text())
    (directory / "report.json").write_text(json.dumps(evaluation(config)))


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(TOKENS).logits.float()


def evaluation(config: dict) -> dict:
    task = {"score": 0.5, "stderr": 0.01, "title": "ARC-Easy", "task": "arc_easy", "category": "commonsense"}
    task |= {"task_versions": {"arc_easy": 1}, "num_fewshot": 0, "metric": "acc", "num_documents": 10}
    task |= {"num_truncated": 0, "tokens_per_batch": 512, "seconds": 1.5, "all_metrics": {"acc": 0.5}, "subtasks": {}}
    task |= {"sources": {"metric": "paper"}, "fingerprint": "0" * 64, "data_revision": None}
    model = {"name": "model", "kind": "int4", "sha256": "0" * 64, "bytes": 1, "config": config}
    versions = {"torch": "2", "lm_eval": "0.4"}
    settings = {"suite": "foundation", "limit": None, "dtype": "auto", "apply_chat_template": False}
    report = {"created": "2026-01-01", "model": model, "tasks": {"arc_easy": task}, "left_out": [], "mean": 0.5}
    report |= {"settings": settings | {"seeds": {"random": 0}, "versions": versions}, "mean_stderr": 0.01}
    return report | {"machine": {"processor": "x", "cores": 2, "threads": 2}}


def command(*words: object, may_print: tuple[str, ...] = ()) -> Callable[[], None]:
    """A command line of ours, whose output is to have finite numbers, but for some words and those it was given."""

    def run() -> None:
        printed = StringIO()
        with redirect_stdout(printed):
            cli.main([str(word) for word in words])
        allowed = (*may_print, *map(str, words))
        for word in printed.getvalue().replace(",", " ").split():
            bare = word.strip("-+%:[]{}()").lower()
            if bare in ("nan", "inf", "infinity") and bare not in allowed:
                raise WrongResult(f"prints {word}: {printed.getvalue()[:300]}")

    return run


def generate_with(path: Path) -> Callable[[], None]:
    return command("run", "--model", path, "--prompt", "import os", "--max-new-tokens", 4)


def copied(path: Path, into: Path) -> Path:
    shutil.copytree(path, into / path.name)
    return into / path.name
