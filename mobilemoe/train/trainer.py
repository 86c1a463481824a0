"""TRL's trainers, stopped before a step that would spoil the weights, and that of fine-tuning with a teacher."""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from trl import SFTTrainer

from .checkpoints import MixtureCallback
from .distillation import Distillation


class StopsAtNonFinite(Trainer):
    """
    Stops when the loss or the norm of its gradient is not finite, before the optimizer takes that step.

    The weights are still those of the step before, and are saved as a checkpoint unless one was just saved.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # It would hide a loss that is not finite.
        self.args.logging_nan_inf_filter = False
        # Of the checkpoint that a run resumes from, until its first step.
        self.random_states = self.args.resume_from_checkpoint

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.random_states is not None:
            # The iterator over the data has drawn a number since the trainer restored them.
            self._load_rng_state(self.random_states)
            self.random_states = None
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        # Private, but the only place between the gradients, reduced over all processes, and the optimizer step:
        # https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L1943
        norm = super()._get_grad_norm(model, grad_norm)
        # Also the losses since the last logged step; the trainer synchronises here with `logging_nan_inf_filter`.
        if not math.isfinite(float(norm) + float(self._tr_loss)):
            self._stop(model, float(norm), float(self._tr_loss))
        return norm

    def _issue_warnings_after_load(self, load_result) -> None:
        # The head is the embedding, which a checkpoint holds once.
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name != "lm_head.weight"]
        super()._issue_warnings_after_load(load_result)

    def _stop(self, model, norm: float, loss: float) -> None:
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir, f"checkpoint-{step}")
        if step > 0 and not (checkpoint / "trainer_state.json").exists():
            (place,) = [each for each in self.callback_handler.callbacks if isinstance(each, MixtureCallback)]
            place.prepare_to_save(self.args, self.state, self.accelerator.unwrap_model(model))
            self._save_checkpoint(model, trial=None)
        whole = "make a whole model of them (python -m mobilemoe.train.sharding), and " if self.is_fsdp_enabled else ""
        kept = f"The weights before it are in {checkpoint}: {whole}start a new run from them, with" if step else "Set"
        raise ValueError(
            f"Training stopped before step {step + 1}, which would spoil the weights: the norm of the gradient is "
            f"{norm:g}, and the loss {loss / (step + 1 - self._globalstep_last_logged):g}. {kept} a lower "
            "learning_rate or more warmup_steps."
        )


class RecipeTrainer(StopsAtNonFinite, SFTTrainer):
    distillation: Distillation | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # accelerate wraps the forward pass of a model, but not under FSDP2, and not that of the teacher.
        with self.accelerator.autocast() if self.accelerator.is_fsdp2 else nullcontext():
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.distillation is None:
            return found
        with self.accelerator.autocast():
            divergence, count = self.distillation.divergence(inputs)
        # As TRL: the number is that of all processes, and DDP averages their gradients.
        count = count if num_items_in_batch is None else num_items_in_batch
        divergence = divergence / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            divergence = divergence * self.accelerator.num_processes
        if return_outputs:
            return self.distillation.mix(found[0], divergence), found[1]
        return self.distillation.mix(found, divergence)

    def save_model(self, output_dir=None, _internal_call=False):
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is None or plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
            return super().save_model(output_dir, _internal_call)
        if _internal_call:
            # A checkpoint: with the states of the optimizer, the trainer saves its weights as they are sharded.
            if self.args.should_save:
                self.model.config.save_pretrained(output_dir)
                self.processing_class.save_pretrained(output_dir)
            return
        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir)
        finally:
            plugin.state_dict_type = kind
