"""The output directory of a recipe: what it may hold before a run, checkpoints to resume from, and room for them."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..artifacts import Artifact


if TYPE_CHECKING:
    from trl import SFTConfig

    from .data import Mixture
    from .epochs import Epochs

logger = logging.get_logger(__name__)

# Says which stage wrote a directory, and from which model.
RUN_FILE = "run.json"
# What a finished directory is, by a file in it; the first that is there counts.
SIGNS = {
    "model.pte": "an exported program",
    "*.gguf": "a GGUF model",
    "adapter/adapter_config.json": "a LoRA adapter with its merged model",
    "adapter_config.json": "a LoRA adapter",
    "*.safetensors": "a checkpoint",
    "model.safetensors.index.json": "a checkpoint",
}


class Run(Artifact):
    """`run.json` in an output directory."""

    what = "the note of a training run"
    remedy = "Remove it, or set another --output_dir."
    mark = "stage"

    stage: str
    model: str


def check_output_dir(output_dir: str, model: str, stage: str, overwrite: bool) -> None:
    """
    Refuses to write over what another stage, or the same stage from another model, has left; before anything loads.

    Args:
        output_dir (`str`): absent, empty, or with nothing but what a run of this stage from this model wrote.
        model (`str`): what the run trains.
        stage (`str`): for example "fine-tuning".
        overwrite (`bool`): write there anyway.

    Raises:
        ValueError: when the directory holds anything else, or is the model's own.
        OSError: when it is a file.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise OSError(f"output_dir={output_dir} is a file. Name a directory.")
    if directory.is_dir() and Path(model).is_dir() and directory.samefile(model):
        raise ValueError(
            f"output_dir={output_dir} is the directory of the model that is trained, which would be lost. "
            "Set another --output_dir."
        )
    if overwrite:
        return
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    found = [name for name in found if not name.startswith("checkpoint-")]
    if not found:
        return
    origin = f"such as {', '.join(found[:3])}"
    if (directory / RUN_FILE).is_file():
        run = Run.load(directory / RUN_FILE)
        origin = f"from {run.stage} of {run.model}"
        if run.stage == stage and (run.model == model or Path(run.model).resolve() == Path(model).resolve()):
            return
    kind = next((kind for sign, kind in SIGNS.items() if any(directory.glob(sign))), "other files")
    raise ValueError(
        f"output_dir={output_dir} holds {kind}, {origin}, and {stage} of {model} would write over it. Set another "
        "--output_dir, or --overwrite_output_dir true."
    )


def mark_output_dir(output_dir: str, model: str, stage: str) -> None:
    """Notes in the directory which run writes to it, for [`check_output_dir`]; call it before its first file."""
    Run(stage=stage, model=model).save(Path(output_dir, RUN_FILE))


class MixtureCallback(TrainerCallback, ExportableState):
    """
    Puts the place in the data into every checkpoint, as part of its `trainer_state.json`.

    That file is the last one the trainer writes, so a checkpoint that has it is complete. Before anything is written,
    the disk is checked for room.

    Args:
        mixture (`Mixture` or `Epochs`): what the trainer reads.
        sequences_per_step (`int`): sequences of this process per optimizer step.
        first_step (`int`): optimizer steps done before this run.
    """

    def __init__(self, mixture: "Mixture | Epochs", sequences_per_step: int, first_step: int):
        self.mixture = mixture
        self.sequences_per_step = sequences_per_step
        self.first_step = first_step
        self.mixture_state: dict | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # A checkpoint holds the flags of the moment before it was saved.
        control.should_save = control.should_evaluate = control.should_log = False
        if state.is_world_process_zero and args.save_strategy != "no":
            check_disk_space(args.output_dir, model)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # TRL counts the columns of `position_ids`, which have a row per sequence here.
        # Stages without packed sequences count the tokens that they see.
        for name in {"num_tokens", "eval_num_tokens"} & logs.keys() if self.mixture.max_length else ():
            tokens = state.global_step * self.sequences_per_step * args.world_size * self.mixture.max_length
            logs[name] = state.log_history[-1][name] = tokens
        rows = [row for row in state.log_history if "loss" in row]
        if "train_loss" in logs and rows:
            # The mean of a whole run; the trainer adds up the steps since it was resumed.
            steps = [0, *(row["step"] for row in rows)]
            total = sum(row["loss"] * (end - start) for row, start, end in zip(rows, steps, steps[1:], strict=False))
            logs["train_loss"] = state.log_history[-1]["train_loss"] = total / steps[-1]

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        # As it is in a run that never stopped; the trainer counts from the step where this one began.
        state.epoch = self.mixture.epoch(state.global_step, state.max_steps)
        # With "best", the evaluation decides whether this step is saved.
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self.prepare_to_save(args, state, model)

    def prepare_to_save(self, args, state, model: PreTrainedModel) -> None:
        """Makes room for the checkpoint of this step, and takes the place in the data that belongs to it."""
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
    if checkpoint := last_checkpoint(output_dir):
        return checkpoint
    raise ValueError(
        f"resume_from_checkpoint is set, but {output_dir} holds no complete checkpoint. "
        "Leave it out to start from the beginning, and set save_steps to have checkpoints."
    )


def last_checkpoint(output_dir: str) -> Path | None:
    """The last complete checkpoint of a run, if there is one."""
    for checkpoint in saved_checkpoints(output_dir):
        if _mixture_state(checkpoint) is not None:
            return checkpoint
        logger.warning(f"{checkpoint} is incomplete and skipped.")
    return None


def _trainer_state(checkpoint: Path) -> dict | None:
    """The trainer's state, or `None` where it is missing or cut off."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _mixture_state(checkpoint: Path) -> dict | None:
    state = _trainer_state(checkpoint)
    return None if state is None else state["stateful_callbacks"].get("MixtureCallback", {}).get("mixture")


def find_start(training_args: "SFTConfig") -> tuple[Path | None, int, dict | None]:
    """
    The checkpoint that a run resumes from, its step, and its position in the mixture; `(None, 0, None)` for a new run.

    Raises:
        ValueError: when there is no checkpoint to resume from, a new run would mix its own with those of another, or
            the best checkpoint so far, which is to be loaded at the end, is gone.
    """
    checkpoint = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    if checkpoint is not None:
        state = _trainer_state(checkpoint)
        best = state.get("best_model_checkpoint")
        if training_args.load_best_model_at_end and best and not Path(best).is_dir():
            raise ValueError(
                f"{checkpoint} says that {best} is the best so far, and it is gone, so load_best_model_at_end could "
                "not load it. Restore it, run from the same working directory, or leave load_best_model_at_end out."
            )
        return checkpoint, state["global_step"], _mixture_state(checkpoint)
    # One that a run left before its first was complete is written anew.
    if last_checkpoint(training_args.output_dir):
        raise ValueError(
            f"output_dir={training_args.output_dir} holds checkpoints of another run, and a later resume could "
            "mistake them for this run's. Set resume_from_checkpoint to true, name another directory, or remove them."
        )
    return None, 0, None
