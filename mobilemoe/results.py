"""Results of measurements: the typed contents of the JSON files, and how a file is recognised."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .artifacts import EXPORT_FILE, Artifact, Export, ModelDescription, Record, is_pte


EVALUATION_FILE = "report.json"
Metric = int | Annotated[float, Field(allow_inf_nan=True)]


class Spread(Record):
    """Spread of repeated measurements, in the unit of the field that holds it."""

    median: float
    p10: float
    p90: float
    min: float
    max: float
    repeats: int


class Machine(Record):
    processor: str
    cores: int | None
    threads: int
    gpu: str | None = None


class Score(Record):
    """Fractions from 0 to 1, not percent."""

    score: float
    stderr: float | None


class TaskResult(Artifact, Score):
    """`tasks/NAME.json` of an evaluation."""

    what = "the result of a task"
    remedy = "It is truncated or is another file: delete it, and the task runs again."

    command: str | None = None
    title: str
    task: str
    category: str
    task_versions: dict[str, Any]
    num_fewshot: int
    metric: str
    num_documents: int
    num_truncated: int
    # `None` for a `.pte`, which runs one sequence at a time.
    tokens_per_batch: int | None
    seconds: float
    # Some, such as a perplexity, may overflow.
    all_metrics: dict[str, Metric]
    subtasks: dict[str, dict[str, Metric]]
    # Source of each setting, a key of `sources` in suites.yaml.
    sources: dict[str, str]
    # Hash of everything that determines the score.
    fingerprint: str
    data_revision: str | None


class EvaluationSettings(Record):
    suite: str
    # Maximum number of documents of each task.
    limit: int | None
    dtype: str
    apply_chat_template: bool
    seeds: dict[str, int]
    versions: dict[str, str]


class Evaluation(Artifact):
    """`report.json` of an evaluation."""

    what = "the report of an evaluation"
    remedy = "Evaluate again: mobilemoe eval --model DIR --output DIR"
    mark = "settings"

    command: str | None = None
    created: str
    model: ModelDescription
    settings: EvaluationSettings
    machine: Machine
    tasks: dict[str, TaskResult]
    left_out: list[str]
    mean: float | None
    mean_stderr: float | None

    @property
    def description(self) -> ModelDescription:
        return self.model

    @property
    def sources(self) -> list[str]:
        return [self.description.source]

    def is_of(self, directory: str | os.PathLike) -> bool:
        return self.description.is_of(directory)

    def result(self, name: str) -> Score:
        """The score of a task, or of `"mean"`, the mean over tasks."""
        if name != "mean":
            return self.tasks[name]
        if self.mean is None:
            raise ValueError(f"The evaluation of {self.description.name} has no tasks, so no mean. Run it with some.")
        return Score(score=self.mean, stderr=self.mean_stderr)


class ComparisonRow(Record):
    """Scores in percent and differences in percentage points, by model."""

    title: str
    paper: float | None
    scores: dict[str, float]
    stderr: dict[str, float | None]
    difference: dict[str, float]


class Comparison(Artifact):
    """`comparison.json`, the comparison of several evaluations."""

    command: str | None = None
    suite: str
    reference: str
    paper_model: str | None
    # By task, with `mean` last.
    rows: dict[str, ComparisonRow]


class ExpertUse(Record):
    # Per layer, the share of the assignments that each expert gets.
    load: list[list[float]]
    # Per layer, shares of the number of experts, see `expert_utilisation` in eval/agreement.py.
    used: list[float]
    effective: list[float]


class TextAgreement(Record):
    """Bits per byte of a model on a text, and its agreement with a reference model if one is given."""

    bits_per_byte: float
    num_tokens: int
    reference_bits_per_byte: float | None = None
    # Nats per token.
    kl: float | None = None
    # Share of positions with the same most probable token.
    top1: float | None = None
    # For checkpoints only.
    experts: ExpertUse | None = None


class Check(Artifact):
    """What `mobilemoe eval check --json` writes."""

    what = "the result of a check"
    remedy = "Check again: mobilemoe eval check --model DIR --text DOMAIN=FILE --json FILE"
    mark = "domains"

    command: str | None = None
    model: str
    reference: str | None
    # As given on the command line, DOMAIN=FILE.
    texts: list[str]
    max_tokens: int
    # By role: `model` and `reference`.
    descriptions: dict[str, ModelDescription]
    machine: Machine
    domains: dict[str, TextAgreement]

    @property
    def description(self) -> ModelDescription:
        return self.descriptions["model"]

    @property
    def sources(self) -> list[str]:
        return [self.description.source]

    def is_of(self, directory: str | os.PathLike) -> bool:
        return self.description.is_of(directory)


class BenchmarkMachine(Record):
    # For a phone, its name and SoC.
    cpu: str
    cores: int | None
    threads: int


class StartSeconds(Record):
    load: float
    first_token: float | None = None


class LengthResult(Record):
    """Speeds at one prompt length. ExecuTorch's benchmark app measures decoding only."""

    prefill_tokens_per_s: Spread | None = None
    first_token_ms: Spread | None = None
    decode_tokens_per_s: Spread
    # Decode speed as a share of the memory-bandwidth limit.
    decode_of_memory_limit: float | None = None


