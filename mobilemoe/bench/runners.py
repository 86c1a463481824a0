"""
The runners of programs on a phone or a board: our own (kernels/README.md), which reports the most, and ExecuTorch's
`llama_main` and benchmark app.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict, PositiveFloat, TypeAdapter, ValidationError
from transformers import AutoConfig

from ..artifacts import Export, Record, first_problem, load_tokenizer, read_export
from ..costs import MOE_GROUP_BITS
from ..device.device import Device
from ..device.runner import (
    BINARY,
    START,
    Done,
    Event,
    Loaded,
    Measured,
    Sustained,
    check_program_directory,
    program_files,
    program_options,
    read_events,
)
from ..machine import spread
from ..results import BenchmarkedModel, LengthResult, Spread, StartSeconds
from .host import check_counts
from .worker import cache_bits, program_bytes_per_token, random_tokens


# Batteries are below it while a phone is idle in a room, and above it after minutes of work.
BATTERY_CELSIUS = 35.0
APP = "org.pytorch.minibench"


class Observer(Record):
    """What `llama_main` prints at its end, in units of `SCALING_FACTOR_UNITS_PER_SECOND`."""

    model_config = ConfigDict(strict=True)

    SCALING_FACTOR_UNITS_PER_SECOND: PositiveFloat
    prompt_tokens: int
    generated_tokens: int
    model_load_start_ms: float
    model_load_end_ms: float
    inference_start_ms: float
    first_token_ms: float
    prompt_eval_end_ms: float
    inference_end_ms: float


class Metric(Record):
    """An entry in the results of ExecuTorch's benchmark app."""

    model_config = ConfigDict(strict=True)

    metric: str
    actualValue: float


METRICS = TypeAdapter(list[Metric])


@dataclass
class PhoneOptions:
    """
    Args:
        prompt_lengths (`Sequence[int]`): prompt lengths in tokens.
        new_tokens (`int`): tokens to decode after each prompt.
        repeats (`int`): rounds; each runs every model once.
        num_threads (`int` or `str`): threads on the device; 4 as in the paper's measurements. "auto" is a thread on
            every fast core and keeps our own runner on these.
        device (`str`): "adb", or "ssh:HOST".
        runner (`str`): "own", "llama_main" or "minibench".
        runner_binary (`str` or `Path`, *optional*): runner built for the device; our own is built where it is left
            out (device/bundle.py), and "minibench" is installed instead.
        serial (`str`, *optional*): serial number of the device, needed when adb has several.
        max_celsius (`float`, *optional*): before every run, wait until the battery of a phone, or the warmest sensor
            of a board, has cooled down to this temperature. 35 for a phone; a board's idle temperature is not known.
        cool_seconds (`float`): maximum time of this wait.
        sustained_seconds (`int`): after the rounds, decode for this long to measure the speed of a hot phone.
        prompt_file (`str` or `Path`, *optional*): text for the prompts; random tokens by default.
        keep (`bool`): keep the models on the device, so that the next run need not copy them.
    """

    prompt_lengths: Sequence[int]
    new_tokens: int = 48
    repeats: int = 5
    num_threads: int | str = 4
    device: str = "adb"
    runner: str = "own"
    runner_binary: str | Path | None = None
    serial: str | None = None
    max_celsius: float | None = None
    cool_seconds: float = 600.0
    sustained_seconds: int = 0
    prompt_file: str | Path | None = None
    keep: bool = False
    # Of the device, with threads on these only. Set when num_threads is "auto".
    cores: Sequence[int] = ()

    def __post_init__(self) -> None:
        counts = {"new_tokens": self.new_tokens, "repeats": self.repeats}
        if isinstance(self.num_threads, int):
            counts["num_threads"] = self.num_threads
        elif self.num_threads != "auto":
            raise ValueError(f"num_threads={self.num_threads!r} is no number. Set 1 or more, or auto.")
        check_counts(self.prompt_lengths, counts)
        if self.max_celsius is None:
            self.max_celsius = BATTERY_CELSIUS if self.device == "adb" else math.inf
        if not self.max_celsius > 0:
            raise ValueError(f"max_celsius={self.max_celsius} is never reached. Set degrees above 0.")
        if self.runner not in ("own", "llama_main", "minibench"):
            raise ValueError(f"runner={self.runner!r} is not known. Set own, llama_main or minibench.")
        if self.runner == "minibench":
            if self.device != "adb":
                raise ValueError(f"runner='minibench' is an Android app, and {self.device} is no phone. Set another.")
            if self.runner_binary is not None or self.sustained_seconds:
                raise ValueError(
                    "The benchmark app is installed on the phone and runs a fixed number of tokens: it takes neither "
                    "runner_binary nor sustained_seconds. Leave them out, or set runner='own'."
                )
        elif self.runner_binary is None and self.runner != "own":
            raise ValueError(
                f"runner={self.runner!r} is not built here. Set runner_binary to one that was built for the device; "
                "docs/phone.md says how."
            )
        elif self.runner_binary is not None and not Path(self.runner_binary).is_file():
            raise ValueError(
                f"runner_binary={self.runner_binary} is not a file. Set the path of a runner that was built for the "
                "device, or leave it out with runner='own'."
            )
        if self.sustained_seconds and self.runner != "own":
            raise ValueError("sustained_seconds needs our own runner. Set runner='own'.")

    @property
    def context(self) -> int:
        """Context length that a program needs, in tokens."""
        return max(self.prompt_lengths) + self.new_tokens

    @property
    def uses_bundle(self) -> bool:
        return self.runner == "own" and self.runner_binary is None

    @property
    def command(self) -> list[str]:
        """The command that starts the runner in a program's directory."""
        return START if self.uses_bundle else [f"../{BINARY}"]


