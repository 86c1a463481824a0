"""
INT4 quantization-aware training of a fine-tuned checkpoint; ends in a packed checkpoint.

    python recipes/qat.py --config recipes/tiny/qat.yaml [--any_field value]

On one GPU, or on several with `recipes/accelerate/ddp.yaml`.
"""

from mobilemoe.train.recipe import run
from mobilemoe.train.stages import quantize_aware


if __name__ == "__main__":
    run(quantize_aware, __file__)