class BenchmarkedModel(Record):
    runtime: str
    # `None` for a model without files.
    file_bytes: int | None
    # By "cold" (files read from disk) and "warm" (files in the page cache).
    start_seconds: dict[str, StartSeconds]
    weight_bytes_per_token: int | None
    kv_bits: int
    # The content of `config.json`.
    config: dict[str, Any]
    peak_memory_bytes: int | None = None
    # By prompt length in tokens.
    lengths: dict[str, LengthResult]
    # By prompt length, phase and operator.
    operator_ms: dict[str, dict[str, dict[str, float]]] | None = None
    # The fields from here on are set for phones only. Proportional set size (PSS) of the process.
    pss_bytes: int | None = None
    instruction_set: str | None = None
    operator_calls: dict[str, int] | None = None
    moe_operator: str | None = None
    # True if the runner reported `moe_operator` as executed, false if it was read from export.json.
    proven: bool | None = None
    # Cores on which threads of the runner were found after the measurements.
    cores: list[int] | None = None
    # Periodic reports of the runner during a sustained run.
    sustained: list[dict[str, Any]] | None = None


class PhoneCondition(Record):
    """Battery, temperature and clocks; `None` for what the phone does not report."""

    battery_percent: int | None
    battery_celsius: float | None
    # Of a board, by the kernel's name of the sensor.
    zones_celsius: dict[str, float] = {}
    # 0 (none) to 6.
    thermal_status: int | None
    # Clock of every core.
    mhz: list[int]


class PhoneSample(PhoneCondition):
    # Seconds since the first sample.
    seconds: float


class PhoneFingerprint(PhoneCondition):
    model: str
    soc: str
    abi: str | None
    max_mhz: list[int]
    memory_bytes: int | None
    android: str | None
    build: str | None


class Phone(PhoneFingerprint):
    """The phone or board of a benchmark. The inherited condition was read before the measurement."""

    # Of a phone; of a board, its name for ssh.
    serial: str
    runner: str
    # Files that had to be copied to the phone.
    copied: list[str]
    after: PhoneCondition
    samples: list[PhoneSample]


class Benchmark(Artifact):
    """What `mobilemoe bench --json` writes."""

    what = "a benchmark of models"
    remedy = "Measure again: mobilemoe bench --model DIR --json FILE"
    mark = "models"

    command: str | None = None
    # "host", "adb", "ssh", or the name of another program.
    benchmark: str
    # "random tokens", or the path of the prompt file.
    prompt: str
    new_tokens: int
    machine: BenchmarkMachine
    versions: dict[str, str]
    # Read bandwidth of memory by a plain loop on as many threads, in 1e9 bytes per second. `None` without a compiler.
    read_gb_per_s: Spread | None = None
    phone: Phone | None = None
    models: dict[str, BenchmarkedModel]

    @property
    def sources(self) -> list[str]:
        """Names of the MobileMoE models in it, without `.pte` directories."""
        names = [name for name, model in self.models.items() if model.config.get("model_type") == "mobilemoe"]
        return [name for name in names if not is_pte(name)]


