"""
Instruction fine-tuning on conversations, or on prompts and completions; the loss counts the answers only.

    python recipes/sft.py --config recipes/tiny/sft.yaml [--any_field value]

With `--lora_scope attention --lora_rank 16`, adapters train in place of all weights: `output_dir/adapter` holds them,
and `output_dir` the merged model, for QAT or export. Over a packed INT4 base there is only the adapter.
"""

from mobilemoe.train.recipe import run
from mobilemoe.train.stages import fine_tune


if __name__ == "__main__":
    run(fine_tune, __file__)
