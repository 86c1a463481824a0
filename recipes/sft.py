"""
Instruction fine-tuning on prompt and completion pairs; the loss counts the completion only.

    python recipes/sft.py --config recipes/tiny/sft.yaml [--any_field value]
"""

from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_mobilemoe.training import CHAT_TEMPLATE, RecipeArguments, load_mixture, load_model, set_up_routing


def main(recipe: RecipeArguments, training_args: SFTConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    # Base checkpoints have no chat template; from here on the model has one.
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model = load_model(recipe.model)
    balancing = set_up_routing(model, recipe, training_args.gradient_accumulation_steps)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=load_mixture(recipe.data, ["prompt", "completion"], training_args.seed),
        processing_class=tokenizer,
        callbacks=[balancing],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, SFTConfig)).parse_args_and_config())
