"""
INT4 quantization-aware training of a fine-tuned checkpoint; ends in a packed checkpoint in the released format.

    python recipes/qat.py --config recipes/tiny/qat.yaml [--any_field value]
"""

from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_mobilemoe.qat import convert, prepare
from modeling_mobilemoe.training import RecipeArguments, load_mixture, load_model, set_up_routing


def main(recipe: RecipeArguments, training_args: SFTConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    model = prepare(load_model(recipe.model))
    balancing = set_up_routing(model, recipe, training_args.gradient_accumulation_steps)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=load_mixture(recipe.data, ["prompt", "completion"], training_args.seed),
        processing_class=tokenizer,
        callbacks=[balancing],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_state()
    if trainer.is_world_process_zero():
        convert(model).save_pretrained(training_args.output_dir)
        tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, SFTConfig)).parse_args_and_config())
