"""
Pre-training and mid-training on raw text: two YAML files, one script.

    python recipes/pretrain.py --config recipes/tiny/pretrain.yaml [--any_field value]
"""

from pathlib import Path

from transformers import AutoTokenizer, set_seed
from trl import SFTConfig

from mobilemoe.train.recipe import RecipeArguments, load_model, make_trainer, parse_arguments, train


def main(recipe: RecipeArguments, training_args: SFTConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    # A model from a config.json starts from random weights.
    set_seed(training_args.seed)
    model = load_model(recipe.model, recipe.attn_implementation)
    trainer = make_trainer(model, tokenizer, recipe, training_args)
    train(trainer)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(*parse_arguments(Path(__file__).parent, (RecipeArguments, SFTConfig)))
