"""The divergence of a student's predictions from a teacher's, as a loss (Hinton et al., arXiv 1503.02531)."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .documents import IGNORED


# Logits that exist at a time, of the student and of the teacher.
CHUNK_LOGITS = 2**24


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    Sum over tokens of KL(teacher || student) in nats, times the square of the temperature.

    Logits are computed some tokens at a time, and in the backward pass again: those of 8,192 tokens and 128,256
    entries would take 4 GB for each model.

    Args:
        student, teacher (`torch.Tensor`): inputs of the heads, `(N, D)`.
        student_head, teacher_head (`torch.Tensor`): weights `(V, D)`.
        temperature (`float`, defaults to 1.0): by which logits are divided.
    """
    rows = max(1, CHUNK_LOGITS // len(student_head))
    total = student.new_zeros((), dtype=torch.float32)
    for own, other in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + checkpoint(
            _divergence, own, other, student_head, teacher_head, temperature, use_reentrant=False
        )
    return total * temperature**2


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, student_head: torch.Tensor, teacher_head: torch.Tensor, t: float
) -> torch.Tensor:
    logits, wanted = nn.functional.linear(student, student_head), nn.functional.linear(teacher, teacher_head)
    return nn.functional.kl_div(
        (logits.float() / t).log_softmax(-1), (wanted.float() / t).log_softmax(-1), reduction="sum", log_target=True
    )


class Distillation:
    """
    Adds the divergence from a teacher to a loss.

    Args:
        student (`PreTrainedModel`): the model that trains.
        teacher (`PreTrainedModel`): of the same architecture and vocabulary, on the device that trains; it does not
            train.
        weight (`float`): of the divergence; the rest is the loss without a teacher.
        temperature (`float`): of both distributions.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, weight: float, temperature: float):
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature
        # What the heads get, in the last forward passes. The hooks stay: with others, a compiled model would be
        # compiled again.
        self._states: dict[nn.Module, torch.Tensor] = {}
        for model in (student, self.teacher):
            model.base_model.norm.register_forward_hook(partial(self._keep, model))

    def _keep(self, model: PreTrainedModel, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._states[model] = output

    def mix(self, loss: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        return divergence if self.weight == 1 else self.weight * divergence + (1 - self.weight) * loss

    def divergence(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The divergence of the student's last forward pass, summed over the tokens that have labels, and their number.

        Args:
            inputs (`dict[str, torch.Tensor]`): of that pass, with `labels` of shape `(B, T)`.
        """
        with torch.no_grad():
            others = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
            # Under FSDP2 only the whole model gathers its weights. One logit is as good as none.
            self.teacher(**others, use_cache=False, logits_to_keep=1)
        # The state at a position predicts the next token.
        is_learnt = inputs["labels"][:, 1:] != IGNORED
        own, other = (self._states.pop(model)[:, :-1][is_learnt] for model in (self.student, self.teacher))
        heads = [model.get_output_embeddings().weight for model in (self.student, self.teacher)]
        return divergence(own, other, *heads, self.temperature), is_learnt.sum()
