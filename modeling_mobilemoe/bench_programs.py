"""
The built-in shapes: the paper's three sizes and the dense model that it compares them with, with random INT4 weights.

As `.pte` programs all of them go through the same operators and the same runtime. The dense one is then a MobileMoE
without routed experts, whose shared expert is its feed-forward: the matrices are those of MobileLLM-Pro, rotation and
norm of its queries and keys are ours.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from .configuration_mobilemoe import MobileMoEConfig
from .fused_mobilemoe import Int4FeedForward
from .quantization_mobilemoe import INT4_BLOCK, MobileMoEInt4Config, MobileMoEInt4Quantizer


def shapes() -> dict[str, PretrainedConfig]:
    medium = {"hidden_size": 1024, "intermediate_size": 512, "intermediate_size_mlp": 2048}
    large = {"hidden_size": 1280, "intermediate_size": 640, "intermediate_size_mlp": 2560}
    # https://arxiv.org/abs/2511.06719. Its local attention is full attention here: the same up to 512 tokens.
    dense = {"hidden_size": 1280, "intermediate_size": 6144, "num_hidden_layers": 30, "vocab_size": 202048}
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
    """The shape as a MobileMoE; a dense one has its feed-forward as shared expert, and experts that are left out."""
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


def random_packed_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A BF16 model of this shape with random INT4 weights, built packed: it never exists in full precision."""
    block = MobileMoEInt4Config(**INT4_BLOCK)
    if isinstance(config, MobileMoEConfig):
        config.quantization, config.quantization_config = dict(INT4_BLOCK), block
    quantizer = MobileMoEInt4Quantizer(block)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer._process_model_before_weight_loading(model)
    model.to_empty(device="cpu")
    # What `from_pretrained` keeps in FP32.
    for module in model.modules():
        if isinstance(module, Int4FeedForward):
            module.router.float()
            module.expert_bias = module.expert_bias.float()
    # Its frequencies are no weights, so they are computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(generator=generator)
        elif name.endswith("scale"):
            # Of weights with the standard deviation 0.02, as initialised.
            tensor.uniform_(0.003, 0.006, generator=generator)
        elif name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("expert_bias"):
            tensor.zero_()
        else:
            tensor.normal_(std=0.02, generator=generator)
    model.hf_quantizer, model.is_quantized = quantizer, True
    return model.eval()


def write_random_program(config: PretrainedConfig, directory: str | Path, max_seq_len: int) -> None:
    """
    A directory with `model.pte` of this shape, as [`PteModel`] reads it but for the tokenizer.

    Raises:
        BuildError: when the operators do not compile here.
    """
    from .export import Stages, lower, metadata, program_operators
    from .exported_model import ExportModel, ProgramOptions
    from .kernels import load_executorch
    from .kernels.modules import MoEFFN

    load_executorch()
    is_dense = not isinstance(config, MobileMoEConfig)
    config = program_config(config)
    options = ProgramOptions(max_seq_len=max_seq_len, expert_bits=4)
    exportable = ExportModel(random_packed_model(config), options, None if is_dense else MoEFFN)
    program = lower(exportable, metadata(config, options, []), False, Stages())
    directory = Path(directory)
    directory.mkdir(parents=True)
    with open(directory / "model.pte", "wb") as file:
        program.write_to_file(file)
    config.save_pretrained(directory)
    report = {
        "moe_op": None if is_dense else MoEFFN.operator,
        "expert_bits": 4,
        "max_seq_len": max_seq_len,
        "kv_cache": options.kv_cache,
        "all_logits": False,
        "eos_ids": [],
        "experts_file": None,
        "operators": program_operators(program),
        "pte_bytes": (directory / "model.pte").stat().st_size,
    }
    (directory / "export.json").write_text(json.dumps(report, indent=2) + "\n")
