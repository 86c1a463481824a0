"""
INT4 quantization-aware training of a fine-tuned checkpoint; ends in a packed checkpoint.

    python recipes/qat.py --config recipes/tiny/qat.yaml [--any_field value]
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import SFTConfig, TrlParser

from modeling_mobilemoe.qat import FakeQuantizationStart, convert, prepare
from modeling_mobilemoe.quantization_mobilemoe import Int4Format
from modeling_mobilemoe.training import RecipeArguments, load_model, make_trainer, train


@dataclass
class QATArguments:
    expert_axis: str = field(
        default="output", metadata={"help": "Groups of experts: output (released) or input (ExecuTorch's kernels)."}
    )
    quantize_activations: bool = field(default=True, metadata={"help": "Round inputs to INT8 per token, coarser than our kernels."})
    quantize_from_step: int = field(default=0, metadata={"help": "Optimizer steps in full precision before that."})


def main(recipe: RecipeArguments, quantization: QATArguments, training_args: SFTConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    int4_format = Int4Format(quantization.expert_axis)
    model = load_model(recipe.model, recipe.attn_implementation)
    model = prepare(model, int4_format, quantization.quantize_activations)
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    if trainer.is_fsdp_enabled:
        raise ValueError("FSDP shards the weights, and they are packed by one process. Launch with ddp.yaml.")
    trainer.add_callback(FakeQuantizationStart(quantization.quantize_from_step))
    train(trainer)
    trainer.save_state()
    if trainer.is_world_process_zero():
        convert(model).save_pretrained(training_args.output_dir)
        tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, QATArguments, SFTConfig)).parse_args_and_config())
