"""
`mobilemoe train`: from a file of one's own examples to one's own model, with the stages that the recipes run.

The output directory holds the model, and beside it `data/`, a YAML file per stage that the recipe scripts read,
`loss.png`, and `train.json`, by which the same command resumes. With QAT, the fine-tuned model before it is in
`full-precision/`.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback
from trl import SFTConfig

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM

from ..artifacts import Artifact, is_checkpoint, is_pte, load_tokenizer, local_checkpoint, write_text
from ..display import picture
from ..machine import available_memory
from .checkpoints import check_output_dir, last_checkpoint, mark_output_dir, saved_checkpoints
from .conversations import Examples, read_examples, write_examples
from .documents import pack
from .lora import SCOPES, num_adapter_parameters, target_shapes
from .recipe import CHAT_TEMPLATE, RecipeArguments, parse_arguments
from .stages import LoRAArguments, QATArguments, fine_tune, fine_tuning_name, quantize_aware


TRAIN_FILE = "train.json"
LORA_RANK = 16
# Tokens of one forward and backward pass: a CPU gains nothing from more.
PASS_TOKENS = {"cpu": 4096, "cuda": 32768}
# Optimizer steps per epoch to aim for, and the most sequences of a step.
STEPS_PER_EPOCH, MOST_SEQUENCES = 16, 64
# Steps between two evaluations.
MOST_STEPS = 200
# Bytes per trained weight: FP32 weight, gradient and the two moments of AdamW.
TRAINED_BYTES, FROZEN_BYTES = 16, 4


class Settings(Artifact):
    """`train.json`: what the run was asked for, and the stages that are finished."""

    what = "the settings of `mobilemoe train`"
    remedy = "Remove the directory, or set another --output."
    mark = "data_sha256"

    model: str
    data: str
    data_sha256: str
    lora: str | None
    epochs: float
    learning_rate: float
    qat: bool
    done: list[str]


@dataclass
class Stage:
    """One stage: its name, its optimizer steps, its YAML file, and what that file sets."""

    name: str
    steps: int
    file: Path
    recipe: dict[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.recipe["output_dir"])

    @property
    def measure(self) -> str:
        """What its loss is. QAT learns to be the model before it."""
        return "divergence" if self.name == "QAT" else "loss"


def learning_rate(config: MobileMoEConfig, lora: str | None) -> float:
    """
    2e-5 for S and less for larger models, by the active parameters to the power of -0.85, which meets the 2e-3 of the
    demo's fine-tuning; ten times as much for adapters (LoRA Without Regret, thinkingmachines.ai/blog/lora).
    """
    rate = 2e-5 * (272e6 / config.num_active_parameters) ** 0.85
    rate = min(2e-3, rate) if lora is None else min(5e-3, 10 * rate)
    return float(f"{rate:.1g}")


def sequence_length(examples: Examples, context: int) -> int:
    """Room for the longest example, or for texts, which are split, at most 2,048 tokens."""
    longest = min(examples.longest, 2048) if examples.kind == "text" else examples.longest
    return min(context, max(128, 64 * math.ceil(longest / 64)))


class Report(TrainerCallback):
    """Prints a line per evaluation, in place of the trainer's log."""

    def __init__(self, stage: Stage):
        self.stage, self.loss, self.started, self.first_step = stage, None, time.perf_counter(), 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" not in logs or not state.is_world_process_zero:
            return
        seconds, steps = time.perf_counter() - self.started, state.global_step - self.first_step
        left = seconds / steps * (state.max_steps - state.global_step) if steps else None
        name, measure = self.stage.name, self.stage.measure
        trained = "" if self.loss is None else f"  training {measure} {self.loss:.3f}"
        remaining = "" if left is None else f"  {seconds:.0f} s, about {left:.0f} s left"
        print(
            f"{name}: step {state.global_step}/{state.max_steps}{trained}  "
            f"validation {measure} {logs['eval_loss']:.3f}{remaining}",
            flush=True,
        )