@dataclass
class Program:
    """A `.pte` directory and its measurements."""

    name: str
    path: Path
    report: Export = field(init=False)
    starts: dict[str, StartSeconds] = field(default_factory=dict)
    rows: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    operators: dict[str, int] | None = None
    isa: str | None = None
    peak_memory_bytes: int | None = None
    pss_bytes: int | None = None
    cores: list[int] | None = None
    sustained: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_program_directory(self.path)
        self.report = read_export(self.path)

    @property
    def files(self) -> dict[str, Path]:
        tokenizer = self.path / "tokenizer.json"
        return program_files(self.path) | ({f"{self.name}/{tokenizer.name}": tokenizer} if tokenizer.is_file() else {})

    def add(self, length: int, **measured: float) -> None:
        for name, value in measured.items():
            self.rows.setdefault(length, {}).setdefault(name, []).append(value)

    def moe_operator(self) -> str | None:
        """The operator that computed the experts, as reported by the runner, otherwise by export.json."""
        if self.operators is None:
            return self.report.moe_op
        ran = [name for name in self.operators if name.rsplit(".", 1)[0] in MOE_GROUP_BITS]
        return ran[0].rsplit(".", 1)[0] if ran else None

    def result(self) -> BenchmarkedModel:
        config = AutoConfig.from_pretrained(self.path)
        return BenchmarkedModel(
            runtime="executorch",
            file_bytes=sum(path.stat().st_size for path in program_files(self.path).values()),
            start_seconds=self.starts,
            weight_bytes_per_token=program_bytes_per_token(str(self.path), config),
            kv_bits=cache_bits(str(self.path)),
            config=json.loads(config.to_json_string()),
            peak_memory_bytes=self.peak_memory_bytes,
            pss_bytes=self.pss_bytes,
            instruction_set=self.isa,
            operator_calls=self.operators,
            moe_operator=self.moe_operator(),
            proven=self.operators is not None,
            cores=self.cores,
            **({"sustained": self.sustained} if self.sustained else {}),
            lengths={
                str(length): LengthResult(**{name: Spread(**spread(values)) for name, values in row.items()})
                for length, row in self.rows.items()
            },
        )


def read_inputs(program: Program, options: PhoneOptions) -> list[int] | str:
    """The input of the runner: token ids for our own, text for the others."""
    count = options.context
    # Twice the context, so that rounds can start at different offsets.
    wanted = 2 * count
    if options.runner == "own" and options.prompt_file is None:
        return random_tokens(AutoConfig.from_pretrained(program.path).vocab_size, wanted, 0)
    if not (program.path / "tokenizer.json").is_file():
        raise ValueError(f"{program.path} holds no tokenizer.json, so it cannot use a prompt file. Leave it out.")
    tokenizer = load_tokenizer(program.path)
    if options.prompt_file is None:
        raise ValueError(f"runner={options.runner!r} takes text. Give a prompt file.")
    tokens = tokenizer(Path(options.prompt_file).read_text()).input_ids
    if len(tokens) < count:
        raise ValueError(
            f"The prompt file has {len(tokens)} tokens and {count} are needed. Give a longer text, or shorter lengths."
        )
    if options.runner == "own":
        return tokens[:wanted]
    return tokenizer.decode(tokens[: max(options.prompt_lengths)], skip_special_tokens=True)


