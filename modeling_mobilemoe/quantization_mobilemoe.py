"""The released INT4 format `mobilemoe-int4-g32` as a quantization method of transformers.

[`quantize`] packs a full-precision model and [`dequantize`] expands it again. [`MobileMoEInt4Quantizer`] lets
`from_pretrained` and `save_pretrained` handle packed checkpoints. The number grid is in `int4_mobilemoe.py`, the
packed modules are in `packed_mobilemoe.py` and `fused_mobilemoe.py`.
"""

import math
import re
import warnings
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .fused_mobilemoe import Int4AttentionInputs, Int4DecoderLayer, Int4FeedForward
from .int4_mobilemoe import Int4Format, dequantize_tensor, pack_int4, quantize_tensor
from .packed_mobilemoe import Int4Embedding, Int4Experts, Int4Head, Int4Linear, Int4Module


logger = logging.get_logger(__name__)

# The block of the released config.json files.
INT4_BLOCK = Int4Format().block
# Stored in BF16. The router is stored in FP32, and all other tensors are packed.
BF16_SUFFIXES = ("norm.weight", "expert_bias")
# Each full-precision parameter and the two tensors that store it packed.
PACKED_NAMES = {
    "weight": ("qweight", "weight_scale"),
    "gate_up_proj": ("gate_up_qweight", "gate_up_scale"),
    "down_proj": ("down_qweight", "down_scale"),
}


def modules_to_pack(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linears, the embedding and the experts by name, but not the head, which is tied to the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, nn.Embedding)) and module is not model.get_output_embeddings())
        or "gate_up_proj" in dict(module.named_parameters(recurse=False))
    }


def _packed_twin(module: nn.Module, dtype: torch.dtype, int4_format: Int4Format) -> Int4Module:
    """The packed module, not loaded yet, that replaces `module`."""
    if isinstance(module, nn.Linear):
        return Int4Linear(module.in_features, module.out_features)
    if isinstance(module, nn.Embedding):
        return Int4Embedding(module.num_embeddings, module.embedding_dim, dtype)
    num_experts, hidden_dim, width = module.get_parameter("gate_up_proj").shape
    act_fn = module.get_submodule("act_fn")
    return Int4Experts(num_experts, hidden_dim, width // 2, act_fn, int4_format.expert_dim)


def check_values(model: PreTrainedModel) -> None:
    """Refuses a model with a tensor that no training writes, see [`check_tensor`]; not those on disk or sharded."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and type(tensor.data) is torch.Tensor:
            check_tensor(name, tensor)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: for scales that are not positive, or values that are not finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    is_scale = name.endswith("scale")
    # Reads a tensor once and makes no other. Both are NaN if one value is.
    low, high = tensor.aminmax()
    if not (low > (0 if is_scale else -math.inf) and high < math.inf):
        kind = "scales that are zero, negative or not finite" if is_scale else "values that are not finite"
        raise ValueError(
            f"{name} holds {kind}. The file is damaged, or its training diverged: fetch it again, or take an earlier "
            "checkpoint."
        )


def _pack_head(model: PreTrainedModel) -> None:
    """Points the output head at the packed embedding. A base model has no head and stays as it is."""
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(Int4Head(cast(Int4Embedding, model.get_input_embeddings())))
        # The packed head has no weight that transformers could tie.
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}


def _fuse(model: PreTrainedModel) -> None:
    """Puts modules in place that run one operator for several packed modules."""
    for name, module in list(model.named_modules()):
        # By name, as in a checkpoint: `modeling_mobilemoe.py` imports this file and not the other way round.
        if name.endswith(".feed_forward"):
            model.set_submodule(name, Int4FeedForward(module))
            layer_name = name.removesuffix(".feed_forward")
            model.set_submodule(layer_name, Int4DecoderLayer(model.get_submodule(layer_name)))
        elif name.endswith(".self_attn.inputs"):
            model.set_submodule(name, Int4AttentionInputs(module))


def _unfuse(model: PreTrainedModel, plain_model: PreTrainedModel) -> None:
    """Undoes [`_fuse`] with layers and feed-forward blocks of another model, whose own modules are dropped."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4FeedForward):
            block = plain_model.get_submodule(name)
            block.router, block.experts, block.shared_expert = module.router, module.experts, module.shared_expert
            block.expert_bias = module.expert_bias
            model.set_submodule(name, block)
        elif isinstance(module, Int4AttentionInputs):
            model.set_submodule(name, module.plain)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4DecoderLayer):
            layer = plain_model.get_submodule(name)
            for child_name, child in module.named_children():
                layer.set_submodule(child_name, child)
            model.set_submodule(name, layer)


