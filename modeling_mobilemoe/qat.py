"""INT4 quantization-aware training: `prepare` a model, train it with any trainer, `convert` it to packed INT4."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .quantization_mobilemoe import (
    BF16_SUFFIXES,
    PACKED_NAMES,
    dequantize_tensor,
    modules_to_pack,
    pack_int4,
    quantize,
    quantize_tensor,
)


class _StraightThrough(torch.autograd.Function):
    """Rounds forward, passes the gradient on as it is."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounding(weight)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output, None


def round_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """The value that a weight has once it is packed (paper equation 6)."""
    quantized, scale = quantize_tensor(weight)
    return dequantize_tensor(pack_int4(quantized), scale, weight.dtype)


def round_to_bf16(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16().to(weight.dtype)


class FakeQuantize(nn.Module):
    """Parametrization under which a weight reads as its rounding and trains as itself."""

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight, self.rounding)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """
    Makes every weight read as the packed checkpoint will hold it: linears, experts, the tied embedding and the head on
    the INT4 grid, norms in BF16. The router stays as it is; expert biases are rounded to BF16 once, here.

    The modules keep their classes, so every experts implementation and any trainer works. In place; end with
    [`convert`].

    Raises:
        ValueError: when the model is packed already.
    """
    if model.config.quantization is not None:
        raise ValueError("This model is packed INT4 and cannot be trained. Start from the full-precision checkpoint.")
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            tensor.copy_(round_to_bf16(tensor))
    # The head has its own view of the tied tensor, and the loss reads the head.
    packed = {*modules_to_pack(model).values(), model.get_output_embeddings()}
    for module_name, module in list(model.named_modules()):
        for name in list(module._parameters):
            # unsafe skips a trial rounding of every weight; shape and dtype stay as they are.
            if module in packed and name in PACKED_NAMES:
                parametrize.register_parametrization(module, name, FakeQuantize(round_to_int4), unsafe=True)
            elif f"{module_name}.{name}".endswith(BF16_SUFFIXES):
                parametrize.register_parametrization(module, name, FakeQuantize(round_to_bf16), unsafe=True)
    return model


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Ends quantization-aware training: takes the rounding off the weights and packs them, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    return quantize(model)
