"""The files that steps exchange: what a path is, its hash, the typed contents of our JSONs, and whole writes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ValidationError


# The built-in shapes; `mobilemoe.shapes` has their sizes.
SIZES = ("S", "M", "L")
SHAPES = (*SIZES, "MobileLLM-Pro")
PROGRAM_FILE = "model.pte"
EXPORT_FILE = "export.json"
EVALUATION_FILE = "report.json"


class Artifact(BaseModel):
    """
    Contents of a JSON. Its keys are the names of the fields; unknown keys are ignored, and a field with a default may
    be absent. A field that was not set is not written.
    """

    what: ClassVar[str] = "a result"
    remedy: ClassVar[str] = "It was cut off or is another file: measure again."
    # A key that only this kind has.
    mark: ClassVar[str] = ""

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """
        Raises:
            ValueError: naming the key and its value, for a file with other contents.
            OSError: when the file cannot be read.
        """
        try:
            # Strict: a number in quotes is an error.
            return cls.model_validate_json(Path(path).read_bytes(), strict=True)
        except ValidationError as error:
            raise ValueError(f"{path} does not hold {cls.what}: {first_problem(error)}. {cls.remedy}") from error

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, self.as_dict())


def first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "json_invalid":
        return f"it is not JSON ({problem['ctx']['error']})"
    if problem["type"] == "missing":
        return f"the key {key} is missing"
    expected = problem["msg"].removeprefix("Input should be ")
    return f"{key or 'its content'} is {repr(problem['input'])[:80]}, expected {expected}"


class Spread(BaseModel):
    """Of repeated measurements, in the unit of the field that holds it."""

    median: float
    p10: float
    p90: float
    min: float
    max: float
    repeats: int


class Machine(BaseModel):
    processor: str
    cores: int | None
    threads: int
    gpu: str | None = None


class LogitAgreement(BaseModel):
    """Logits of two programs, see export/parity.py."""

    # Over positions.
    cosine_median: float
    cosine_mean: float
    cosine_min: float
    sqnr_db: float
    kl_nats: float
    # A share of the positions.
    top1_agreement: float


class Parity(BaseModel):
    """A program against PyTorch, see export/parity.py."""

    positions: int
    pte_to_checkpoint: LogitAgreement
    pte_to_pytorch_with_the_same_roundings: LogitAgreement
    prefill_to_token_by_token: LogitAgreement
    # Each rounding alone, by its name.
    sources: dict[str, LogitAgreement]
    greedy_tokens_equal: int
    greedy_tokens: int


class Export(Artifact):
    """`export.json`, beside the program that it describes."""

    what = "the report of an export"
    remedy = "Export again: mobilemoe export --model CHECKPOINT --output DIR"
    mark = "pte_bytes"

    command: str | None = None
    model: str
    weights_sha256: dict[str, str]
    versions: dict[str, str]
    # `None` without routed experts.
    moe_op: str | None
    expert_axis: str | None
    experts_rounded_twice: bool
    expert_rounding_sqnr_db: float | None
    # Tokens.
    max_seq_len: int
    weights: str
    # `None` in full precision.
    expert_bits: int | None
    embedding_bits: int | None
    kv_cache: Literal["fp32", "int8"]
    all_logits: bool
    eos_ids: list[int]
    experts_file: str | None
    operators: list[str]
    pte_bytes: int
    ptd_bytes: int | None = None
    # Of a program with a tokenizer, once it has run.
    parity: Parity | None = None
    # By stage.
    seconds: dict[str, float] | None = None
    peak_memory_bytes: int | None = None

    @property
    def sources(self) -> list[str]:
        return [self.model]

    def is_of(self, directory: str | os.PathLike) -> bool:
        return self.weights_sha256 == weights_sha256(directory)


class RuntimeExport(Artifact):
    """`export.json` beside what `mobilemoe export --to` wrote for another runtime than ExecuTorch."""

    what = "the report of an export to another runtime"
    remedy = "Export again: mobilemoe export --to FORMAT --model CHECKPOINT --output DIR"
    mark = "to"

    command: str | None = None
    model: str
    to: Literal["gguf", "mlx", "glm4_moe"]
    weights_sha256: dict[str, str]
    versions: dict[str, str]
    # Of packed experts in the checkpoint.
    expert_axis: str | None
    # Types of the matrices and of the experts, where the format has a choice.
    weights: str | None = None
    expert_weights: str | None = None
    # By kind of weight: "bit-exact", or the signal-to-noise ratio in dB.
    rounding: dict[str, str]
    eos_ids: list[int]
    license: str | None
    # Bytes by name.
    files: dict[str, int]
    # Before the comparison, for which whole models are loaded.
    peak_memory_bytes: int
    # Of the runtime with PyTorch, or why there is none.
    parity: LogitAgreement | None
    not_compared: str | None


class ModelDescription(BaseModel):
    """What a model was when it was measured, see [`describe_model`]."""

    name: str
    kind: Literal["checkpoint", "int4", "pte"]
    sha256: str
    bytes: int
    # The content of `config.json`.
    config: dict[str, Any]
    export: Export | None = None

    @property
    def source(self) -> str:
        """Name of the model; of a `.pte`, of the one that it was made from."""
        return self.name if self.export is None else self.export.model

    def is_of(self, directory: str | os.PathLike) -> bool:
        """Whether this is about the checkpoint in a directory, or a `.pte` of it."""
        if self.export is not None:
            return self.export.is_of(directory)
        return self.sha256 == describe_model(directory).sha256


class Score(BaseModel):
    """Shares of one, not percent."""

    score: float
    stderr: float | None


class TaskResult(Artifact, Score):
    """`tasks/NAME.json` of an evaluation."""

    what = "the result of a task"
    remedy = "It was cut off or is another file: delete it, and the task runs again."

    command: str | None = None
    title: str
    task: str
    category: str
    task_versions: dict[str, Any]
    num_fewshot: int
    metric: str
    num_documents: int
    num_truncated: int
    # `None` of a `.pte`, which takes one sequence at a time.
    tokens_per_batch: int | None
    seconds: float
    all_metrics: dict[str, int | float]
    subtasks: dict[str, dict[str, int | float]]
    # Where a setting comes from, a key of `sources` in suites.yaml.
    sources: dict[str, str]
    # Of everything that decides the score.
    fingerprint: str
    data_revision: str | None


class EvaluationSettings(BaseModel):
    suite: str
    # Documents of each task.
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
        """Of a task, or the mean over them."""
        return Score(score=self.mean, stderr=self.mean_stderr) if name == "mean" else self.tasks[name]


class ComparisonRow(BaseModel):
    """In percent and percentage points, by model."""

    title: str
    paper: float | None
    scores: dict[str, float]
    stderr: dict[str, float | None]
    difference: dict[str, float]


class Comparison(Artifact):
    """`comparison.json`, of several evaluations."""

    command: str | None = None
    suite: str
    reference: str
    paper_model: str | None
    # By task, and `mean`.
    rows: dict[str, ComparisonRow]


class ExpertUse(BaseModel):
    # Per layer the share of assignments of every expert.
    load: list[list[float]]
    # Per layer shares of the experts, see `expert_utilisation` in eval/agreement.py.
    used: list[float]
    effective: list[float]


class TextAgreement(BaseModel):
    """Of a model on a text, and of a reference where there is one."""

    bits_per_byte: float
    num_tokens: int
    reference_bits_per_byte: float | None = None
    # Nats per token.
    kl: float | None = None
    # Share of positions with the same most probable token.
    top1: float | None = None
    # Of a checkpoint.
    experts: ExpertUse | None = None


class Check(Artifact):
    """What `mobilemoe eval check --json` writes."""

    what = "the result of a check"
    remedy = "Check again: mobilemoe eval check --model DIR --text DOMAIN=FILE --json FILE"
    mark = "domains"

    command: str | None = None
    model: str
    reference: str | None
    # DOMAIN=FILE.
    texts: list[str]
    max_tokens: int
    # Of `model` and `reference`.
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


class BenchmarkMachine(BaseModel):
    # Of a phone its name and SoC.
    cpu: str
    cores: int | None
    threads: int


class StartSeconds(BaseModel):
    load: float
    first_token: float | None = None


class LengthResult(BaseModel):
    """Of one prompt length. ExecuTorch's benchmark app measures decoding only."""

    prefill_tokens_per_s: Spread | None = None
    first_token_ms: Spread | None = None
    decode_tokens_per_s: Spread
    # Share of the rate at which memory could deliver the weights.
    decode_of_memory_limit: float | None = None