def run_own(device: Device, program: Program, options: PhoneOptions, tokens: list[int], repeat: int) -> None:
    """Runs our runner once on `tokens.txt` and parses its JSON lines as they are printed."""
    lengths = options.prompt_lengths if repeat >= 0 else options.prompt_lengths[:1]
    command = [*options.command, *program_options(program.report, int(options.num_threads), options.cores)]
    command += ["--tokens", "tokens.txt", "--prompt-lengths", ",".join(map(str, lengths))]
    command += ["--new-tokens", str(options.new_tokens), "--repeats", "1", "--first-repeat", str(max(repeat, 0))]
    command += ["--cold"] if repeat < 0 else []
    if repeat == options.repeats - 1 and options.sustained_seconds:
        command += ["--sustained", str(options.sustained_seconds)]
    done = False
    lines = device.lines(*command, directory=device.path(program.name))
    for event in read_events(device, lines, program.name):
        record(program, event, repeat)
        done = isinstance(event, Done)
    if not done or (repeat >= 0 and not program.rows):
        raise OSError(f"The runner stopped before the end of {program.name}. Run it again.")


def record(program: Program, event: Event, repeat: int) -> None:
    """Adds what the runner reported in a line."""
    state = "cold" if repeat < 0 else "warm"
    if isinstance(event, Loaded):
        program.isa = event.isa
        program.starts.setdefault(state, StartSeconds(load=event.load_s))
    elif isinstance(event, Measured) and event.repeat < 0:
        if state in program.starts and program.starts[state].first_token is None:
            program.starts[state].first_token = event.first_token_s
    elif isinstance(event, Measured) and repeat >= 0:
        program.add(
            event.prompt_length,
            prefill_tokens_per_s=event.prompt_length / event.first_token_s,
            first_token_ms=1e3 * event.first_token_s,
            decode_tokens_per_s=len(event.decode_s) / sum(event.decode_s),
        )
    elif isinstance(event, Sustained):
        program.sustained.append(event.model_dump(exclude={"event"}))
    elif isinstance(event, Done):
        program.operators = event.operators
        program.cores = sorted({*(program.cores or ()), *event.cores})
        program.peak_memory_bytes = max(program.peak_memory_bytes or 0, event.peak_rss_bytes)
        program.pss_bytes = max(program.pss_bytes or 0, event.pss_bytes)


