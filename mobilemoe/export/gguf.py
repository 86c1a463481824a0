"""Checkpoint -> directory with `model.gguf` for llama.cpp as it is, and `export.json`.

llama.cpp has no MobileMoE, but its `exaone-moe` computes the same function after [`relayout`]. Its Q4_0 is our INT4
grid along the input: blocks of 32 with an FP16 scale. Linears, the embedding and experts grouped along their input go
through without rounding; llama.cpp has no type for experts grouped along their output, which go to 8 bits or BF16.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format, quantize_tensor
from modeling_mobilemoe.modeling_mobilemoe import compute_rope, default_inv_freq

from ..artifacts import LogitAgreement
from .relayout import Weight
from .source import Rounding, Source, group_of, plan


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap

GGUF_FILE = "model.gguf"
WEIGHTS = ("f32", "bf16", "q4_0")
EXPERT_WEIGHTS = ("q8_0", "bf16")
# What llama.cpp's "llama-bpe" splits by; it knows splits by name only.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def export_gguf(
    model: str | Path,
    output_dir: str | Path,
    weights: str | None = None,
    expert_weights: str | None = None,
    command: str | None = None,
) -> Path:
    """
    Writes a checkpoint as `output_dir/model.gguf`, and what became of its weights to `export.json`.

    Args:
        model (`str` or `Path`): directory or Hub id, packed or full precision.
        output_dir (`str` or `Path`): created by this call; must not exist.
        weights (`str`, *optional*): type of the matrices, "f32", "bf16" or "q4_0". The one that loses nothing when
            absent: "q4_0" for a packed checkpoint, else the type that it is stored in. "q4_0" rounds a full-precision
            checkpoint by the paper's rule, with experts along their input.
        expert_weights (`str`, *optional*): with "q4_0", type of packed experts grouped along their output, which Q4_0
            cannot hold: "q8_0" when absent, or "bf16".
        command (`str`, *optional*): the command line that asked for this, for `export.json`.

    Raises:
        ValueError: for a request that cannot be met, a damaged checkpoint, or a disk that is too small. Nothing is
            written then.
    """
    from gguf import GGUFWriter
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.quants import dequantize

    if Path(output_dir).suffix == ".gguf":
        raise ValueError(
            f"--output {output_dir} is made a directory, with {GGUF_FILE} and export.json in it. "
            "Name it without the suffix."
        )
    for name, value, legal in (("weights", weights, WEIGHTS), ("expert_weights", expert_weights, EXPERT_WEIGHTS)):
        if value is not None and value not in legal:
            raise ValueError(f"{name}={value!r} is not written here. Set {' or '.join(legal)}.")
    source = Source(model, output_dir)
    types = Types(source, weights, expert_weights)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH.EXAONE_MOE])
    add_model(writer, source.config)
    add_tokenizer(writer, source)
    add_description(writer, source, types.weights)
    factors = rope_factors(source.config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    size = add_weights(writer, source, types)
    rounding = Rounding()
    with source.directory(size) as partial:
        try:
            writer.write_header_to_file(partial / GGUF_FILE)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.write_tensor_data(factors)
            for name, weight in source.relayouted(GGUF_FILE):
                names, kind = types.placed(name)
                stored = types.stored(weight, kind)
                rounding.add(name, weight, torch.from_numpy(dequantize(stored, kind)))
                for _ in names:
                    writer.write_tensor_data(stored)
        finally:
            if writer.fout:
                writer.close()
        source.save_report(
            partial,
            "gguf",
            rounding,
            ("gguf", "llama_cpp_python"),
            lambda: llama_cpp_parity(source, partial / GGUF_FILE),
            weights=types.weights,
            expert_weights=types.experts.name.lower(),
            command=command,
        )
    return source.output_dir


class Types:
    """
    The GGUF types of a checkpoint's weights, and the names under which the file holds them.

    Raises:
        ValueError: for `expert_weights` where it would have no effect.
    """

    def __init__(self, source: Source, weights: str | None, expert_weights: str | None):
        from gguf import GGMLQuantizationType, get_tensor_name_map
        from gguf.constants import MODEL_ARCH

        if weights is None:
            weights = "q4_0" if source.is_int4 else "bf16" if source.dtype == torch.bfloat16 else "f32"
        if expert_weights is not None and (weights != "q4_0" or source.expert_axis != "output"):
            raise ValueError(
                f"expert_weights={expert_weights!r} is for packed experts grouped along their output in a file of "
                f"q4_0; here all matrices are {weights}. Leave it out."
            )
        self.weights = weights
        self.matrices = self.experts = GGMLQuantizationType[weights.upper()]
        if weights == "q4_0" and source.expert_axis == "output":
            self.experts = GGMLQuantizationType[(expert_weights or "q8_0").upper()]
        self.vectors = GGMLQuantizationType.F32
        self.names = get_tensor_name_map(MODEL_ARCH.EXAONE_MOE, source.config.num_hidden_layers)

    def placed(self, name: str) -> "tuple[list[str], GGMLQuantizationType]":
        """The names of a weight in the file, and its type there."""
        names = tensor_names(name, self.names)
        group = group_of(name)
        if group in ("norms", "router"):
            return names, self.vectors
        return names, self.experts if group == "experts" else self.matrices

    def stored(self, weight: Weight, kind: "GGMLQuantizationType") -> np.ndarray:
        """The bytes of a weight in the file."""
        from gguf.quants import quantize

        if kind.name == "Q4_0":
            return q4_0_blocks(weight)
        return quantize(weight.float().contiguous().numpy(), kind)


def tensor_names(name: str, names: "TensorNameMap") -> list[str]:
    """The names of a weight in the file. The embedding is the head too, and has two."""
    # llama.cpp calls the bias one, with a dot.
    base, _, suffix = name.replace("correction_bias", "correction.bias").rpartition(".")
    stored = f"{names.get_name(base)}.{suffix}"
    # The loader's own fallback to a tied head never runs.
    return [stored, "output.weight"] if stored == "token_embd.weight" else [stored]


def add_weights(writer: "GGUFWriter", source: Source, types: Types) -> int:
    """
    Declares every weight, and returns the bytes of all.

    Raises:
        ValueError: for a width that a type's blocks do not divide.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quant_shape_to_byte_shape

    size = 0
    for name, weight in plan(source.config):
        names, kind = types.placed(name)
        row, block = weight.values.shape[-1], GGML_QUANT_SIZES[kind][0]
        if row % block:
            raise ValueError(
                f"{name} has rows of {row} numbers, and {kind.name.lower()} stores blocks of {block}. "
                "Set weights='bf16'."
            )
        num_bytes = int(np.prod(quant_shape_to_byte_shape(weight.values.shape, kind), dtype=np.int64))
        for stored_name in names:
            writer.add_tensor_info(stored_name, weight.values.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
            size += num_bytes
    return size


def q4_0_blocks(weight: Weight) -> np.ndarray:
    """
    Blocks of Q4_0, `(..., n / 32 * 18)` bytes: an FP16 scale, then 16 bytes with elements i and i + 16 of 32.

    A full-precision weight is rounded to the grid first.
    """
    values, scale = weight.values, weight.scale
    if scale is None:
        values, scale = quantize_tensor(weight.values)
    # The released files have elements 2i and 2i + 1 in a byte, in two's complement; here they count from -8.
    groups = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2, Int4Format.group_size // 2))
    nibbles = groups[..., 0, :] | groups[..., 1, :] << 4
    scale_bytes = scale.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat((scale_bytes, nibbles), dim=-1).flatten(-2).contiguous().numpy()


def rope_factors(config: MobileMoEConfig) -> np.ndarray:
    """
    By what llama.cpp divides the plain rotary frequencies, FP32 `(head_dim / 2,)`.

    Raises:
        ValueError: for a frequency of zero.
    """
    inv_freq, _ = compute_rope(config)
    if not inv_freq.all():
        raise ValueError(
            "rope_scaling leaves some channels unrotated, by which llama.cpp would divide. Set partial_rotary_factor "
            "to 1.0, or export with --to pte."
        )
    return (default_inv_freq(config) / inv_freq).numpy()


def add_model(writer, config: MobileMoEConfig) -> None:
    from gguf import RopeScalingType

    add_sizes(writer, config)
    add_experts(writer, config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_theta)
    # The factors of rope_freqs.weight say it all.
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    # Only layers with a sliding window rotate. A pattern of 0 makes all layers such, and the window spans the context.
    # As a list of layers older loaders drop it without a word.
    writer.add_sliding_window(config.max_position_embeddings)
    writer.add_sliding_window_pattern(0)


def add_sizes(writer, config: MobileMoEConfig) -> None:
    """What a model has with or without experts."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)


def add_experts(writer, config: MobileMoEConfig) -> None:
    from gguf import ExpertGatingFuncType

    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(1)
    writer.add_expert_shared_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(True)


def add_tokenizer(writer, source: Source) -> None:
    """
    Raises:
        ValueError: for a tokenizer that llama.cpp would not split text like.
    """
    from gguf import TokenType

    file = source.path / "tokenizer.json"
    content = json.loads(file.read_text())
    model, splits = content["model"], content["pre_tokenizer"] or {}
    patterns = [split["pattern"].get("Regex") for split in splits.get("pretokenizers", []) if split["type"] == "Split"]
    if model["type"] != "BPE" or content["normalizer"] is not None or patterns != [LLAMA3_SPLIT]:
        raise ValueError(
            f"{file} is not the byte-level BPE with the splits of Llama 3 that every MobileMoE release has, and "
            "llama.cpp knows splits by name only: it would give other tokens. Put the model's own tokenizer beside it."
        )
    tokens = [f"[PAD{i}]" for i in range(source.config.vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    for token, index in source.tokenizer.get_vocab().items():
        if index >= len(tokens):
            raise ValueError(
                f"{file} has the id {index} for {token!r}, the model has {len(tokens)} tokens. "
                "Put the tokenizer.json that belongs to this checkpoint beside it."
            )
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    # Both split as Llama 3 does. The first takes a word that is a token as it is, as Llama 3; the second merges.
    writer.add_tokenizer_pre("llama-bpe" if model.get("ignore_merges") else "smaug-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    tokenizer = source.tokenizer
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    # Three keys end a generation. The end of a turn is not known by its name there, so it needs one.
    vocabulary, ends = tokenizer.get_vocab(), list(source.eos_ids)
    keys = (
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, vocabulary.get("<|eot|>")),
        (writer.add_eom_token_id, vocabulary.get("<|eom|>")),
    )
    for add, index in keys:
        if index in ends:
            add(index)
            ends.remove(index)
    if ends:
        raise ValueError(
            f"The ids {ends} end a sequence according to this checkpoint, and a GGUF names three ends: "
            "eos, <|eot|> and <|eom|>. Remove them from eos_token_id of config.json and generation_config.json."
        )
    if tokenizer.chat_template is not None:
        writer.add_chat_template(without_generation_tags(tokenizer.chat_template))


def without_generation_tags(chat_template: str) -> str:
    """
    Replaces the tags that mark what an assistant writes by comments, which trim white space as the tags do.

    They are an extension of transformers' (`return_assistant_tokens_mask`), and an error for other readers of Jinja.
    """
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", chat_template)


def add_description(writer, source: Source, weights: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(Path(source.model).resolve().name)
    types = {"f32": LlamaFileType.ALL_F32, "bf16": LlamaFileType.MOSTLY_BF16, "q4_0": LlamaFileType.MOSTLY_Q4_0}
    writer.add_file_type(types[weights])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    licence = source.licence
    for key, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if key in licence:
            add(licence[key])


def llama_cpp_parity(source: Source, file: Path) -> LogitAgreement | str:
    try:
        from llama_cpp import GGML_TYPE_F32, Llama
    except ModuleNotFoundError:
        return "not compared: llama-cpp-python is not installed"

    def load() -> Callable[[list[int]], torch.Tensor] | str:
        # Its cache is FP16 by default, which would hide a difference in the weights.
        cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
        try:
            llama = Llama(str(file), n_ctx=64, logits_all=True, n_gpu_layers=0, verbose=False, **cache)
        except ValueError as error:
            # Of a version without exaone-moe; the file may be meant for another one.
            return f"not compared: the llama.cpp that is installed here does not load it ({error})"

        def logits(tokens: list[int]) -> torch.Tensor:
            llama.reset()
            llama.eval(tokens)
            return torch.from_numpy(llama.scores[: len(tokens)].copy())

        return logits

    return source.parity(file.stat().st_size, load)
