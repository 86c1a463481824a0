"""
The stages after fine-tuning, on TRL's trainers: preferences (DPO), rewards (GRPO) and on-policy distillation.

The trainers read whole data sets of prompts, which they shuffle themselves. Of a recipe there are the model in FP32
master weights, the balancing, the routing statistics, and how runs are saved, resumed and stopped.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
)

from modeling_mobilemoe.saving_mobilemoe import replace_when_complete

from ..artifacts import load_tokenizer
from .checkpoints import MixtureCallback, check_output_dir, find_start, mark_output_dir
from .checks import check_numbers
from .data import DataSource, readable, refuse_null
from .documents import UnreadableExample, as_messages
from .recipe import RecipeArguments, load_model, reading_tokenizer, refuse_fsdp, reporters_last, set_up_routing
from .trainer import StopsAtNonFinite


# The columns of each stage, and whose turn a plain text in them is.
ROLES: dict[str, dict[str, str | None]] = {
    "DPO": {"prompt": "user", "chosen": "assistant", "rejected": "assistant"},
    "GRPO": {"prompt": "user", "answer": None},
    "on-policy distillation": {"prompt": "user"},
}
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


class PreferenceTrainer(StopsAtNonFinite, DPOTrainer):
    pass


class RewardTrainer(StopsAtNonFinite, GRPOTrainer):
    pass


class OnPolicyTrainer(StopsAtNonFinite, DistillationTrainer):
    pass


def last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def exact_answer(completions: list[list[dict[str, str]]], answer: list[str], **columns: Any) -> list[float]:
    """1 for a completion whose last number is the answer's, else 0."""
    return [
        float(last_number(completion[-1]["content"]) == last_number(right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def read_prompts(sources: list[DataSource], stage: str):
    """
    The rows of some sources as a `datasets.Dataset` of messages.

    Raises:
        ValueError: for no source, one with a weight or streamed, one that cannot be read, one without a column, or a
            row of which a column is not what it has to be.
    """
    from datasets import Features, List, Value, concatenate_datasets, load_dataset

    if not sources:
        raise ValueError("The recipe names no data. Add a `data` list of {path, ...} to the YAML file.")
    parts = []
    for source in sources:
        if source.streaming or source.weight != 1:
            raise ValueError(
                f"Data source {source} has {'streaming' if source.streaming else f'weight={source.weight:g}'}, but "
                f"{stage} reads every row as often as all others. Leave it out."
            )
        names = ("path", "name", "split", "revision", "data_dir", "data_files")
        arguments = {name: vars(source)[name] for name in names}
        with readable(source):
            refuse_null(source)
            dataset = load_dataset(**arguments)
        columns = {source.columns.get(column, column): column for column in ROLES[stage]}
        missing = [column for column in columns if column not in dataset.column_names]
        if missing or not len(dataset):
            raise ValueError(
                f"Data source {source} has the columns {dataset.column_names} in {len(dataset)} rows, and {stage} "
                f"reads {', '.join(columns)}. Map others with `columns: {{{columns[next(iter(columns))]}: ...}}`."
            )
        dataset = dataset.select_columns(list(columns)).rename_columns(columns)
        convert = partial(_as_messages, source=source, roles=ROLES[stage])
        # Otherwise the answers of one file are numbers, and of another one texts.
        messages = List({"role": Value("string"), "content": Value("string")})
        types = {name: messages if role else Value("string") for name, role in ROLES[stage].items()}
        parts.append(dataset.map(convert, with_indices=True, features=Features(types)))
    return concatenate_datasets(parts)


def _as_messages(row: dict[str, Any], number: int, source: DataSource, roles: dict[str, str | None]) -> dict[str, Any]:
    converted: dict[str, Any] = {}
    for column, role in roles.items():
        try:
            if role is not None:
                turns = as_messages(row[column], role)
                converted[column] = [{key: turn[key] for key in ("role", "content")} for turn in turns]
            elif last_number(str(row[column])) is None:
                raise UnreadableExample("it has no number, so no completion could be right")
            else:
                converted[column] = str(row[column])
        except UnreadableExample as error:
            raise ValueError(
                f"Data source {source}, row {number}, column {column}: {error}. Correct or remove it: {str(row)[:300]}"
            ) from error
    return converted


class _Rows:
    """The place in data that the trainer itself shuffles, and skips when it resumes: only which data they are."""

    max_length = None

    def __init__(self, sources: list[DataSource], num_rows: int):
        self.identity = {"rows_of": [str(source) for source in sources], "rows": num_rows}

    def epoch(self, step: int, max_steps: int) -> float:
        return step / max_steps

    def state(self, num_sequences: int) -> dict:
        return {"identity": self.identity, "readers": {}}


# What a recipe has and these stages have not.
UNUSED = ("shards", "capacity_factor")


def _run(
    stage: str,
    recipe: RecipeArguments,
    training_args: DPOConfig | GRPOConfig | DistillationConfig,
    make: Callable[..., StopsAtNonFinite],
) -> None:
    check_numbers(training_args)
    for name in UNUSED:
        if vars(recipe)[name] is not None:
            raise ValueError(f"{name}={vars(recipe)[name]} is set, and {stage} has no use for it. Leave it out.")
    refuse_fsdp(training_args, f"{stage} has only been tried with whole models")
    if training_args.save_only_model:
        raise ValueError("save_only_model=true: a run could not resume without the optimizer's state. Leave it out.")
    if (training_args.eval_strategy != "no") != bool(recipe.eval_data):
        raise ValueError(
            f"eval_strategy={training_args.eval_strategy} with {len(recipe.eval_data)} sources in eval_data: one "
            "without the other evaluates nothing. Set both or neither."
        )
    if training_args.max_steps < 1 and not training_args.num_train_epochs:
        raise ValueError("Nothing says when to stop. Set max_steps or num_train_epochs.")
    check_output_dir(training_args.output_dir, recipe.model, stage, recipe.overwrite_output_dir)
    tokenizer = reading_tokenizer(load_tokenizer(recipe.tokenizer or recipe.model))
    # Prompts are generated from, so they end at the same place.
    tokenizer.padding_side = "left"
    rows = read_prompts(recipe.data, stage)
    checkpoint, first_step, position = find_start(training_args)
    place = _Rows(recipe.data, len(rows))
    if position is not None and position["identity"] != place.identity:
        raise ValueError(
            f"The checkpoint was trained on other data ({position['identity']}), so its position does not exist in "
            "these. Restore the recipe, or start a new run with `model` set to the checkpoint."
        )
    training_args.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    model = load_model(recipe.model, recipe.attn_implementation)
    routing = set_up_routing(model, recipe, training_args.gradient_accumulation_steps, generates=True)
    per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    trainer = make(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=read_prompts(recipe.eval_data, stage) if recipe.eval_data else None,
        processing_class=tokenizer,
        callbacks=[MixtureCallback(place, per_step, first_step), routing],
    )
    reporters_last(trainer)
    if training_args.process_index == 0:
        mark_output_dir(training_args.output_dir, recipe.model, stage)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_state()
    with replace_when_complete(training_args.output_dir) as partial:
        trainer.save_model(partial)


def prefer(recipe: RecipeArguments, training_args: DPOConfig) -> None:
    """Direct preference optimization: of two answers to a prompt, toward the chosen one."""
    _run("DPO", recipe, training_args, PreferenceTrainer)


def reinforce(recipe: RecipeArguments, training_args: GRPOConfig) -> None:
    """Group relative policy optimization: the model answers, and [`exact_answer`] rewards it."""
    _run("GRPO", recipe, training_args, partial(RewardTrainer, reward_funcs=exact_answer))


def distill(recipe: RecipeArguments, training_args: DistillationConfig) -> None:
    """On-policy distillation: the model answers, and learns a teacher's predictions at its own tokens."""
    teacher = training_args.teacher_model_name_or_path
    if teacher is None:
        raise ValueError("teacher_model_name_or_path is not set, so there is no one to learn from. Name a checkpoint.")
    _run("on-policy distillation", recipe, training_args, partial(_with_teacher, teacher))


def _with_teacher(teacher: str, model: PreTrainedModel, **arguments: Any) -> OnPolicyTrainer:
    loaded = load_model(teacher, model.config._attn_implementation).eval()
    if loaded.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher_model_name_or_path={teacher} has a vocabulary of {loaded.config.vocab_size}, and the model one "
            f"of {model.config.vocab_size}, so their predictions do not compare. Name one with the same tokenizer."
        )
    return OnPolicyTrainer(model=model, teacher_model=loaded, **arguments)
