"""
Pre-training and mid-training on raw text: two YAML files, one script.

    python recipes/pretrain.py --config recipes/tiny/pretrain.yaml [--any_field value]
"""

from mobilemoe.train.recipe import run
from mobilemoe.train.stages import pretrain


if __name__ == "__main__":
    run(pretrain, __file__)
