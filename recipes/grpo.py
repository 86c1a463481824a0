"""
Reinforcement learning (GRPO) of a fine-tuned checkpoint: it answers, and is rewarded for the right number.

    python recipes/grpo.py --config recipes/tiny/grpo.yaml [--any_field value]

Rows have `prompt` and `answer`; the reward is 1 where the last number of a completion is that of the answer.
"""

from mobilemoe.train.post_training import reinforce
from mobilemoe.train.recipe import run


if __name__ == "__main__":
    run(reinforce, __file__)
