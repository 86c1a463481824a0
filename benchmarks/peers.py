"""Configs for benchmarks: MobileMoE with the S shape, and transformers' OLMoE and Qwen3-MoE at the same sizes."""

from transformers import OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from modeling_mobilemoe import MobileMoEConfig


def peer_configs(num_layers: int, vocab_size: int = 1024) -> dict[str, PreTrainedConfig]:
    """
    Configs by model type, with the same number of weights and of multiplications per token.

    OLMoE and Qwen3-MoE have no shared expert. They get 64 experts with 8 active, in place of 60 with 4 active and a
    shared one of four times the width.
    """
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 768,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return {
        "mobilemoe": MobileMoEConfig(**shape),
        "olmoe": OlmoeConfig(**shape, **experts, intermediate_size=384, pad_token_id=0),
        "qwen3_moe": Qwen3MoeConfig(**shape, **experts, moe_intermediate_size=384, head_dim=64),
    }
