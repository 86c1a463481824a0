"""What a recipe is made of: its arguments, the model and the trainer."""

import copy
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM

from ..artifacts import is_checkpoint
from .checkpoints import MixtureCallback, find_start
from .checks import check_numbers, read_yaml
from .data import DataSource, Mixture, Source, collate, padding_id
from .epochs import Epochs, packed_sequences, read_documents
from .evaluation import BitsPerByte
from .qat import is_prepared
from .routing import ExpertBiasCallback, add_router_z_loss, set_capacity_factor
from .sharding import shard, shard_teacher
from .shards import Shards


if TYPE_CHECKING:
    from trl import SFTConfig

    from .trainer import RecipeTrainer

CHAT_TEMPLATE = files("modeling_mobilemoe").joinpath("chat_template.jinja").read_text()


@dataclass
class RecipeArguments:
    """
    What a recipe needs beside TRL's `SFTConfig`.

    Args:
        model (`str`): checkpoint directory or Hub id; random weights where there is only a `config.json`.
        tokenizer (`str`, *optional*): where the tokenizer is, when not with the model.
        attn_implementation (`str`, *optional*): "sdpa" (the default), "flex_attention" or a FlashAttention.
        data (`list[DataSource]`): the mixture, or with `num_train_epochs` the sources that are read whole.
        eval_data (`list[DataSource]`): held-out sources for `eval_strategy`, read whole.
        shards (`str`, *optional*): directory in which recipes/prepare.py has tokenized `data`; tokenized during
            training when absent.
        num_data_readers (`int`, defaults to 8): readers that share the mixture; a multiple of the processes.
        expert_bias_update_rate (`float`, *optional*): step of the balancing bias; 0 turns balancing off. 1e-3 when
            absent; 0 with LoRA, whose adapters do not hold the biases, and in QAT, which packs them in BF16.
        router_z_loss_coef (`float`, defaults to 1e-4): weight of the router z-loss; 0 turns it off.
        capacity_factor (`float`, *optional*): drop what an expert gets beyond this multiple of an even share, as the
            paper does in pre- and mid-training; nothing is dropped when absent.
        overwrite_output_dir (`bool`, defaults to `False`): write over what another stage or model has left there.
    """

    model: str = field(metadata={"help": "Checkpoint directory or Hub id, or a directory with a config.json."})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "Mixture, set in the YAML file."})
    eval_data: list[DataSource] = field(default_factory=list, metadata={"help": "Held-out data, in the YAML file."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel of transformers."})
    shards: str | None = field(default=None, metadata={"help": "Directory of data that prepare.py has tokenized."})
    num_data_readers: int = field(default=8, metadata={"help": "Readers that share the mixture."})
    expert_bias_update_rate: float | None = field(default=None, metadata={"help": "Step of the balancing bias."})
    router_z_loss_coef: float = field(default=1e-4, metadata={"help": "Weight of the router z-loss."})
    capacity_factor: float | None = field(default=None, metadata={"help": "Tokens per expert over an even share."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write over what another stage or model has left in output_dir."}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, sources in (("data", self.data), ("eval_data", self.eval_data)):
            for number, source in enumerate(sources):
                if not isinstance(source, DataSource):
                    try:
                        sources[number] = DataSource(**source)
                    except (TypeError, ValueError) as error:
                        raise ValueError(
                            f"Entry {number} of `{name}` is {source}: {error}. Its keys are "
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
        ValueError: for unknown keys and names, values of a wrong type, numbers that cannot work, and without a model
            or an output directory.
        OSError: when the YAML file cannot be read.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse would print its usage, some hundred lines.
            raise ValueError(message)

    args, values = list(sys.argv[1:] if args is None else args), {}
    if "--config" in args[:-1]:
        position = args.index("--config")
        values = read_yaml(find_recipe(recipes, "config", args[position + 1]), parts)
        del args[position : position + 2]
    parser = Parser(parts)
    # Without a default the trainer writes to `trainer_output`, and trains three epochs if nothing says how long.
    parser.set_defaults_with_config(**{"model": "", "output_dir": "", "num_train_epochs": 0.0} | values)
    arguments = parser.parse_args_into_dataclasses(args, look_for_args_file=False)
    for part in arguments:
        check_numbers(part)
    recipe, training_args = arguments[0], arguments[-1]
    given = {"--model": recipe.model, "--output_dir": training_args.output_dir}
    if not all(given.values()):
        raise ValueError(
            f"{' and '.join(name for name in given if not given[name])} not set: the YAML files of S, M and L leave "
            "the size and the directory to the command line. Add them, for example --model mobilemoe-s --output_dir "
            "out/mobilemoe-s/1-pretrain."
        )
    if training_args.max_steps > 0 and training_args.num_train_epochs:
        raise ValueError(
            f"max_steps={training_args.max_steps} and num_train_epochs={training_args.num_train_epochs:g} both say "
            "how long to train. Set one of them: --max_steps -1 or --num_train_epochs 0 takes the other one back."
        )
    recipe.model = find_recipe(recipes, "model", recipe.model)
    return arguments


def run(stage: Callable[..., None], script: str) -> None:
    """
    What a recipe script does: the stage with the arguments of the command line. An error of the user's is one line.

    Args:
        stage (`Callable`): of `stages.py`; its parameters are the dataclasses to fill.
        script (`str`): the script's `__file__`, beside the shipped recipes.
    """
    parameters = inspect.signature(stage).parameters.values()
    parts = [each.annotation for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    try:
        stage(*parse_arguments(Path(script).parent, parts))
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(script).name}: {error}")
    except KeyboardInterrupt:
        print(f"{Path(script).name}: interrupted. --resume_from_checkpoint true resumes if a checkpoint was saved.")
        sys.exit(130)


def load_model(path: str, attn_implementation: str | None = None) -> MobileMoEForCausalLM:
    """A checkpoint in FP32 master weights, or, where there is only a `config.json`, a new model from it."""
    directory = Path(path)
    if directory.is_dir() and not is_checkpoint(directory):
        config = MobileMoEConfig.from_pretrained(directory, attn_implementation=attn_implementation)
        return MobileMoEForCausalLM(config)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attn_implementation)


def reading_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The one that reads the data. Base checkpoints have no chat template, but mid-training has conversations too."""
    reading = copy.deepcopy(tokenizer)
    reading.chat_template = reading.chat_template or CHAT_TEMPLATE
    return reading


def refuse_fsdp(training_args: "SFTConfig", reason: str) -> None:
    """
    For what needs whole weights on one process; told before a model is loaded.

    Raises:
        ValueError: when accelerate or the trainer would shard them.
    """
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ValueError(f"FSDP shards the weights, but {reason}. Launch with one_gpu.yaml or ddp.yaml.")


def set_up_routing(
    model: PreTrainedModel, recipe: RecipeArguments, gradient_accumulation_steps: int, generates: bool = False
) -> ExpertBiasCallback:
    """Dispatch, z-loss and balancing as a recipe asks for them; the callback goes to the trainer."""
    if recipe.capacity_factor is not None:
        set_capacity_factor(model, recipe.capacity_factor)
    if recipe.router_z_loss_coef:
        add_router_z_loss(model, recipe.router_z_loss_coef, gradient_accumulation_steps)
    rate = 1e-3 if recipe.expert_bias_update_rate is None else recipe.expert_bias_update_rate
    return ExpertBiasCallback(model, rate, recipe.capacity_factor, generates)


# What the recipes do themselves, so that these settings of TRL's would be ignored.
UNUSED = {
    "packing": "documents are always packed, without cuts",
    "packing_strategy": "documents are always packed, without cuts",
    "eval_packing": "documents are always packed, without cuts",
    "padding_free": "documents are always packed, without cuts",
    "truncation_mode": "texts are split at max_length, and conversations keep their beginning",
    "completion_only_loss": "the loss counts every token of a text, and the answers of conversations",
    "assistant_only_loss": "the loss counts every token of a text, and the answers of conversations",
    "dataset_text_field": "`columns` of a data source names it",
    "dataset_kwargs": "the data are prepared here",
    "dataset_num_proc": "the data are prepared here",
    "model_init_kwargs": "the model is loaded in FP32 master weights",
    "chat_template_path": "the chat template is the tokenizer's, or the released one",
    "auto_find_batch_size": "a checkpoint could not record the position in the data",
}


def check_training_args(model: PreTrainedModel, recipe: RecipeArguments, training_args: "SFTConfig") -> None:
    """
    Refuses what a recipe cannot train with, before any data is read.

    Raises:
        ValueError: for a number that cannot work, without an end or with two, for a length beyond the context, for an
            evaluation without data, for settings that would be ignored, and for settings that break resuming.
    """
    check_numbers(training_args)
    for name, instead in UNUSED.items():
        value, default = vars(training_args)[name], type(training_args).__dataclass_fields__[name].default
        if value != default and value is not None:
            raise ValueError(f"{name}={value} would be ignored: {instead}. Leave it out.")
    if training_args.max_steps < 1 and not training_args.num_train_epochs:
        raise ValueError(
            f"max_steps={training_args.max_steps} and no num_train_epochs: the mixture starts its sources again when "
            "they end, so nothing says when to stop. Set max_steps to tokens / (max_length * sequences per step), or "
            "num_train_epochs to read every example so often."
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
    if training_args.save_only_model:
        raise ValueError(
            "save_only_model=true: resuming without the optimizer's state would restart AdamW and change the losses. "
            "Leave it out."
        )
    evaluates = training_args.eval_strategy != "no"
    if evaluates != bool(recipe.eval_data):
        given, missing = ("eval_strategy", "eval_data") if evaluates else ("eval_data", "eval_strategy")
        raise ValueError(f"{given} is set without {missing}, so nothing would be evaluated. Set both or neither.")
    if training_args.load_best_model_at_end:
        refuse_fsdp(training_args, "load_best_model_at_end loads them whole")
    strategies = ("eval_strategy", "save_strategy", "logging_strategy")
    epochs = [name for name in strategies if vars(training_args)[name] == "epoch"]
    if epochs and training_args.max_steps > 0:
        raise ValueError(
            f"{epochs[0]}=epoch with max_steps={training_args.max_steps}: a mixture has no epochs. Set steps, or "
            "num_train_epochs in place of max_steps."
        )


def count_steps(epochs: Epochs, training_args: "SFTConfig") -> None:
    """Turns the epochs of the training arguments into steps, which the trainer counts."""
    training_args.max_steps = max(1, round(training_args.num_train_epochs * epochs.steps_per_epoch))
    for name, strategy in (("eval", IntervalStrategy), ("save", SaveStrategy), ("logging", IntervalStrategy)):
        if vars(training_args)[f"{name}_strategy"] == "epoch":
            setattr(training_args, f"{name}_strategy", strategy("steps"))
            setattr(training_args, f"{name}_steps", epochs.steps_per_epoch)


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: RecipeArguments, training_args: "SFTConfig"
) -> "RecipeTrainer":
    """
    TRL's trainer with the data and the routing of a recipe, ready for `train`.

    Args:
        model (`PreTrainedModel`): what trains.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template where the data holds conversations.
        recipe (`RecipeArguments`): the YAML file's own fields.
        training_args (`SFTConfig`): TRL's. Some of it is set here: preparing and packing data is done here. Without
            `max_steps` the data are read `num_train_epochs` times, and `max_steps` is set to the steps of that.

    Raises:
        ValueError: for settings that cannot work, before any step.
    """
    from .trainer import RecipeTrainer

    check_training_args(model, recipe, training_args)
    checkpoint, first_step, position = find_start(training_args)
    routing = set_up_routing(model, recipe, training_args.gradient_accumulation_steps)
    reading = reading_tokenizer(tokenizer)
    length, seed, num_processes = training_args.max_length, training_args.seed, training_args.world_size
    sequences_per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    open_source = None if recipe.shards is None else Shards(recipe.shards, reading, length, seed).source
    if training_args.max_steps > 0:
        data = Mixture(
            recipe.data, reading, length, seed, recipe.num_data_readers, num_processes, position, open_source
        )
    else:
        per_step = sequences_per_step * num_processes
        data = Epochs(recipe.data, reading, length, seed, per_step, num_processes, position, open_source)
        count_steps(data, training_args)
    eval_dataset, callbacks = None, [MixtureCallback(data, sequences_per_step, first_step), routing]
    if recipe.eval_data:
        from datasets import Dataset

        held_out = read_documents([Source(source, reading, length, seed) for source in recipe.eval_data])
        eval_dataset = Dataset.from_list(packed_sequences(held_out, length, padding_id(reading))).with_format("numpy")
        callbacks.append(BitsPerByte(held_out, reading))
    # The data resume by themselves from the checkpoint's position, and their rows are what the model takes.
    training_args.ignore_data_skip = True
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.remove_unused_columns = False
    training_args.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        train_dataset=data.dataset(),
        eval_dataset=eval_dataset,
        data_collator=partial(collate, flatten="flash" in model.config._attn_implementation),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if first_step >= training_args.max_steps:
        # The run was stopped between its last checkpoint and its end. The trainer would take one step more.
        trainer.train_dataset = trainer.train_dataset.take(0)
    reporters_last(trainer)
    return trainer


def reporters_last(trainer: Trainer) -> None:
    """Our callbacks add to the logs, so reporters go after them, and last the one that removes `total_flos`."""
    for kind in (*get_reporting_integration_callbacks(trainer.args.report_to), PrinterCallback):
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(reporter)


def train(trainer: "RecipeTrainer") -> None:
    """
    Trains from the beginning, or from the checkpoint that `make_trainer` found.

    Raises:
        ValueError: when the loss or its gradient is no longer finite; a checkpoint of the last good step is kept.
    """
    if trainer.accelerator.is_fsdp2:
        shard(trainer.model, trainer.accelerator, whole_precision=is_prepared(trainer.model))
        if trainer.distillation is not None:
            shard_teacher(trainer.distillation.teacher, trainer.accelerator)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