def run_llama_main(device: Device, program: Program, options: PhoneOptions, text: str, repeat: int) -> None:
    """Runs ExecuTorch's `llama_main` once per prompt length. Shorter prompts are prefixes of the text."""
    state = "cold" if repeat < 0 else "warm"
    for length in options.prompt_lengths[: 1 if repeat < 0 else None]:
        # Cut by characters. The recorded length is the number of tokens that the runner reports.
        prompt = text[: max(1, len(text) * length // max(options.prompt_lengths))]
        command = [*options.command, "--model_path", "model.pte", "--tokenizer_path", "tokenizer.json"]
        command += [
            "--prompt",
            prompt,
            "--temperature",
            "0",
            "--ignore_eos",
            "--cpu_threads",
            str(options.num_threads),
        ]
        command += ["--max_new_tokens", str(options.new_tokens)]
        command += ["--data_paths", program.report.experts_file] if program.report.experts_file else []
        output = "\n".join(device.lines(*command, directory=device.path(program.name)))
        try:
            measured = parse_observer(output)
        except ValueError as error:
            raise OSError(f"{program.name}: {error}") from error
        program.starts.setdefault(state, StartSeconds(load=measured["load"], first_token=measured["first_token"]))
        if repeat >= 0:
            program.add(
                measured["prompt_tokens"],
                prefill_tokens_per_s=measured["prompt_tokens"] / measured["prefill"],
                first_token_ms=1e3 * measured["first_token"],
                decode_tokens_per_s=measured["new_tokens"] / measured["decode"],
            )


def run_minibench(device: Device, program: Program, options: PhoneOptions, text: str, repeat: int) -> None:
    """
    Starts ExecuTorch's benchmark app once. It measures decoding and loading only.

    The app runs the first `.pte` of the directory, at first on synthetic inputs. It gets two of these iterations: with
    fewer it crashes without a message.
    """
    if repeat < 0:
        return
    directory = device.path(program.name)
    device.shell("chmod", "-R", "a+rX", directory)
    device.shell("run-as", APP, "rm", "-f", "files/benchmark_results.json", check=False)
    start = ["am", "start", "-W", "-S", "-n", f"{APP}/.BenchmarkActivity", "--es", "model_dir", directory]
    start += ["--es", "tokenizer_path", f"{directory}/tokenizer.json", "--es", "prompt", text]
    start += ["--ei", "num_iter", "2", "--ei", "num_warm_up_iter", "0", "--ef", "temperature", "0"]
    said = device.shell(*start)
    if "Error" in said:
        raise OSError(f"The benchmark app did not start: {said.strip()[-300:]}")
    output = wait_for(
        lambda: device.shell("run-as", APP, "cat", "files/benchmark_results.json", check=False),
        lambda: not device.shell("pidof", APP, check=False).strip(),
        f"the benchmark app on {program.name}",
    )
    try:
        metrics = parse_minibench(output)
    except ValueError as error:
        raise OSError(f"{program.name}: {error}") from error
    if "llm_model_load_time(ms)" in metrics:
        program.starts.setdefault("warm", StartSeconds(load=metrics["llm_model_load_time(ms)"] / 1e3))
    if "ram_pss_usage(mb)" in metrics:
        program.pss_bytes = int(1e6 * metrics["ram_pss_usage(mb)"])
    program.add(max(options.prompt_lengths), decode_tokens_per_s=metrics["token_per_sec"])


def wait_for(read: Callable[[], str], ended: Callable[[], bool], what: str, seconds: float = 600.0) -> str:
    """Polls `read` until it returns a complete JSON list. Raises `OSError` if the process ends without one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        gone = ended()
        output = read().strip()
        if output.startswith("[") and output.endswith("]"):
            return output
        if gone:
            raise OSError(f"It crashed: {what} left no result. See `adb logcat -d`.")
        time.sleep(0.5)
    raise OSError(f"{what} did not finish within {seconds:.0f} s.")


def parse_observer(text: str) -> dict:
    """
    Parses the output of ExecuTorch's `llama_main` (extension/llm/runner/stats.h). Times are in seconds.

    Raises:
        ValueError: when the line that starts with `PyTorchObserver` is missing, truncated, or reports no tokens.
    """
    line = next((line for line in text.splitlines() if line.startswith("PyTorchObserver ")), None)
    if line is None:
        raise ValueError(f"llama_main printed no PyTorchObserver line; it ended with:\n{text[-1000:]}")
    try:
        stats = Observer.model_validate_json(line.removeprefix("PyTorchObserver "))
    except ValidationError as error:
        raise ValueError(
            f"The PyTorchObserver line of llama_main is damaged: {first_problem(error)}, in {line[:300]}"
        ) from error
    second = stats.SCALING_FACTOR_UNITS_PER_SECOND
    measured = {
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.generated_tokens,
        "load": (stats.model_load_end_ms - stats.model_load_start_ms) / second,
        "first_token": (stats.first_token_ms - stats.inference_start_ms) / second,
        "prefill": (stats.prompt_eval_end_ms - stats.inference_start_ms) / second,
        "decode": (stats.inference_end_ms - stats.prompt_eval_end_ms) / second,
    }
    if min(measured["prompt_tokens"], measured["new_tokens"]) < 1 or min(measured["prefill"], measured["decode"]) <= 0:
        raise ValueError(f"llama_main measured nothing: {line[:300]} Give a longer prompt or more new tokens.")
    return measured


def parse_minibench(text: str) -> dict:
    """
    Parses `benchmark_results.json` of ExecuTorch's benchmark app. Returns metrics by name.

    Raises:
        ValueError: when the file is truncated or is not a list of metrics.
    """
    try:
        metrics = {row.metric: row.actualValue for row in METRICS.validate_json(text)}
    except ValidationError as error:
        raise ValueError(f"benchmark_results.json is damaged: {first_problem(error)}, in {text[:300]}") from error
    if metrics.get("token_per_sec", 0) <= 0:
        raise ValueError(
            f"benchmark_results.json has no token_per_sec, so the app generated nothing: {sorted(metrics)}"
        )
    return metrics
