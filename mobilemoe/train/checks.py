"""Checks of the fields of a recipe: their types, and that every number is finite and within its range."""

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError


# Smallest number that is more than nothing.
TINY = 1e-12
# Lowest and highest value, for the fields of this package and of `SFTConfig` in which another one makes no sense.
RANGES: dict[str, tuple[float, float]] = {
    "weight": (TINY, 1),
    "expert_bias_update_rate": (0, 1),  # scores are between 0 and 1
    "router_z_loss_coef": (0, 1),
    "lora_rank": (1, 1e6),
    "lora_budget": (1, 1e15),
    "quantize_from_step": (0, 1e12),
    "distill": (0, 1),
    "distill_temperature": (1e-2, 1e2),
    "seed": (0, 2**32 - 1),
    "learning_rate": (0, 10),
    "weight_decay": (0, 10),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e12),
    "warmup_steps": (0, 1e12),
    "num_train_epochs": (0, 1e6),
    "per_device_train_batch_size": (1, 1e6),
    "per_device_eval_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "eval_delay": (0, 1e12),
    "eval_steps": (TINY, 1e12),
    "save_steps": (TINY, 1e12),
    "logging_steps": (TINY, 1e12),
    "label_smoothing_factor": (0, 1),
}
# Types that transformers states too narrowly.
TYPES: dict[str, Any] = {"resume_from_checkpoint": str | bool | None, "fsdp": str | bool | list[str] | None}


def check_numbers(arguments: Any) -> None:
    """
    Refuses numbers that no training can use. NaN passes a comparison such as `value < 0`, and trains to nothing.

    Args:
        arguments: a dataclass of a recipe.

    Raises:
        ValueError: for a number that is not finite or outside of `RANGES`.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if not (math.isfinite(value) and low <= value <= high):
            within = f" from {low:g} to {high:g}" if name in RANGES else ""
            raise ValueError(f"{name}={value} cannot work. Set a finite number{within}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind) | TYPES


def check_types(kind: type, values: Mapping[str, Any], strict: bool = True) -> None:
    """
    Args:
        kind (`type`): a dataclass.
        values (`Mapping[str, Any]`): some of its fields.
        strict (`bool`, defaults to `True`): refuse a number in quotes, which argparse would convert.

    Raises:
        ValueError: for a value of another type than the field's.
    """
    hints = _hints(kind)
    for name, value in values.items():
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            if isinstance(adapter.validate_python(value, strict=strict), int) and isinstance(value, float):
                raise ValueError(f"{name} is {value!r}, expected a whole number without a point.")
        except ValidationError as error:
            number = ""
            if isinstance(value, str) and value[:1].isdigit():
                number = " YAML reads 1e-4 as text: write 1.0e-4."
            expected = inspect.formatannotation(hints[name])
            raise ValueError(f"{name} is {value!r}, expected {expected}.{number}") from error


def read_yaml(path: str, parts: typing.Sequence[type]) -> dict[str, Any]:
    """
    The fields that a YAML file sets. Entries of `data` are checked where they are used.

    Raises:
        ValueError: for a file that is no YAML mapping, an unknown key, or a value of a wrong type. It names both.
        OSError: when the file cannot be read.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} holds {type(values).__name__}, expected lines of the form `field: value`.")
    fields = {name: part for part in parts for name in part.__dataclass_fields__}
    unknown = [key for key in values if key not in fields]
    if unknown:
        similar = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"Did you mean {similar[0]}?" if similar else "Remove it, or see the docstring of the recipe's script."
        raise ValueError(f"{path}: the key {unknown[0]} is no field of this recipe. {hint}")
    for name, value in values.items():
        try:
            if name in ("data", "eval_data"):
                check_types(_Lists, {name: value})
            else:
                check_types(fields[name], {name: value}, strict=False)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return values


class _Lists:
    data: list[Any]
    eval_data: list[Any]