def check_request(model: str, lora: str | None, qat: bool, exports: Sequence[str]) -> tuple[Path, MobileMoEConfig]:
    """
    The directory of the model, and its config.

    Raises:
        ValueError: for a model that cannot be trained, or not in the way that is asked for.
    """
    if lora is not None and lora not in SCOPES:
        raise ValueError(f"--lora {lora} is unknown. Set one of {', '.join(SCOPES)}.")
    directory = local_checkpoint(model)
    if is_pte(directory):
        raise ValueError(f"--model {model} is an exported program. Name the checkpoint that it was exported from.")
    if not is_checkpoint(directory):
        raise ValueError(f"--model {model} has no config.json with weights. Name a checkpoint directory or a Hub id.")
    try:
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{directory / 'config.json'} is damaged: {error}. Fetch or save the model again.") from error
    if kind != MobileMoEConfig.model_type:
        raise ValueError(f"--model {model} is a {kind} model. Name a checkpoint of a MobileMoE model.")
    config = MobileMoEConfig.from_pretrained(directory)
    if config.quantization is not None:
        if lora not in ("attention", "dense"):
            raise ValueError(
                f"--model {model} is packed INT4, whose integers cannot be trained. Add --lora attention or --lora "
                "dense to train an adapter over it, or name the full-precision checkpoint that it was made from."
            )
        if qat or exports:
            raise ValueError(
                f"--model {model} is packed INT4, so only an adapter is trained, which cannot be merged into it: "
                "there is nothing to quantise or export. Leave out --qat and --export, or name the full-precision "
                "checkpoint that it was made from."
            )
    return directory, config


