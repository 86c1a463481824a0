"""What a recipe is made of: its arguments, the model, the trainer, and checkpoints to resume from."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM

from ..artifacts import is_checkpoint
from .data import DataSource, Mixture, collate
from .routing import ExpertBiasCallback, add_router_z_loss, set_capacity_factor, shard_routers


if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

logger = logging.get_logger(__name__)

CHAT_TEMPLATE = files("modeling_mobilemoe").joinpath("chat_template.jinja").read_text()


@dataclass
class RecipeArguments:
    """
    What a recipe needs beside TRL's `SFTConfig`.

    Args:
        model (`str`): checkpoint directory or Hub id; random weights where there is only a `config.json`.
        tokenizer (`str`, *optional*): where the tokenizer is, when not with the model.
        attn_implementation (`str`, *optional*): "sdpa" (the default), "flex_attention" or a FlashAttention.
        data (`list[DataSource]`): the mixture.
        num_data_readers (`int`, defaults to 8): readers that share the mixture; a multiple of the processes.
        expert_bias_update_rate (`float`, *optional*): step of the balancing bias; 0 turns balancing off. 1e-3 when
            absent; 0 with LoRA, whose adapters do not hold the biases, and in QAT, which packs them in BF16.
        router_z_loss_coef (`float`, defaults to 1e-4): weight of the router z-loss; 0 turns it off.
        capacity_factor (`float`, *optional*): drop what an expert gets beyond this multiple of an even share, as the
            paper does in pre- and mid-training; nothing is dropped when absent.
    """

    model: str = field(metadata={"help": "Checkpoint directory or Hub id, or a directory with a config.json."})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "Mixture, set in the YAML file."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel of transformers."})
    num_data_readers: int = field(default=8, metadata={"help": "Readers that share the mixture."})
    expert_bias_update_rate: float | None = field(default=None, metadata={"help": "Step of the balancing bias."})
    router_z_loss_coef: float = field(default=1e-4, metadata={"help": "Weight of the router z-loss."})
    capacity_factor: float | None = field(default=None, metadata={"help": "Tokens per expert over an even share."})

    def __post_init__(self) -> None:
        for number, source in enumerate(self.data):
            if not isinstance(source, DataSource):
                try:
                    self.data[number] = DataSource(**source)
                except TypeError as error:
                    raise ValueError(
                        f"Entry {number} of `data` is {source}: {error}. Its keys are "
                        f"{', '.join(DataSource.__dataclass_fields__)}; path is needed."
                    ) from error


def find_recipe(recipes: Path, option: str, value: str) -> str:
    """
    The path that `--config` or `--model` names: an existing path, or a shipped YAML file or model by its short name.

    Args:
        recipes (`Path`): directory of the shipped recipes.
        option (`str`): "config" or "model".
        value (`str`): for example "sft" or "tiny/sft"; "mobilemoe-s" or "tiny".

    Raises:
        ValueError: when it is neither. A model with a slash may be on the Hub.
    """
    if option == "config":
        exists = Path(value).is_file()
        files = [path for path in recipes.glob("**/*.yaml") if path.parent.name != "accelerate"]
        shipped = {path.relative_to(recipes).with_suffix("").as_posix(): path for path in files}
    else:
        exists = Path(value).is_dir() or "/" in value
        shipped = {path.parent.name: path.parent for path in recipes.glob("*/config.json")}
    if exists:
        return value
    if value in shipped:
        return str(shipped[value])
    raise ValueError(
        f"{option}={value} is no existing path, and no recipe with that name is shipped. Set a path, or one of "
        f"{', '.join(sorted(shipped))}."
    )


def parse_arguments(recipes: Path, parts: Sequence[type], args: Sequence[str] | None = None) -> tuple:
    """
    The arguments of a recipe script, from its command line and its YAML file.

    Args:
        recipes (`Path`): directory of the shipped recipes, which `--config` and `--model` may name.
        parts (`Sequence[type]`): dataclasses to fill, `RecipeArguments` first and `SFTConfig` last.
        args (`Sequence[str]`, *optional*): the command line, `sys.argv` when absent.

    Raises:
        ValueError: for unknown keys and names, and without a model or an output directory.
    """
    from trl import TrlParser

    args = list(sys.argv[1:] if args is None else args)
    if "--config" in args[:-1]:
        position = args.index("--config") + 1
        args[position] = find_recipe(recipes, "config", args[position])
    parser = TrlParser(parts)
    # Otherwise argparse prints its usage of some hundred lines, and the trainer writes to `trainer_output`.
    parser.set_defaults_with_config(model="", output_dir="")
    arguments = parser.parse_args_and_config(args)
    recipe, training_args = arguments[0], arguments[-1]
    given = {"--model": recipe.model, "--output_dir": training_args.output_dir}
    if not all(given.values()):
        raise ValueError(
            f"{' and '.join(name for name in given if not given[name])} not set: the YAML files of S, M and L leave "
            "the size and the directory to the command line. Add them, for example --model mobilemoe-s --output_dir "
            "out/mobilemoe-s/1-pretrain."
        )
    recipe.model = find_recipe(recipes, "model", recipe.model)
    return arguments


def load_model(path: str, attn_implementation: str | None = None) -> MobileMoEForCausalLM:
    """A checkpoint in FP32 master weights, or, where there is only a `config.json`, a new model from it."""
    directory = Path(path)
    if directory.is_dir() and not is_checkpoint(directory):
        config = MobileMoEConfig.from_pretrained(directory, attn_implementation=attn_implementation)
        return MobileMoEForCausalLM(config)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attn_implementation)


def refuse_fsdp(training_args: "SFTConfig", reason: str) -> None:
    """
    For what needs whole weights on one process; told before a model is loaded.

    Raises:
        ValueError: when accelerate or the trainer would shard them.
    """
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ValueError(f"FSDP shards the weights, but {reason}. Launch with one_gpu.yaml or ddp.yaml.")


def set_up_routing(
    model: PreTrainedModel, recipe: RecipeArguments, gradient_accumulation_steps: int
) -> ExpertBiasCallback:
    """Dispatch, z-loss and balancing as a recipe asks for them; the callback goes to the trainer."""
    if recipe.capacity_factor is not None:
        set_capacity_factor(model, recipe.capacity_factor)
    if recipe.router_z_loss_coef:
        add_router_z_loss(model, recipe.router_z_loss_coef, gradient_accumulation_steps)
    rate = 1e-3 if recipe.expert_bias_update_rate is None else recipe.expert_bias_update_rate
    return ExpertBiasCallback(model, rate, recipe.capacity_factor)


class MixtureCallback(TrainerCallback, ExportableState):
    """
    Puts the place in the mixture into every checkpoint, as part of its `trainer_state.json`.

    That file is the last one the trainer writes, so a checkpoint that has it is complete. Before anything is written,
    the disk is checked for room.

    Args:
        mixture (`Mixture`): what the trainer reads.
        sequences_per_step (`int`): sequences of this process per optimizer step.
        first_step (`int`): optimizer steps done before this run.
    """

    def __init__(self, mixture: Mixture, sequences_per_step: int, first_step: int):
        self.mixture = mixture
        self.sequences_per_step = sequences_per_step
        self.first_step = first_step
        self.mixture_state: dict | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.is_world_process_zero and args.save_strategy != "no":
            check_disk_space(args.output_dir, model)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # TRL counts the columns of `position_ids`, which have a row per sequence here.
        if "num_tokens" in logs:
            tokens = state.global_step * self.sequences_per_step * args.world_size * self.mixture.max_length
            logs["num_tokens"] = state.log_history[-1]["num_tokens"] = tokens

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        # As it is in a run that never stopped; the trainer counts from the step where this one began.
        state.epoch = state.global_step / state.max_steps
        if not control.should_save:
            return
        if state.is_world_process_zero:
            # A run resumed from an earlier step finds checkpoints that were saved after it.
            shutil.rmtree(Path(args.output_dir, f"checkpoint-{state.global_step}"), ignore_errors=True)
            check_disk_space(args.output_dir, model)
        # The exchange also makes the others wait for that.
        place = self.mixture.state((state.global_step - self.first_step) * self.sequences_per_step)
        if torch.distributed.is_initialized():
            places: list[dict | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(places, place)
            place["readers"] = {index: reader for other in places for index, reader in other["readers"].items()}
        self.mixture_state = place

    def state(self) -> dict:
        return {"mixture": self.mixture_state}


def check_disk_space(output_dir: str, model: PreTrainedModel) -> None:
    """
    Refuses a checkpoint that the disk has no room for, before its first byte.

    Raises:
        OSError: when weights, or LoRA's adapters, and the two states of AdamW would not fit.
    """
    from peft import PeftModel

    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = trained
    if not isinstance(model, PeftModel):
        weights = sum(parameter.nbytes for parameter in model.parameters())
    states = 2 * trained
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < weights + states:
        raise OSError(
            f"A checkpoint needs about {(weights + states) / 1e9:.2f} GB, and {output_dir} has {free / 1e9:.2f} GB "
            "left. Free space and resume from the last checkpoint with --resume_from_checkpoint true."
        )


def saved_checkpoints(output_dir: str) -> list[Path]:
    """Those of a run, complete or not, the last one first."""
    return sorted(Path(output_dir).glob("checkpoint-[0-9]*"), key=lambda path: -int(path.name.split("-")[1]))


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> Path | None:
    """
    The checkpoint to resume from: the one that is named, or for "true" the last complete one of the run.

    Raises:
        ValueError: when there is none, or the named one is not complete.
    """
    # A boolean from a YAML file is a string from a command line.
    wanted = str(resume_from_checkpoint).lower()
    if wanted in ("none", "false"):
        return None
    if wanted != "true":
        if _mixture_state(Path(resume_from_checkpoint)) is None:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint} is no complete checkpoint of a recipe: its "
                "trainer_state.json is missing or cut off. Name another one, or set true for the last complete one."
            )
        return Path(resume_from_checkpoint)
    for checkpoint in saved_checkpoints(output_dir):
        if _mixture_state(checkpoint) is not None:
            return checkpoint
        logger.warning(f"{checkpoint} is incomplete and skipped.")
    raise ValueError(
        f"resume_from_checkpoint is set, but {output_dir} holds no complete checkpoint. "
        "Leave it out to start from the beginning, and set save_steps to have checkpoints."
    )


def _mixture_state(checkpoint: Path) -> dict | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state["stateful_callbacks"].get("MixtureCallback", {}).get("mixture")


def check_training_args(model: PreTrainedModel, training_args: "SFTConfig") -> None:
    """
    Refuses what a recipe cannot train with, before any data is read.

    Raises:
        ValueError: without `max_steps`, for a length beyond the context, and for settings that break resuming.
    """
    if training_args.max_steps < 1:
        raise ValueError(
            f"max_steps={training_args.max_steps}: the mixture starts its sources again when they end, so only "
            "max_steps says when to stop. Set it to tokens / (max_length * sequences per step)."
        )
    context = model.config.max_position_embeddings
    if training_args.max_length is None or not 1 < training_args.max_length <= context:
        raise ValueError(
            f"max_length={training_args.max_length} does not fit the model's context of {context} tokens "
            f"(max_position_embeddings). Set a length from 2 to {context}."
        )
    if training_args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers={training_args.dataloader_num_workers}: a checkpoint cannot record how far a "
            "worker has read. Leave it at 0; a thread packs the next block while the model trains."
        )
    if training_args.save_strategy not in ("no", "steps"):
        raise ValueError(
            f"save_strategy={training_args.save_strategy.value}: only a checkpoint saved at a step records the "
            "position in the mixture. Set steps, or no."
        )
    if training_args.save_only_model:
        raise ValueError(
            "save_only_model=true: resuming without the optimizer's state would restart AdamW and change the losses. "
            "Leave it out."
        )


def find_start(training_args: "SFTConfig") -> tuple[Path | None, int, dict | None]:
    """
    The checkpoint that a run resumes from, its step, and its position in the mixture; `(None, 0, None)` for a new run.

    Raises:
        ValueError: when there is no checkpoint to resume from, or a new run would mix its own with those of another.
    """
    checkpoint = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    if checkpoint is not None:
        first_step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        return checkpoint, first_step, _mixture_state(checkpoint)
    if saved_checkpoints(training_args.output_dir):
        raise ValueError(
            f"output_dir={training_args.output_dir} holds checkpoints of another run, and a later resume could "
            "mistake them for this run's. Set resume_from_checkpoint to true, name another directory, or remove them."
        )
    return None, 0, None


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: RecipeArguments, training_args: "SFTConfig"
) -> "SFTTrainer":
    """
    TRL's trainer with the mixture and the routing of a recipe, ready for `train`.

    Args:
        model (`PreTrainedModel`): what trains.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template where the data holds conversations.
        recipe (`RecipeArguments`): the YAML file's own fields.
        training_args (`SFTConfig`): TRL's. Some of it is set here: preparing and packing data is the mixture's work.

    Raises:
        ValueError: for settings that cannot work, before any step.
    """
    from trl import SFTTrainer

    check_training_args(model, training_args)
    checkpoint, first_step, mixture_state = find_start(training_args)
    routing = set_up_routing(model, recipe, training_args.gradient_accumulation_steps)
    # Base checkpoints have no chat template, but mid-training reads conversations too.
    reading = copy.deepcopy(tokenizer)
    reading.chat_template = reading.chat_template or CHAT_TEMPLATE
    mixture = Mixture(
        recipe.data,
        reading,
        training_args.max_length,
        training_args.seed,
        recipe.num_data_readers,
        training_args.world_size,
        mixture_state,
    )
    sequences_per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    # The mixture resumes by itself from the checkpoint's position, and its rows are what the model takes.
    training_args.ignore_data_skip = True
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.packing = False
    training_args.remove_unused_columns = False
    training_args.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=mixture.dataset(),
        data_collator=partial(collate, flatten="flash" in model.config._attn_implementation),
        processing_class=tokenizer,
        callbacks=[MixtureCallback(mixture, sequences_per_step, first_step), routing],
    )
    # Our callbacks add to the logs, so reporters go after them, and last the one that removes `total_flos`.
    for kind in (*get_reporting_integration_callbacks(training_args.report_to), PrinterCallback):
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(reporter)
    return trainer


def train(trainer: "SFTTrainer") -> None:
    """Trains from the beginning, or from the checkpoint that `make_trainer` found."""
    if trainer.accelerator.is_fsdp2:
        plugin, mesh = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.torch_device_mesh
        shard_routers(
            trainer.model,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
            # As accelerate shards the layers.
            mesh=None if mesh is None else mesh[tuple(trainer.accelerator.parallelism_config.fsdp_dim_names)],
        )
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