class RuntimeTrial(Record):
    """One shape in one runtime at one prompt length. A spread is over invocations, unless it says otherwise."""

    shape: str
    # "executorch" from Python, "runner" (ExecuTorch in our C++ program) or "llama.cpp".
    runtime: str
    prompt_length: int
    # Processes that compute on the same machine meanwhile.
    busy_processes: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    # Over all decoded tokens.
    token_ms: Spread
    # Largest resident memory up to this prompt length.
    peak_memory_bytes: int
    # Weights and cache that decoding a token reads.
    bytes_per_token: int
    # Speed as a multiple of llama.cpp's in the same invocation.
    prefill_over_llama_cpp: Spread | None = None
    decode_over_llama_cpp: Spread | None = None
    # Speed as a multiple of MobileLLM-Pro's shape in the same runtime and invocation.
    prefill_over_dense: Spread | None = None
    decode_over_dense: Spread | None = None
    # Share of the decode speed that the memory's read bandwidth allows, without other processes.
    decode_of_memory_limit: Spread | None = None
    # Share of positions with llama.cpp's most probable next token, where both compute the same function.
    top1_agreement: float | None = None


class RuntimeComparison(Artifact):
    """What `benchmarks/bench_llama_cpp.py` prints and writes."""

    what = "a comparison of runtimes"
    remedy = "Measure again: python benchmarks/bench_llama_cpp.py --json FILE"
    mark = "trials"

    command: str | None = None
    machine: BenchmarkMachine
    versions: dict[str, str]
    # Of the programs and of llama.cpp, in tokens.
    context: int
    new_tokens: int
    # Processes per model, and rounds within each.
    invocations: int
    repeats: int
    # Read bandwidth of memory by a plain loop on as many threads, in 1e9 bytes per second.
    read_gb_per_s: Spread
    # File sizes by shape and suffix.
    file_bytes: dict[str, dict[str, int]]
    trials: list[RuntimeTrial]


class DecodeSpeed(Record):
    context: int
    tokens_per_second: float


class PrefillSpeed(Record):
    tokens: int
    tokens_per_second: float


class DeviceMeasurements(Artifact):
    """Speeds of one model on a device, written by hand or read from a [`Benchmark`]."""

    what = "the measurements of a device"
    remedy = (
        "It needs `config`, and `decode` with entries of `context` and `tokens_per_second`; or give --bandwidth and "
        "--rate."
    )

    device: str = "device"
    # The content of `config.json`.
    config: dict[str, Any]
    # Bits of a cache entry; by default those of an exported program.
    kv_bits: int | None = None
    decode: list[DecodeSpeed]
    prefill: list[PrefillSpeed] = []


def result_kind(path: str | os.PathLike) -> type[Evaluation | Benchmark | Export | Check] | None:
    """The kind of result in a file; `None` if it is not a result."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return None
    kinds = (Evaluation, Benchmark, Export, Check)
    return next((kind for kind in kinds if isinstance(content, dict) and kind.mark in content), None)


def read_result(path: str | os.PathLike) -> Evaluation | Benchmark | Export | Check:
    """
    Reads a result from its file, or from a directory with `report.json` or `export.json`.

    Raises:
        ValueError: when the path is not a result.
    """
    path = Path(path)
    names = [name for name in (EVALUATION_FILE, EXPORT_FILE) if (path / name).is_file()]
    if path.is_dir() and len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} of {EVALUATION_FILE} and {EXPORT_FILE}. Name one file.")
    file = path / names[0] if names else path
    if not file.is_file():
        raise ValueError(f"There is no result {path}. Name a JSON that `mobilemoe eval`, `bench` or `export` wrote.")
    kind = result_kind(file)
    if kind is None:
        # Raises if the file is not a JSON object.
        Artifact.load(file)
        raise ValueError(
            f"{file} is not a result. Name report.json of `mobilemoe eval`, export.json of `mobilemoe export`, or a "
            "file that `mobilemoe bench --json` or `mobilemoe eval check --json` wrote."
        )
    return kind.load(file)
