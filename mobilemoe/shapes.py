"""
The built-in shapes (the paper's three sizes and its dense baseline) and the paper's published measurements.

As `.pte` programs, all shapes use the same operators and runtime. The dense baseline is exported as a MobileMoE
without routed experts, whose shared expert is the feed-forward network. Its matrices have the sizes of MobileLLM-Pro;
RoPE and the norm of queries and keys are those of MobileMoE.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, PretrainedConfig

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig


def shapes() -> dict[str, PretrainedConfig]:
    medium: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 512, "intermediate_size_mlp": 2048}
    large: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 640, "intermediate_size_mlp": 2560}
    # https://arxiv.org/abs/2511.06719. Its local attention is full attention here; the two are equal up to 512 tokens.
    dense: dict[str, Any] = {
        "hidden_size": 1280,
        "intermediate_size": 6144,
        "num_hidden_layers": 30,
        "vocab_size": 202048,
    }
    return {
        "S": MobileMoEConfig(),
        "M": MobileMoEConfig(**medium, num_hidden_layers=26, num_attention_heads=16),
        "L": MobileMoEConfig(**large, num_hidden_layers=32, num_attention_heads=20),
        "MobileLLM-Pro": LlamaConfig(
            **dense,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
    }


def program_config(config: PretrainedConfig) -> MobileMoEConfig:
    """The config for export. A dense shape uses the shared expert as feed-forward; its routed experts are skipped."""
    if isinstance(config, MobileMoEConfig):
        return config
    return MobileMoEConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size_mlp=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_local_experts=1,
        num_experts_per_tok=1,
        intermediate_size=32,
    )


@cache
def published() -> dict:
    """The parsed `published.yaml`: speed and memory on phones, as the paper reports them. Do not modify it."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


def published_speeds() -> Iterator[tuple[str, str, int, dict[str, float]]]:
    """Yields device, model, tokens, and the speeds that the paper measured."""
    for device, tables in published()["devices"].items():
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for key, factor, name in (
            ("prefill_tokens_per_s", 1, "prefill_tokens_per_s"),
            ("first_token_s", 1e3, "first_token_ms"),
            ("decode_tokens_per_s", 1, "decode_tokens_per_s"),
        ):
            for model, values in tables.get(key, {}).items():
                for length, value in values.items():
                    rows.setdefault((model, length), {})[name] = factor * value
                    if key == "first_token_s":
                        rows[model, length]["prefill_tokens_per_s"] = length / value
        for (model, length), row in sorted(rows.items()):
            yield device, model, length, row