class MobileMoEInt4Config(QuantizationConfigMixin):
    """The `quantization` block. There is only one grid: every key but the experts' axis has a single legal value."""

    expert_group_axis: str

    def __init__(self, quant_method: str = "mobilemoe", **block: Any):
        unknown = sorted(set(block) - set(INT4_BLOCK))
        if unknown:
            raise ValueError(
                f"The quantization block of config.json has the key {unknown[0]!r}, which this format does not know. "
                "Ignoring it could change every weight: remove it if it has no meaning."
            )
        for key, released in INT4_BLOCK.items():
            if key not in block:
                raise ValueError(
                    f"The quantization block of config.json lacks {key!r}, so its tensors cannot be read. "
                    f"Add {key!r}: {released!r} if the checkpoint is in the {INT4_BLOCK['format']} format."
                )
            legal = [Int4Format(axis).block[key] for axis in Int4Format.expert_axes]
            if not any(block[key] == value and type(block[key]) is type(value) for value in legal):
                raise ValueError(
                    f"The quantization block of config.json has {key}={block[key]!r}, which this format does not "
                    f"implement. Only {' or '.join(f'{key}={value!r}' for value in dict.fromkeys(legal))} can be read."
                )
        # An enum of transformers' own methods.
        self.quant_method = quant_method  # ty: ignore[invalid-assignment]
        for key, value in block.items():
            setattr(self, key, value)

    @property
    def int4_format(self) -> Int4Format:
        axes = {words: axis for axis, (_, words) in Int4Format.expert_axes.items()}
        return Int4Format(axes[self.expert_group_axis])


