"""
Instruction fine-tuning on conversations, or on prompts and completions; the loss counts the answers only.

    python recipes/sft.py --config recipes/tiny/sft.yaml [--any_field value]

With `--lora_scope attention --lora_rank 16`, adapters train in place of all weights: `output_dir/adapter` holds them,
and `output_dir` the merged model, for QAT or export. Over a packed INT4 base there is only the adapter.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, set_seed
from trl import SFTConfig

from mobilemoe.train.lora import add_lora, trainable_table
from mobilemoe.train.recipe import (
    CHAT_TEMPLATE,
    RecipeArguments,
    load_model,
    make_trainer,
    parse_arguments,
    refuse_fsdp,
    train,
)


@dataclass
class LoRAArguments:
    lora_scope: str | None = field(
        default=None, metadata={"help": "What gets adapters in place of training all: attention, experts, dense, all."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the adapters."})
    lora_budget: int | None = field(default=None, metadata={"help": "Or their number of parameters."})


def check_lora(lora: LoRAArguments, recipe: RecipeArguments, training_args: SFTConfig) -> None:
    if lora.lora_scope is None:
        if lora.lora_rank or lora.lora_budget:
            raise ValueError(
                "lora_rank or lora_budget is set without lora_scope, and would do nothing. Set lora_scope."
            )
        return
    if recipe.expert_bias_update_rate:
        raise ValueError(
            f"expert_bias_update_rate={recipe.expert_bias_update_rate} with lora_scope={lora.lora_scope}: the biases "
            "would move, but an adapter does not hold them. Set 0 or leave it out."
        )
    recipe.expert_bias_update_rate = 0.0
    refuse_fsdp(training_args, f"lora_scope={lora.lora_scope} merges them in one process")


def main(recipe: RecipeArguments, lora: LoRAArguments, training_args: SFTConfig) -> None:
    check_lora(lora, recipe, training_args)
    # The adapters are random.
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    # Base checkpoints have no chat template; from here on the model has one.
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model = load_model(recipe.model, recipe.attn_implementation)
    if lora.lora_scope is not None:
        model = add_lora(model, lora.lora_scope, lora.lora_rank, lora.lora_budget)
        if training_args.process_index == 0:
            print(trainable_table(model))
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    train(trainer)
    trainer.save_state()
    if lora.lora_scope is None:
        trainer.save_model()
        return
    trainer.save_model(Path(training_args.output_dir, "adapter"))
    if trainer.is_world_process_zero() and model.config.quantization is None:
        model.merge_and_unload().save_pretrained(training_args.output_dir)
        tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*parse_arguments(Path(__file__).parent, (RecipeArguments, LoRAArguments, SFTConfig)))