def plan_stages(examples: Examples, config: MobileMoEConfig, output: Path, settings: Settings) -> list[Stage]:
    """Chooses the hyper-parameters of each stage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = sequence_length(examples, config.max_position_embeddings)
    pieces = [
        min(length, example.num_tokens - start)
        for example in examples.train
        for start in range(0, example.num_tokens, length)
    ]
    sequences = len(pack(pieces, length))
    # A power of two, so that an epoch has about as many steps as are aimed for.
    batch = min(MOST_SEQUENCES, 2 ** max(0, math.floor(math.log2(sequences / STEPS_PER_EPOCH))))
    per_device = min(batch, 2 ** max(0, math.floor(math.log2(PASS_TOKENS[device] / length))))
    steps_per_epoch = math.ceil(sequences / batch)
    max_steps = max(1, round(settings.epochs * steps_per_epoch))
    eval_steps = math.ceil(steps_per_epoch / math.ceil(steps_per_epoch / MOST_STEPS))
    common = {
        "data": [{"path": "json", "data_files": str(output / "data/train.jsonl")}],
        "eval_data": [{"path": "json", "data_files": str(output / "data/validation.jsonl")}],
        "max_length": length,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": batch // per_device,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(max_steps / 20),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": device == "cuda" and torch.cuda.is_bf16_supported(),
        "activation_checkpointing": device == "cuda",
        "use_cpu": device == "cpu",
        "logging_steps": max(1, eval_steps // 8),
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": eval_steps,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    lora = {} if settings.lora is None else {"lora_scope": settings.lora, "lora_rank": LORA_RANK}
    first = output / "full-precision" if settings.qat else output
    rate = settings.learning_rate
    places = {"model": settings.model, "output_dir": str(first)}
    stages = [
        Stage("fine-tuning", max_steps, recipe_file(output, False), places | common | lora | {"learning_rate": rate})
    ]
    if settings.qat:
        places = {"model": str(first), "output_dir": str(output)}
        # A twentieth of the rate, as the weights stay near where they begin; and another order of the examples.
        recipe = places | common | {"learning_rate": rate / 20, "seed": 1}
        stages.append(Stage("QAT", max_steps, recipe_file(output, True), recipe))
    return stages


def trained_parameters(config: MobileMoEConfig, lora: str | None) -> int:
    """How many parameters train."""
    if lora is None:
        return config.num_total_parameters
    with torch.device("meta"):
        shapes = target_shapes(MobileMoEForCausalLM(config), lora)
    return num_adapter_parameters(shapes, LORA_RANK, max(1, LORA_RANK // config.num_experts_per_tok))


def plan_text(examples: Examples, config: MobileMoEConfig, settings: Settings, stages: list[Stage]) -> str:
    """
    What the run will do, in a few lines.

    Raises:
        ValueError: when the model does not fit into memory.
    """
    recipe = stages[0].recipe
    trained = trained_parameters(config, settings.lora)
    # LoRA keeps the weights below its adapters, and QAT the model that it starts from.
    frozen = settings.lora is not None or settings.qat
    needed = trained * TRAINED_BYTES + frozen * config.num_total_parameters * FROZEN_BYTES
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    if free is not None and needed > free:
        advice = "Add --lora attention, or use" if settings.lora is None else "Use"
        raise ValueError(
            f"Training {settings.model} needs {needed / 1e9:.1f} GB for weights, gradients and optimizer, and "
            f"{free / 1e9:.1f} GB are free. {advice} a larger machine."
        )
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    learnt, tokens = (sum(map(count, examples.train)) for count in (lambda e: e.num_learnt, lambda e: e.num_tokens))
    what = {"text": "texts", "chat": "conversations", "pair": "prompts with completions"}[examples.kind]
    counted = "all of them" if examples.kind == "text" else f"{learnt:,} of them in answers, which the loss counts"
    lines = [
        f"data        {len(examples.train)} {what} to train on, {len(examples.validation)} to validate with",
        f"tokens      {tokens:,} per epoch, {counted}",
    ]
    if examples.num_empty:
        lines.append(
            f"            {examples.num_empty} rows without a text, or an answer within the context, are left out"
        )
    if examples.num_cut:
        lines.append(f"            {examples.num_cut} are longer than the context of the model and are cut there")
    if examples.unused_columns:
        lines.append(f"            columns that are not used: {', '.join(examples.unused_columns)}")
    scope = "all weights" if settings.lora is None else f"adapters on {settings.lora}, rank {LORA_RANK}"
    lines += [
        f"model       {settings.model}: {config.num_total_parameters / 1e6:,.1f}M parameters, "
        f"{config.num_active_parameters / 1e6:,.1f}M active",
        f"trains      {scope}: {trained:,} parameters",
        f"memory      {needed / 1e9:,.2f} GB for weights, gradients and optimizer, and activations on top",
        f"batch       {batch} x {recipe['max_length']} tokens, packed",
    ]
    for stage in stages:
        rate = stage.recipe["learning_rate"]
        lines.append(
            f"{stage.name:11s} {settings.epochs:g} epochs, {stage.steps} steps, learning rate {rate:.1e}, into "
            f"{stage.output}"
        )
    return "\n".join(lines)


def train_on_examples(
    data: str,
    model: str,
    output: str | Path,
    lora: str | None = None,
    epochs: float = 3.0,
    rate: float | None = None,
    qat: bool = False,
    exports: Sequence[str] = (),
) -> bool:
    """
    What `mobilemoe train` does up to the exports: checks, plans, trains or resumes, and draws the losses.

    Args:
        data (`str`): .jsonl, .json, .csv or .parquet file, or id of a data set on the Hub.
        model (`str`): checkpoint directory or Hub id.
        output (`str` or `Path`): directory of the new model.
        lora (`str`, *optional*): scope of adapters to train in place of all weights.
        epochs (`float`, defaults to 3): how often every example is learnt from.
        rate (`float`, *optional*): peak learning rate; chosen by the size of the model when absent.
        qat (`bool`, defaults to `False`): go on to INT4 quantization-aware training.
        exports (`Sequence[str]`): formats that the caller exports to; only checked here.

    Returns:
        Whether `output` holds a model; over a packed base there is only `output/adapter`.

    Raises:
        ValueError: for data, a model or settings that cannot work, before anything is written.
        OSError: when a file cannot be read or written.
    """
    output = Path(output)
    directory, config = check_request(model, lora, qat, exports)
    if not 0 < epochs <= 1000:
        raise ValueError(f"--epochs {epochs} cannot work. Set a number above 0 and up to 1000.")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"--learning-rate {rate} cannot work. Set a number above 0 and up to 1.")
    before = Settings.load(output / TRAIN_FILE) if (output / TRAIN_FILE).is_file() else None
    first = str(output / "full-precision") if qat else model
    if before is None:
        check_output_dir(str(output), first, "QAT" if qat else fine_tuning_name(lora), overwrite=False)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    examples = read_examples(data, tokenizer, config.max_position_embeddings)
    settings = Settings(
        model=model,
        data=data,
        data_sha256=hashlib.sha256(
            json.dumps([e.row for e in examples.train + examples.validation]).encode()
        ).hexdigest(),
        lora=lora,
        epochs=epochs,
        learning_rate=learning_rate(config, lora) if rate is None else rate,
        qat=qat,
        done=[],
    )
    if before is not None:
        check_same_run(output, before, settings)
        settings.done = before.done
    stages = plan_stages(examples, config, output, settings)
    print(plan_text(examples, config, settings, stages), flush=True)

    output.mkdir(parents=True, exist_ok=True)
    mark_output_dir(str(output), first, "QAT" if qat else fine_tuning_name(lora))
    write_examples(examples.train, output / "data/train.jsonl")
    write_examples(examples.validation, output / "data/validation.jsonl")
    for stage in stages:
        write_text(stage.file, yaml.safe_dump(stage.recipe, sort_keys=False))
    settings.save(output / TRAIN_FILE)
    for stage in stages:
        if stage.name not in settings.done:
            run_stage(stage)
            settings.done.append(stage.name)
            settings.save(output / TRAIN_FILE)
        # The best one is what the stage has saved.
        for checkpoint in saved_checkpoints(str(stage.output)):
            shutil.rmtree(checkpoint)
    draw_losses(stages, output / "loss.png")
    return config.quantization is None


def recipe_file(output: Path, qat: bool) -> Path:
    """The YAML file of the stage that wrote the model."""
    return output / ("qat.yaml" if qat else "sft.yaml")


def check_same_run(output: Path, before: Settings, settings: Settings) -> None:
    """Raises `ValueError` when a directory holds a run with other settings."""
    ignored = {"done", "data"}
    changed = [
        f"{name} was {value}" for name, value in before if name not in ignored and value != settings.as_dict()[name]
    ]
    if changed:
        raise ValueError(
            f"--output {output} holds a run with other settings: {', '.join(changed)}. Repeat them to resume it, set "
            "another --output, or remove the directory."
        )


def run_stage(stage: Stage) -> None:
    """Runs a stage from the beginning, or from its last complete checkpoint."""
    function, part = (quantize_aware, QATArguments) if stage.name == "QAT" else (fine_tune, LoRAArguments)
    arguments = ["--config", str(stage.file)]
    checkpoint = last_checkpoint(str(stage.output))
    if checkpoint is not None:
        print(f"{stage.name}: resuming from {checkpoint}", flush=True)
        arguments += ["--resume_from_checkpoint", "true"]
    # Every name in the file is a path.
    function(*parse_arguments(stage.output, (RecipeArguments, part, SFTConfig), arguments), report=Report(stage))
    losses = losses_by_step(stage, "eval_loss")
    before = losses.pop(0)
    best = min(losses, key=losses.__getitem__)
    print(
        f"{stage.name}: kept step {best}, with a validation {stage.measure} of {losses[best]:.3f}; before training "
        f"{before:.3f}"
    )
    if losses[best] >= before:
        print(f"{stage.name}: it did not fall. Add examples, or lower --learning-rate.")


def losses_by_step(stage: Stage, key: str) -> dict[int, float]:
    """The logged losses of a stage. A resumed run evaluates once more where it begins."""
    history = json.loads((stage.output / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row[key] for row in history if key in row}


def draw_losses(stages: list[Stage], path: Path) -> None:
    """Draws the training and the validation loss of every stage over its optimizer steps."""
    with picture(path, (5.5 * len(stages), 3.6), 1, len(stages)) as axes:
        for axis, stage in zip(axes, stages, strict=True):
            for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
                losses = losses_by_step(stage, key)
                axis.plot(list(losses), list(losses.values()), style, label=label)
            axis.set(xlabel="optimizer step", ylabel=f"{stage.measure} (nats per token)", title=stage.name)
            axis.legend()
