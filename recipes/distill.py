"""
On-policy distillation: the model answers, and learns a teacher's predictions at its own tokens.

    python recipes/distill.py --config recipes/tiny/distill.yaml [--any_field value]

Rows have `prompt`. `teacher_model_name_or_path` is a checkpoint with the same vocabulary.
"""

from mobilemoe.train.post_training import distill
from mobilemoe.train.recipe import run


if __name__ == "__main__":
    run(distill, __file__)