class MobileMoEInt4Quantizer(HfQuantizer):
    """Loads and saves packed checkpoints. `from_pretrained` selects it by the `quantization` block."""

    # Full-precision checkpoints are quantised by `quantize`, not during loading.
    requires_calibration = True
    quantization_config: MobileMoEInt4Config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        dtype = model.dtype
        for name, module in modules_to_pack(model).items():
            model.set_submodule(name, _packed_twin(module, dtype, self.quantization_config.int4_format))
        _pack_head(model)
        _fuse(model)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Another than BF16 was asked for: without a `dtype`, that of the config is taken.
        if dtype != torch.bfloat16:
            warnings.warn(
                f"Packed INT4 weights with dtype={dtype} are expanded for every use, which is many times slower than "
                "the CPU kernels, which take BF16. Leave dtype out, unless you train or compare exactly.",
                stacklevel=2,
            )
        return dtype

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        # The plans name the full-precision tensors. With them, packed tensors would stay whole on every rank and their
        # results would still be summed over ranks. Without a plan transformers refuses tp_size and ep_size.
        plan.clear()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_values(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return dequantize(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict = model.state_dict()
        for name, tensor in state_dict.items():
            # As released: norms and expert biases in BF16, the router in FP32, packed tensors unchanged.
            if name.endswith("router.weight"):
                state_dict[name] = tensor.float()
            elif name.endswith(BF16_SUFFIXES):
                state_dict[name] = tensor.bfloat16()
        return state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # With adapters (lora.py). Without them the trainer refuses a packed model.
        return True


def prepare_packed(model: PreTrainedModel) -> None:
    """Puts the modules of the config's `quantization` block in place. Their tensors are still to be loaded."""
    quantizer = MobileMoEInt4Quantizer(MobileMoEInt4Config(**model.config.quantization))
    quantizer.preprocess_model(model)
    # Annotated to hold modules and tensors only.
    model.hf_quantizer = quantizer  # ty: ignore[invalid-assignment]
    model.config.quantization_config = quantizer.quantization_config


def resize_packed_embedding(
    model: PreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> Int4Embedding:
    """
    As `resize_token_embeddings`, of a packed model: the rows that stay keep their bytes, and new rows are rounded to
    the grid.

    Raises:
        ValueError: as [`quantize_tensor`].
    """
    old = cast(Int4Embedding, model.get_input_embeddings())
    weight = dequantize_tensor(old.qweight, old.weight_scale, torch.float32)
    plain = nn.Embedding(old.num_embeddings, old.embedding_dim, _weight=weight)
    resized = model._get_resized_embeddings(plain, new_num_tokens, pad_to_multiple_of, mean_resizing).weight
    new = Int4Embedding(resized.shape[0], old.embedding_dim, old.output_dtype.dtype)
    quantized, scale = quantize_tensor(resized)
    tensors = {"qweight": pack_int4(quantized), "weight_scale": scale}
    kept = min(old.num_embeddings, new.num_embeddings)
    for name, tensor in tensors.items():
        tensor[:kept] = getattr(old, name)[:kept]
    new.load_state_dict(tensors, assign=True)
    model.set_input_embeddings(new)
    _pack_head(model)
    model.config.vocab_size = model.vocab_size = new.num_embeddings
    model.train(model.training)
    return new


def quantization_table(model: PreTrainedModel) -> str:
    """A table of how each tensor of a packed model is stored, with one line for the same tensor of all layers."""
    quantizer = cast(MobileMoEInt4Quantizer, model.hf_quantizer)
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head."):
            continue
        if name.endswith("qweight"):
            axis = quantizer.quantization_config.int4_format.expert_axis if "experts." in name else "input"
            stored, itemsize, parameters = f"INT4, groups of 32 along the {axis}", 1, 2 * tensor.numel()
        elif name.endswith("scale"):
            stored, itemsize, parameters = "float16, scales of the above", 2, 0
        elif name.endswith("router.weight"):
            stored, itemsize, parameters = "float32, not quantised", 4, tensor.numel()
        else:
            stored, itemsize, parameters = "bfloat16, not quantised", 2, tensor.numel()
        row = rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), stored), [0, 0, 0])
        row[:] = row[0] + 1, row[1] + parameters, row[2] + itemsize * tensor.numel()
    width = max(len(kind) for kind, _ in rows)
    lines = [f"{'tensor':{width}s}  {'tensors':>7s}  {'parameters':>13s}  {'bytes':>13s}  stored as"]
    for (kind, stored), (count, parameters, num_bytes) in rows.items():
        lines.append(f"{kind:{width}s}  {count:7d}  {parameters:13,d}  {num_bytes:13,d}  {stored}")
    totals = [sum(row[column] for row in rows.values()) for column in range(3)]
    lines.append(f"{'total':{width}s}  {totals[0]:7d}  {totals[1]:13,d}  {totals[2]:13,d}")
    return "\n".join(lines)