class BenchmarkedModel(BaseModel):
    runtime: str
    # `None` of a model without a file.
    file_bytes: int | None
    # "cold", from the disk, and "warm".
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
    # From here on of a phone. Memory that is this process's own.
    pss_bytes: int | None = None
    instruction_set: str | None = None
    operator_calls: dict[str, int] | None = None
    moe_operator: str | None = None
    # Whether `moe_operator` was seen to run, or only follows from the export.
    proven: bool | None = None
    # What the runner says every few seconds of a long run.
    sustained: list[dict[str, Any]] | None = None


class PhoneCondition(BaseModel):
    """`None` for what a phone does not tell."""

    battery_percent: int | None
    battery_celsius: float | None
    # 0 (none) to 6.
    thermal_status: int | None
    # Of every core.
    mhz: list[int]


class PhoneSample(PhoneCondition):
    # Since the first.
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
    """Its condition is that before the measurement."""

    serial: str
    runner: str
    # Files that it did not have yet.
    copied: list[str]
    after: PhoneCondition
    samples: list[PhoneSample]


class Benchmark(Artifact):
    """What `mobilemoe bench --json` writes."""

    what = "a benchmark of models"
    remedy = "Measure again: mobilemoe bench --model DIR --json FILE"
    mark = "models"

    command: str | None = None
    # "host", "adb", or the name of another program.
    benchmark: str
    # "random tokens", or the file that they are from.
    prompt: str
    new_tokens: int
    machine: BenchmarkMachine
    versions: dict[str, str]
    # A plain sum over memory, 1e9 bytes per second.
    read_gb_per_s: Spread | None = None
    phone: Phone | None = None
    models: dict[str, BenchmarkedModel]

    @property
    def sources(self) -> list[str]:
        """Names of its MobileMoE models; a `.pte` directory is not one."""
        names = [name for name, model in self.models.items() if model.config.get("model_type") == "mobilemoe"]
        return [name for name in names if not is_pte(name)]


