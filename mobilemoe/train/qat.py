"""
INT4 quantization-aware training in two steps around any trainer, as in torchao:

    prepare(model)                      # fake-quantises weights to INT4 and inputs to INT8
    trainer.train()                     # its checkpoints are ordinary full-precision ones
    convert(model).save_pretrained(directory)

Training sees the numbers of the program that will run: fake_quantization.py has them.
"""

import re

import torch
from torch import nn
from torchao.quantization.qat import FakeQuantizedLinear, FakeQuantizerBase
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoEExperts,
    MobileMoEPreTrainedModel,
    MobileMoERMSNorm,
    MobileMoERouter,
)
from modeling_mobilemoe.quantization_mobilemoe import modules_to_pack, quantize

from .fake_quantization import (
    GRID_NAMES,
    GRIDS,
    Bf16FakeQuantizer,
    FakeQuantizedEmbedding,
    FakeQuantizedExperts,
    FakeQuantizedHead,
    FakeQuantizedRMSNorm,
    Int4FakeQuantizer,
    activation_grid,
    bf16_values,
)


logger = logging.get_logger(__name__)

MERGE_FIRST = "Merge LoRA adapters first (`model = model.merge_and_unload()`) and undo other changes to the model."


def _as_class(module: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    """
    A module of another class that shares its parameters, submodules and hooks with `module`.

    A constructor would allocate weights, and torch has no function that transfers hooks. This is what `copy.copy` does
    (https://docs.python.org/3/library/pickle.html#object.__setstate__), for another class.
    """
    shared = new_class.__new__(new_class)
    shared.__setstate__(module.__getstate__())
    return shared


def prepare(
    model: PreTrainedModel, int4_format: Int4Format | None = None, activations: str | None = None
) -> PreTrainedModel:
    """
    Fake-quantises a model in place: weights to the packed checkpoint's values, their inputs to INT8.

    Linears become torchao's `FakeQuantizedLinear`. Parameters keep their names and full precision, so checkpoints
    saved before [`convert`] are ordinary ones. Norms are rounded to BF16 in the forward pass, expert biases only here.
    The router stays as it is. [`preparation_table`] shows how each parameter is quantised.

    Args:
        model (`PreTrainedModel`): full precision, LoRA adapters merged.
        int4_format (`Int4Format`, *optional*): the released one when absent.
        activations (`str`, *optional*): the grid of inputs, see fake_quantization.py: "mobilemoe", "per_token" or
            "none". When absent, that of the operators which read the format: ours, or ExecuTorch's with experts
            grouped along their inputs.

    Raises:
        ValueError: when the packed checkpoint would lack a tensor of the model, or no program has the grid.
    """
    int4_format = int4_format or Int4Format()
    linear_grid, expert_grid = GRIDS[activation_grid(activations, int4_format)]
    check_complete(model, int4_format)
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            tensor.copy_(bf16_values(tensor))
    head = model.get_output_embeddings()
    last_norm = model.base_model.norm if head is not None else None
    for name, module in list(model.named_modules()):
        # Class, fake quantizers of the weight and of the inputs of packed weights (the norm: its outputs).
        if isinstance(module, MobileMoEExperts):
            row = FakeQuantizedExperts, Int4FakeQuantizer(int4_format, int4_format.expert_dim), expert_grid()
        elif isinstance(module, MobileMoERMSNorm):
            row = FakeQuantizedRMSNorm, Bf16FakeQuantizer(), linear_grid() if module is last_norm else nn.Identity()
        elif isinstance(module, nn.Embedding):
            row = FakeQuantizedEmbedding, Int4FakeQuantizer(int4_format), nn.Identity()
        elif module is head:
            row = FakeQuantizedHead, Int4FakeQuantizer(int4_format), nn.Identity()
        elif isinstance(module, nn.Linear):
            row = FakeQuantizedLinear, Int4FakeQuantizer(int4_format), linear_grid()
        else:
            continue
        new_class, weight_fake_quantizer, activation_fake_quantizer = row
        module = _as_class(module, new_class)
        module.weight_fake_quantizer = weight_fake_quantizer
        module.activation_fake_quantizer = activation_fake_quantizer
        model.set_submodule(name, module)
    logger.info(f"Prepared for quantization-aware training:\n{preparation_table(model)}")
    return model


def _check_same(kind: str, found: dict[str, object], expected: dict[str, object]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        there, wanted = (type(side[name]).__name__ if name in side else "missing" for side in (found, expected))
        if there != wanted:
            raise ValueError(
                f"The {kind} {name} is {there}, in a plain model it is {wanted}: it would be left out of the INT4 "
                f"checkpoint. {MERGE_FIRST}"
            )


def check_complete(model: PreTrainedModel, int4_format: Int4Format) -> None:
    """
    Refuses a model that the packed checkpoint cannot hold completely.

    Raises:
        ValueError: for adapters, replaced modules, an untied head, or a size that the group size does not divide.
    """
    if not isinstance(model, MobileMoEPreTrainedModel):
        raise ValueError(f"prepare needs a MobileMoE model but got a {type(model).__name__}. {MERGE_FIRST}")
    if model.config.quantization is not None:
        raise ValueError("This model is packed INT4 and cannot be trained. Start from the full-precision checkpoint.")
    if is_prepared(model):
        raise ValueError("This model is prepared already. Train it, then call `convert`.")
    # A meta-device model supplies the original modules and parameters.
    with torch.device("meta"):
        plain = type(model)(model.config)
    _check_same("module", dict(model.named_modules()), dict(plain.named_modules()))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        raise ValueError(
            "lm_head.weight is not the tensor of the embedding, but the INT4 format stores one tensor for both. "
            "Tie them with `model.tie_weights()`."
        )
    _check_same("parameter", dict(model.named_parameters()), dict(plain.named_parameters()))
    for name, module in modules_to_pack(model).items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            dim = int4_format.expert_dim if parameter.ndim == 3 else -1
            if parameter.shape[dim] % int4_format.group_size:
                raise ValueError(
                    f"{name}.{parameter_name} has {parameter.shape[dim]} values along the axis of its groups, which "
                    f"the group size {int4_format.group_size} does not divide. Choose model widths that are multiples."
                )


def preparation_table(model: PreTrainedModel) -> str:
    """How each parameter of a prepared model is quantised: one line per kind of parameter, all layers together."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    tensors = dict(model.named_parameters()) | {
        name: tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias")
    }
    for name, tensor in tensors.items():
        module = model.get_submodule(name.rpartition(".")[0])
        inputs = "as they are"
        if isinstance(module, MobileMoERouter):
            weight = "FP32: near-ties decide which experts run"
        elif isinstance(module, FakeQuantizedRMSNorm):
            weight = "BF16, as it is stored"
        elif name.endswith("expert_bias"):
            weight = "BF16 at the start; balancing moves it"
        else:
            experts = isinstance(module, FakeQuantizedExperts)
            axis = module.weight_fake_quantizer.config.expert_axis if experts else "input"
            weight = f"INT4, groups of {Int4Format.group_size} along the {axis}"
            # The embedding is also the head, whose inputs the last norm rounds.
            source = model.base_model.norm if isinstance(module, FakeQuantizedEmbedding) else module
            inputs = GRID_NAMES[type(source.activation_fake_quantizer)]
            if source is not module and not isinstance(source.activation_fake_quantizer, nn.Identity):
                inputs += ", as the head"
        row = rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), weight, inputs), [0, 0])
        row[:] = row[0] + 1, row[1] + tensor.numel()
    width = max(len(kind) for kind, _, _ in rows)
    lines = [f"{'parameter':{width}s}  {'tensors':>7s}  {'values':>13s}  {'weight':40s}  inputs"]
    for (kind, weight, inputs), (count, numel) in rows.items():
        lines.append(f"{kind:{width}s}  {count:7d}  {numel:13,d}  {weight:40s}  {inputs}")
    return "\n".join(lines)


def is_prepared(model: nn.Module) -> bool:
    return any(isinstance(module, FakeQuantizedExperts) for module in model.modules())


def enable_fake_quantization(model: nn.Module, enabled: bool = True) -> None:
    """Switches the fake quantizers of a prepared model on, or off for full precision."""
    for module in model.modules():
        if isinstance(module, FakeQuantizerBase):
            module.enabled = enabled


class FakeQuantizationStart(TrainerCallback):
    """
    Trains the first steps of a prepared model in full precision.

    Args:
        start_step (`int`): optimizer steps before fake quantization begins.
    """

    def __init__(self, start_step: int):
        self.start_step = start_step

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        enable_fake_quantization(model, state.global_step >= self.start_step)


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """
    Ends quantization-aware training: packs the weights with [`quantize`] in the format of [`prepare`], in place.

    Raises:
        ValueError: when the model is not prepared, or training diverged.
    """
    if not is_prepared(model):
        raise ValueError("This model is not prepared. Call `prepare` before training, or `quantize` to only round it.")
    int4_format = None
    # `quantize` replaces all other modules.
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedExperts):
            int4_format = module.weight_fake_quantizer.config
        elif isinstance(module, FakeQuantizedRMSNorm):
            del module.weight_fake_quantizer, module.activation_fake_quantizer
            model.set_submodule(name, _as_class(module, MobileMoERMSNorm))
    return quantize(model, int4_format)
