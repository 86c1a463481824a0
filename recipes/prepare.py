"""
Tokenizes the data of a stage once, into shards that any number of runs read with `--shards DIR`.

    python recipes/prepare.py --config recipes/tiny/pretrain.yaml --shards out/shards [--dataset_num_proc 8]

The arguments are those of the stage. A run that was killed goes on where it was with the same command.
"""

from mobilemoe.train.recipe import run
from mobilemoe.train.stages import prepare_data


if __name__ == "__main__":
    run(prepare_data, __file__)
