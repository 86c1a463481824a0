"""
INT4 quantization-aware training of a fine-tuned checkpoint; ends in a packed checkpoint.

    python recipes/qat.py --config recipes/tiny/qat.yaml [--any_field value]

On one GPU, or on several with `recipes/accelerate/ddp.yaml`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer
from trl import SFTConfig

from mobilemoe.train.qat import FakeQuantizationStart, convert, preparation_table, prepare
from mobilemoe.train.recipe import RecipeArguments, load_model, make_trainer, parse_arguments, refuse_fsdp, train
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.quantization_mobilemoe import quantization_table


@dataclass
class QATArguments:
    expert_axis: str = field(
        default="output", metadata={"help": "Groups of experts: output (released) or input (ExecuTorch's kernels)."}
    )
    quantize_activations: bool = field(
        default=True, metadata={"help": "Round inputs to INT8 per token, coarser than our kernels."}
    )
    quantize_from_step: int = field(default=0, metadata={"help": "Optimizer steps in full precision before QAT."})


def check_quantization(quantization: QATArguments, recipe: RecipeArguments, training_args: SFTConfig) -> None:
    refuse_fsdp(training_args, "QAT packs them whole in one process")
    if 0 < training_args.max_steps <= quantization.quantize_from_step:
        raise ValueError(
            f"quantize_from_step={quantization.quantize_from_step} with max_steps={training_args.max_steps}: no step "
            "would see INT4 weights, and packing would only round them. Set a step below max_steps."
        )
    if recipe.expert_bias_update_rate is None:
        # Biases are packed in BF16, whose spacing exceeds the usual step of 1e-3 from 0.25 on.
        recipe.expert_bias_update_rate = 0.0


def main(recipe: RecipeArguments, quantization: QATArguments, training_args: SFTConfig) -> None:
    check_quantization(quantization, recipe, training_args)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    int4_format = Int4Format(quantization.expert_axis)
    model = load_model(recipe.model, recipe.attn_implementation)
    model = prepare(model, int4_format, quantization.quantize_activations)
    if training_args.process_index == 0:
        print(preparation_table(model))
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    trainer.add_callback(FakeQuantizationStart(quantization.quantize_from_step))
    train(trainer)
    trainer.save_state()
    if trainer.state.global_step <= quantization.quantize_from_step:
        raise ValueError(
            f"Training ended after {trainer.state.global_step} steps with quantize_from_step="
            f"{quantization.quantize_from_step}: no step saw INT4 weights, and packing would only round them. Resume "
            "from the last checkpoint with --resume_from_checkpoint true, or set an earlier step."
        )
    if trainer.is_world_process_zero():
        convert(model).save_pretrained(training_args.output_dir)
        print(quantization_table(model))
        tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*parse_arguments(Path(__file__).parent, (RecipeArguments, QATArguments, SFTConfig)))
