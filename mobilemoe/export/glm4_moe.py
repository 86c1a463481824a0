"""Checkpoint -> directory in the `glm4_moe` format, which transformers, vLLM and SGLang have built in."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig

from ..artifacts import LogitAgreement
from .source import Rounding, Shards, Source, group_of, plan


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_glm4_moe(
    model: str | Path, output_dir: str | Path, weights: str | None = None, command: str | None = None
) -> Path:
    """
    Writes a checkpoint as a full-precision one of `Glm4MoeForCausalLM`.

    Args:
        model (`str` or `Path`): directory or Hub id. A packed checkpoint is dequantised: these runtimes have no INT4
            kernels for its grid.
        output_dir (`str` or `Path`): created by this call; must not exist.
        weights (`str`, *optional*): "bf16" or "fp32"; as stored when absent, "bf16" for a packed checkpoint, whose
            weights "fp32" keeps exactly.
        command (`str`, *optional*): the command line that asked for this, for `export.json`.

    Raises:
        ValueError: for a request that cannot be met, a damaged checkpoint, or a disk that is too small. Nothing is
            written then.
    """
    if weights is not None and weights not in DTYPES:
        raise ValueError(f"weights={weights!r} is not written here. Set {' or '.join(DTYPES)}.")
    source = Source(model, output_dir)
    dtype = DTYPES[weights] if weights else torch.bfloat16 if source.is_int4 else source.dtype
    config = glm4_moe_config(source.config, source.eos_ids, dtype)

    rounding = Rounding()
    size = sum(weight.values.numel() for _, weight in plan(source.config)) * dtype.itemsize
    with source.directory(size) as partial:
        shards = Shards(partial, {"format": "pt"})
        for name, weight in source.relayouted("glm4_moe"):
            stored = weight.float() if group_of(name) == "router" else weight.float().to(dtype)
            rounding.add(name, weight, stored.float())
            for stored_name, tensor in unstacked(name, stored):
                shards.add(stored_name, tensor)
        shards.close()
        config.save_pretrained(partial)
        # transformers writes it among the `rope_parameters` only; older runtimes read it here.
        stored_config = json.loads((partial / "config.json").read_text()) | {"partial_rotary_factor": 1.0}
        (partial / "config.json").write_text(json.dumps(stored_config, indent=2) + "\n")
        source.save_tokenizer(partial)
        name = next(key for key, value in DTYPES.items() if value == dtype)
        source.save_report(
            partial,
            "glm4_moe",
            rounding,
            (),
            lambda: transformers_parity(source, partial),
            weights=name,
            command=command,
        )
    return source.output_dir


def glm4_moe_config(config: MobileMoEConfig, eos_ids: list[int], dtype: torch.dtype) -> Glm4MoeConfig:
    """
    Raises:
        ValueError: when the shared expert is not as wide as some whole number of routed ones.
    """
    if config.intermediate_size_mlp % config.intermediate_size:
        raise ValueError(
            f"intermediate_size_mlp={config.intermediate_size_mlp} is no multiple of intermediate_size="
            f"{config.intermediate_size}, and glm4_moe counts its shared experts in routed ones. Use --to gguf or mlx."
        )
    return Glm4MoeConfig(
        architectures=["Glm4MoeForCausalLM"],
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        # Of dense layers, which there are none of.
        intermediate_size=config.intermediate_size_mlp,
        moe_intermediate_size=config.intermediate_size,
        n_shared_experts=config.intermediate_size_mlp // config.intermediate_size,
        n_routed_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        routed_scaling_factor=config.routed_scaling_factor,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        use_qk_norm=True,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        # The class rotates half of a head unless it is told.
        partial_rotary_factor=1.0,
        rope_parameters={**config.rope_scaling, "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=eos_ids,
    )


def unstacked(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor by its names on disk, where every expert is a module of its own."""
    if group_of(name) != "experts":
        return [(name, tensor)]
    prefix, projection = name.split(".experts.")
    return [(f"{prefix}.experts.{index}.{projection}", expert) for index, expert in enumerate(tensor)]


def transformers_parity(source: Source, directory: Path) -> LogitAgreement | str:
    def load() -> Callable[[list[int]], torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        return torch.no_grad()(lambda tokens: model(torch.tensor([tokens]), use_cache=False).logits[0].float())

    return source.parity(sum(path.stat().st_size for path in directory.glob("*.safetensors")), load)