class DecodeSpeed(BaseModel):
    context: int
    tokens_per_second: float


class PrefillSpeed(BaseModel):
    tokens: int
    tokens_per_second: float


class DeviceMeasurements(Artifact):
    """Speeds of one model on a device, written by hand or taken from a [`Benchmark`]."""

    what = "the measurements of a device"
    remedy = (
        "It needs `config`, and `decode` with entries of `context` and `tokens_per_second`; or give --bandwidth and "
        "--rate."
    )

    device: str = "device"
    # The content of `config.json`.
    config: dict[str, Any]
    # Bits of a cache entry; those of a program when absent.
    kv_bits: int | None = None
    decode: list[DecodeSpeed]
    prefill: list[PrefillSpeed] = []


def is_pte(model: str | os.PathLike) -> bool:
    """Whether this is a directory that `mobilemoe export` wrote for ExecuTorch."""
    return (Path(model) / PROGRAM_FILE).is_file()


def is_checkpoint(model: str | os.PathLike) -> bool:
    """Whether this is a directory with a `config.json` and weights in safetensors."""
    return (Path(model) / "config.json").is_file() and any(Path(model).glob("*.safetensors"))


def is_shape(model: str | os.PathLike) -> bool:
    """Whether this names a built-in shape; a directory of that name goes first."""
    return str(model) in SHAPES and not Path(model).is_dir()


def result_kind(path: str | os.PathLike) -> type[Evaluation | Benchmark | Export | Check] | None:
    """Which result a file holds; `None` for anything else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError:
        return None
    kinds = (Evaluation, Benchmark, Export, Check)
    return next((kind for kind in kinds if isinstance(content, dict) and kind.mark in content), None)


def read_result(path: str | os.PathLike) -> Evaluation | Benchmark | Export | Check:
    """
    A result from its file, or from the directory that holds `report.json` or `export.json`.

    Raises:
        ValueError: for anything else.
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
        # Fails for what is not a JSON object.
        Artifact.load(file)
        raise ValueError(
            f"{file} is no result. Name report.json of `mobilemoe eval`, export.json of `mobilemoe export`, or what "
            "`mobilemoe bench --json` or `mobilemoe eval check --json` wrote."
        )
    return kind.load(file)


def read_export(directory: str | os.PathLike) -> Export:
    """
    The report of an exported program.

    Raises:
        ValueError: when the directory holds no program, or no report of it.
    """
    for name in (PROGRAM_FILE, EXPORT_FILE):
        if not (Path(directory) / name).is_file():
            raise ValueError(
                f"{directory} holds no {name}. Make one: mobilemoe export --model CHECKPOINT --output DIR"
            )
    return Export.load(Path(directory) / EXPORT_FILE)


def local_checkpoint(model: str | os.PathLike) -> Path:
    """
    The directory itself, or the snapshot of a Hub id.

    Raises:
        ValueError: when it is neither.
    """
    # Takes as long to import as everything else here.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{model} is not a directory, and the Hub does not give it: {error} Name a checkpoint directory; for a "
            "gated model accept its licence on the Hub and log in with `hf auth login`."
        ) from error


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(directory: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of every safetensors file, by name."""
    return {path.name: file_sha256(path) for path in sorted(Path(directory).glob("*.safetensors"))}


def describe_model(model: str | os.PathLike) -> ModelDescription:
    """
    Kind, size and SHA-256 over names and contents of the files that decide what a model answers.

    Raises:
        ValueError: where there is no such model.
    """
    path = local_checkpoint(model)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither model.pte nor config.json. Name a checkpoint or a directory with a .pte."
        )
    config = json.loads((path / "config.json").read_text())
    kind = "int4" if config.get("quantization") or config.get("quantization_config") else "checkpoint"
    suffixes = {".pte", ".ptd", ".safetensors", ".jinja"}
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.suffix in suffixes or file.name in names):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
            size += file.stat().st_size
    exported = {"kind": "pte", "export": read_export(path)} if is_pte(path) else {"kind": kind}
    return ModelDescription(name=str(model), sha256=digest.hexdigest(), bytes=size, config=config, **exported)


@contextmanager
def replace_file(path: str | os.PathLike) -> Generator[Path, None, None]:
    """Gives a temporary path beside `path`; when the block ends well, the file written there takes its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own name for every writer; the suffix stays, by which some writers choose a format.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.partial-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # `mkstemp` makes files that only their owner reads.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    with replace_file(path) as partial:
        partial.write_text(text)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """As [`write_text`], indented by 2."""
    write_text(path, json.dumps(content, indent=2) + "\n")
