"""GGUF files with the same random integers and scales as the `.pte` of `random_program.py`, for bench_llama_cpp.py."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from mobilemoe.export.gguf import add_model, add_sizes, q4_0_blocks, rope_factors, tensor_names
from mobilemoe.export.random_program import random_packed_model
from mobilemoe.export.relayout import Weight, relayout
from mobilemoe.export.source import weights_of
from mobilemoe.shapes import program_config
from modeling_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format


def grouped_by_input(weight: Weight) -> Weight:
    """
    The same numbers with a scale per 32 inputs of an output, where experts have one per 32 outputs of an input.

    Raises:
        ValueError: when neighbouring inputs have different scales, so that Q4_0 cannot hold the numbers.
    """
    if not weight.is_int4 or weight.group_dim == -1:
        return weight
    tiles = weight.scale.unflatten(-1, (-1, Int4Format.group_size))
    if not torch.equal(tiles, tiles[..., :1].expand_as(tiles)):
        raise ValueError(
            "The scales of these experts differ between neighbouring inputs, and a block of Q4_0 has one scale. "
            "Use the experts of random_packed_model."
        )
    return replace(weight, scale=tiles[..., 0].repeat_interleave(Int4Format.group_size, -2), group_dim=-1)


def dense_weights(model: PreTrainedModel) -> Iterator[tuple[str, Weight]]:
    """Of a dense shape by the names of Llama, whose rotation is on adjacent pairs as ours: no row moves."""
    for name, weight in weights_of(model.state_dict(), model.config):
        name = name.replace("feed_forward.shared_expert.", "mlp.")
        if "feed_forward." not in name:
            yield name, weight


def moe_weights(model: PreTrainedModel) -> Iterator[tuple[str, Weight]]:
    for name, weight in weights_of(model.state_dict(), model.config):
        yield from relayout({name: weight}, model.config).items()


def write_random_gguf(config: PretrainedConfig, path: str | Path) -> None:
    """
    Writes a shape for llama.cpp, in Q4_0 with an FP32 router, without a tokenizer.

    A MobileMoE becomes `exaone-moe`, which computes the same function. A dense shape becomes `llama`: the same
    matrices, without our norm of queries and keys.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

    is_dense = not isinstance(config, MobileMoEConfig)
    arch = MODEL_ARCH.LLAMA if is_dense else MODEL_ARCH.EXAONE_MOE
    config = program_config(config)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    if is_dense:
        add_sizes(writer, config)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_rope_freq_base(config.rope_theta)
    else:
        add_model(writer, config)
    writer.add_tensor("rope_freqs.weight", rope_factors(config))
    writer.add_tokenizer_model("no_vocab")
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    model = random_packed_model(config)
    for name, weight in dense_weights(model) if is_dense else moe_weights(model):
        weight = grouped_by_input(weight)
        if weight.is_int4:
            stored, kind = q4_0_blocks(weight), GGMLQuantizationType.Q4_0
        else:
            stored, kind = weight.values.float().contiguous().numpy(), GGMLQuantizationType.F32
        for stored_name in tensor_names(name, names):
            writer.add_tensor(stored_name, np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
