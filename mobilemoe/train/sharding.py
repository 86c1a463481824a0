"""
What the recipes add to accelerate's FSDP2: the precision of one GPU, sharded teachers, whole models.

    python -m mobilemoe.train.sharding out/mobilemoe-s/1-pretrain/checkpoint-10000 out/mobilemoe-s-10000
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEDecoderLayer
from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

from ..artifacts import load_tokenizer
from .routing import shard_routers


# Where the trainer keeps the weights of a sharded checkpoint.
WEIGHTS = "pytorch_model_fsdp_0"


def shard(model: PreTrainedModel, accelerator: Accelerator, whole_precision: bool = False) -> None:
    """
    Prepares a model for accelerate's sharding, which `Trainer.train` does: its routers, and the policy of precision.

    accelerate's policy casts everything to BF16, and reduces gradients in it. Here they are reduced in FP32, and the
    forward pass runs under autocast as on one GPU (trainer.py), which leaves the states between layers in FP32.

    Args:
        model (`PreTrainedModel`): not sharded yet.
        accelerator (`Accelerator`): under FSDP2.
        whole_precision (`bool`, defaults to `False`): gather parameters in FP32, which moves twice the bytes. In QAT,
            weights that were rounded to BF16 first would round to other integers than those that are packed.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy,
            param_dtype=None if whole_precision else policy.param_dtype,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        # As accelerate shards the layers.
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    shard_routers(model, **options)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.modules():
        if isinstance(layer, MobileMoEDecoderLayer):
            # Computed in FP32 under autocast.
            fully_shard([layer.input_layernorm, layer.post_attention_layernorm], mp_policy=whole, **options)
    # accelerate makes a unit of these too, but rounds the embedding, whose values begin the states between layers, to
    # BF16; and in QAT it takes the head for another tensor, because its `weight` is the rounded one.
    norm = next(module for name, module in model.named_modules() if name.endswith("model.norm"))
    options |= {"reshard_after_forward": False, "mp_policy": whole}
    if policy is not None:
        options["mp_policy"] = dataclasses.replace(plugin.mixed_precision_policy, param_dtype=None)
    fully_shard([norm, model.get_input_embeddings(), model.get_output_embeddings()], **options)


def shard_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shards a model that does not train, in place, as the one that does; after [`shard`] of that one."""
    shard(teacher, accelerator)
    fsdp2_prepare_model(accelerator, teacher)


def save_whole(checkpoint: str | Path, output: str | Path) -> None:
    """
    Writes the model of a sharded checkpoint, with its tokenizer, as `from_pretrained` opens it; in one process.

    Args:
        checkpoint (`str` or `Path`): a `checkpoint-N` of a run under FSDP2.
        output (`str` or `Path`): directory to create.

    Raises:
        ValueError: when it is not one, or the directory is there already.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not (checkpoint / WEIGHTS / ".metadata").is_file() or not (checkpoint / "trainer_state.json").is_file():
        raise ValueError(f"{checkpoint} is no complete checkpoint of a run under FSDP2. Name a checkpoint-N of one.")
    if output.exists():
        raise ValueError(f"{output} exists already. Name a directory to create.")
    model = MobileMoEForCausalLM(MobileMoEConfig.from_pretrained(checkpoint))
    # In place. Errors in the files are PyTorch's.
    torch.distributed.checkpoint.load({"model": model.state_dict()}, checkpoint_id=checkpoint / WEIGHTS, no_dist=True)
    with replace_when_complete(output) as partial:
        model.save_pretrained(partial)
        load_tokenizer(checkpoint).save_pretrained(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description="The model of a sharded checkpoint, as from_pretrained opens it")
    parser.add_argument("checkpoint", help="a checkpoint-N of a run under FSDP2")
    parser.add_argument("output", help="directory to create")
    arguments = parser.parse_args()
    try:
        save_whole(arguments.checkpoint, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"sharding: {error}")


if __name__ == "__main__":
    main()
