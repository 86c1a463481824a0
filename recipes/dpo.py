"""
Direct preference optimization (DPO) of a fine-tuned checkpoint: toward the chosen one of two answers.

    python recipes/dpo.py --config recipes/tiny/dpo.yaml [--any_field value]

Rows have `prompt`, `chosen` and `rejected`.
"""

from mobilemoe.train.post_training import prefer
from mobilemoe.train.recipe import run


if __name__ == "__main__":
    run(prefer, __file__)