def quantize(model: PreTrainedModel, int4_format: Int4Format | None = None) -> PreTrainedModel:
    """
    Quantises a full-precision MobileMoE model to packed INT4, in place and module by module.

    Linears, experts and the tied embedding are packed. The router stays in FP32. Norms and expert biases are rounded
    to BF16, as the format stores them, so that the model in memory equals the one that `save_pretrained` writes. An
    FP32 model stays in FP32, exact and slow: load it from its file, or call `to(torch.bfloat16)`, for the kernels.
    [`quantization_table`] lists how each tensor is stored; the table is also logged at level INFO.

    Args:
        model (`PreTrainedModel`): full precision.
        int4_format (`Int4Format`, *optional*): defaults to the released one.

    Raises:
        ValueError: when the model is packed already, has LoRA adapters or values that are not finite, or a weight does
            not fit the grid. In the last case, and only then, the model is left partly packed: load it again.
    """
    if model.config.quantization is not None:
        raise ValueError("This model is INT4 already; quantising it twice would lose accuracy. Use it as it is.")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "This model has LoRA adapters, which the INT4 format cannot store: call `model.merge_and_unload()` first."
        )
    check_values(model)
    int4_format = int4_format or Int4Format()
    dtype = model.dtype
    modules = modules_to_pack(model)
    for name in tqdm(list(modules), desc="quantise to INT4", unit="module"):
        # Popped, so that its weights are freed before the next module is packed.
        module = modules.pop(name)
        parameters, tensors = dict(module.named_parameters(recurse=False)), {}
        twin = _packed_twin(module, dtype, int4_format)
        for parameter_name, (weight_name, scale_name) in PACKED_NAMES.items():
            if parameter_name in parameters:
                quantized, tensors[scale_name] = quantize_tensor(parameters[parameter_name], twin.group_dim)
                tensors[weight_name] = pack_int4(quantized)
        twin.load_state_dict(tensors, assign=True)
        model.set_submodule(name, twin)
    _pack_head(model)
    _fuse(model)
    # New modules are in training mode, where the kernels do not run.
    model.train(model.training)
    for name, tensor in model.state_dict().items():
        if name.endswith(BF16_SUFFIXES):
            tensor.copy_(tensor.bfloat16())
    model.config.quantization = int4_format.block
    model.config.quantization_config = MobileMoEInt4Config(**int4_format.block)
    # As `from_pretrained` sets them; torch annotates modules to hold modules and tensors only.
    model.hf_quantizer = MobileMoEInt4Quantizer(model.config.quantization_config)  # ty: ignore[invalid-assignment]
    model.is_quantized = True  # ty: ignore[invalid-assignment]
    logger.info(f"Quantised to INT4:\n{quantization_table(model)}")
    return model


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """
    Expands a packed model to plain parameters in the model's dtype, in place and module by module.

    Raises:
        ValueError: when the model is not packed.
    """
    if model.config.quantization is None:
        raise ValueError("This model is not packed, there is nothing to dequantise. Use it as it is.")
    dtype = model.dtype
    model.config.quantization = None
    cast(MobileMoEInt4Quantizer, model.hf_quantizer).remove_quantization_config(model)
    # A model on the meta device supplies the full-precision modules.
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Int4Module)}
    for name in tqdm(list(packed), desc="dequantise", unit="module"):
        module = packed.pop(name)
        # A checkpoint's tensors, of a module in tiles too.
        packed_tensors = module.state_dict()
        tensors = {
            parameter_name: dequantize_tensor(
                packed_tensors[weight_name], packed_tensors[scale_name], dtype, module.group_dim
            )
            for parameter_name, (weight_name, scale_name) in PACKED_NAMES.items()
            if weight_name in packed_tensors
        }
        plain = skeleton.get_submodule(name)
        plain.load_state_dict(tensors, assign=True)
        model.set_submodule(name, plain)
    _unfuse(model, skeleton)
    if model.get_output_embeddings() is not None:
        model.set_output_embeddings(skeleton.get_output_embeddings())
        del model._tied_weights_keys
        model.tie_weights()
        model.all_tied_weights_keys = skeleton.all_tied_weights_keys
    return model.train(model.training)


def register_int4_quantizer() -> None:
    """Makes the format known to `from_pretrained`."""
    # Assigned, because `register_quantizer` refuses a second registration: remote code may import this file again.
    # The type checker infers dictionaries of transformers' own methods.
    AUTO_QUANTIZATION_CONFIG_MAPPING["mobilemoe"] = MobileMoEInt4Config  # ty: ignore[invalid-assignment]
    AUTO_QUANTIZER_MAPPING["mobilemoe"] = MobileMoEInt4Quantizer  # ty: ignore[invalid-assignment]
