"""INT4 quantization-aware training: `prepare` a model, train it with any trainer, `convert` it to packed INT4."""

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .quantization_mobilemoe import GROUP_SIZE, PACKED_NAMES, modules_to_pack, quantize, quantize_tensor


class _StraightThrough(torch.autograd.Function):
    """Rounds to the grid forward, passes the gradient on as it is (paper equation 6)."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:
        quantized, scale = quantize_tensor(weight)
        groups = quantized.unflatten(-1, (-1, GROUP_SIZE)) * scale.float().unsqueeze(-1)
        return groups.flatten(-2).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output


class FakeQuantize(nn.Module):
    """Parametrization under which a weight reads as its INT4 rounding and trains as itself."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _StraightThrough.apply(weight)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """
    Makes every weight that the INT4 format packs read as its rounding: linears, experts, the tied embedding and head.

    The modules keep their classes, so every experts implementation and any trainer works. Router, norms and biases
    stay as they are. In place; end with [`convert`].

    Raises:
        ValueError: when the model is packed already.
    """
    if model.config.quantization is not None:
        raise ValueError("This model is packed INT4 and cannot be trained. Start from the full-precision checkpoint.")
    # The head has its own view of the tied tensor, and the loss reads the head.
    for module in (*modules_to_pack(model).values(), model.get_output_embeddings()):
        for name in PACKED_NAMES:
            if name in module._parameters:
                # unsafe: the check would run the rounding once more on every weight; shape and dtype stay.
                parametrize.register_parametrization(module, name, FakeQuantize(), unsafe=True)
    return model


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Ends quantization-aware training: takes the rounding off the weights and packs them, in place."""
    for module in model.modules():
        for name in PACKED_NAMES:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    return quantize(model)
