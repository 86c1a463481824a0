"""
Our runner on a device: which files it needs there, how it is started in the directory of a program, and the lines that
it prints (kernels/src/runner.cpp).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from ..artifacts import Export, Record, first_problem, is_pte
from .bundle import LOADER, build_bundle, runner_command
from .device import KEPT, Device, DeviceError


# Beside the directories of the programs: the bundle, or a runner that was built elsewhere.
BUNDLE = "bundle"
BINARY = "runner"
# From the directory of a program.
START = runner_command(f"../{BUNDLE}")
LOADER_PATH = f"{BUNDLE}/{LOADER}"


class Line(Record):
    """Times are in seconds."""

    model_config = ConfigDict(strict=True)


class Loaded(Line):
    event: Literal["loaded"]
    isa: str
    load_s: PositiveFloat
    # Positions whose logits one call gives.
    num_rows: PositiveInt


class Measured(Line):
    event: Literal["measure"]
    # -1 for the pass after loading.
    repeat: int
    prompt_length: PositiveInt
    first_token_s: PositiveFloat
    decode_s: list[PositiveFloat] = Field(min_length=1)


class Sustained(Line):
    event: Literal["sustained"]
    # Of the first one, 0 in milliseconds.
    elapsed_s: NonNegativeFloat
    prefill_tokens_per_s: PositiveFloat
    decode_tokens_per_s: PositiveFloat


class Done(Line):
    event: Literal["done"]
    operators: dict[str, PositiveInt]
    cores: list[NonNegativeInt]
    peak_rss_bytes: NonNegativeInt
    pss_bytes: NonNegativeInt


class Token(Line):
    event: Literal["token"]
    id: NonNegativeInt


class Answered(Line):
    event: Literal["end"]
    # Tokens of the conversation that the cache holds.
    cached: NonNegativeInt


class Failed(Line):
    event: Literal["error"]
    message: str


Event = Loaded | Measured | Sustained | Done | Token | Answered
LINE = TypeAdapter(Annotated[Event | Failed, Field(discriminator="event")])


def check_program_directory(path: Path) -> None:
    """
    Raises:
        ValueError: when a directory holds no program, or has the name of another file of ours on the device.
    """
    name = path.resolve().name
    if name in (BUNDLE, BINARY, KEPT):
        raise ValueError(f"{path}: on the device, a file of ours has the name '{name}'. Rename the directory.")
    if not is_pte(path):
        raise ValueError(
            f"{path} holds no program: a device runs a .pte. Export one: mobilemoe export --model CHECKPOINT --output "
            "DIR"
        )


def program_files(path: Path) -> dict[str, Path]:
    """Files of a program that the runner reads, by their paths on the device."""
    files = (file for file in sorted(path.iterdir()) if file.suffix in (".pte", ".ptd"))
    return {f"{path.resolve().name}/{file.name}": file for file in files}


def bundle_files() -> dict[str, Path]:
    """The runner and its libraries, built on first use, by their paths on the device."""
    return {f"{BUNDLE}/{file.name}": file for file in sorted(build_bundle().iterdir())}


def program_options(report: Export, num_threads: int | None = None, cores: Sequence[int] = ()) -> list[str]:
    """Options of the runner in the directory of a program."""
    options = ["--model", "model.pte"]
    options += ["--data", report.experts_file] if report.experts_file else []
    options += ["--threads", str(num_threads)] if num_threads else []
    return options + (["--cores", ",".join(map(str, cores))] if cores else [])


def read_events(device: Device, lines: Iterable[str], what: str) -> Iterator[Event]:
    """
    The runner's lines; others are left out.

    Raises:
        DeviceError: when the runner reports a failure, or a line is garbled.
        DeviceLost: when it is because the device is gone.
    """
    for line in lines:
        if not line.startswith("{"):
            continue
        try:
            event = LINE.validate_json(line)
        except ValidationError as error:
            if not device.is_connected():
                raise device.lost("the runner's report") from error
            raise DeviceError(
                f"The runner's output is truncated or garbled: {first_problem(error)}, in {line[:300]}"
            ) from error
        if isinstance(event, Failed):
            raise DeviceError(f"The runner failed on {device.name}, on {what}: {event.message}")
        yield event
