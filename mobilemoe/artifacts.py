"""The files that commands exchange: recognising and hashing models, typed JSON files, atomic writes."""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The built-in shapes; `mobilemoe.shapes` has their sizes.
SIZES = ("S", "M", "L")
SHAPES = (*SIZES, "MobileLLM-Pro")
PROGRAM_FILE = "model.pte"
GGUF_FILE = "model.gguf"
EXPORT_FILE = "export.json"
# OWNER/NAME. Other names can only be paths.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The messages of the Hub mention neither the licence nor how to log in.
GATED = (
    "{name} is gated: only accounts that have accepted its licence can download it. "
    "Accept the licence at https://huggingface.co/{name}, then log in with `hf auth login`."
)


class Record(BaseModel):
    """A part of a JSON file. NaN and infinity, which JSON of Python has and no measurement, are refused."""

    model_config = ConfigDict(allow_inf_nan=False)


class Artifact(Record):
    """
    The contents of a JSON file. Its keys are the field names. Unknown keys are ignored, and a field with a default may
    be absent. Fields that were not set are not written.
    """

    what: ClassVar[str] = "a result"
    remedy: ClassVar[str] = "It is truncated or is another file: measure again."
    # A key that only this kind of file has.
    mark: ClassVar[str] = ""

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """
        Raises:
            ValueError: when the contents do not match. The message names the key and its value.
            OSError: when the file cannot be read.
        """
        try:
            # Strict: a number in quotes is rejected.
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


class LogitAgreement(Record):
    """Agreement of the logits of two programs, see export/parity.py."""

    # Cosine similarity over positions.
    cosine_median: float
    cosine_mean: float
    cosine_min: float
    sqnr_db: float
    kl_nats: float
    # Share of positions with the same most probable token.
    top1_agreement: float


class Parity(Record):
    """Agreement of a program with PyTorch, see export/parity.py."""

    positions: int
    pte_to_checkpoint: LogitAgreement
    pte_to_pytorch_with_the_same_roundings: LogitAgreement
    prefill_to_token_by_token: LogitAgreement
    # The effect of each rounding alone, by its name.
    sources: dict[str, LogitAgreement]
    greedy_tokens_equal: int
    greedy_tokens: int


class Export(Artifact):
    """`export.json`, stored next to the program that it describes."""

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
    kv_cache: Literal["fp32", "bf16", "int8"]
    all_logits: bool
    eos_ids: list[int]
    experts_file: str | None
    operators: list[str]
    pte_bytes: int
    ptd_bytes: int | None = None
    # Of the whole files, and of the program without its weights.
    pte_sha256: str | None = None
    ptd_sha256: str | None = None
    pte_head_sha256: str | None = None
    # Set once the program was compared with PyTorch; needs a tokenizer.
    parity: Parity | None = None
    # Seconds by stage.
    seconds: dict[str, float] | None = None
    peak_memory_bytes: int | None = None

    @property
    def sources(self) -> list[str]:
        return [self.model]

    def is_of(self, directory: str | os.PathLike) -> bool:
        return self.weights_sha256 == weights_sha256(directory)


class RuntimeExport(Artifact):
    """`export.json` of `mobilemoe export --to`, which exports to a runtime other than ExecuTorch."""

    what = "the report of an export to another runtime"
    remedy = "Export again: mobilemoe export --to FORMAT --model CHECKPOINT --output DIR"
    mark = "to"

    command: str | None = None
    model: str
    to: Literal["gguf", "mlx", "glm4_moe"]
    weights_sha256: dict[str, str]
    versions: dict[str, str]
    # Axis of the groups of packed experts in the checkpoint.
    expert_axis: str | None
    # Quantisation types of the matrices and of the experts, where the format has a choice.
    weights: str | None = None
    expert_weights: str | None = None
    # By kind of weight: "bit-exact", or the signal-to-noise ratio in dB.
    rounding: dict[str, str]
    eos_ids: list[int]
    license: str | None
    # File sizes in bytes, by name.
    files: dict[str, int]
    # Measured before the comparison, which loads whole models.
    peak_memory_bytes: int
    # Agreement of the runtime with PyTorch; without it, `not_compared` gives the reason.
    parity: LogitAgreement | None
    not_compared: str | None


class ModelFile(Artifact):
    """A JSON file of a checkpoint, as far as it must be so that transformers and tokenizers can read it."""

    remedy = "It is truncated or damaged: fetch it again, or save the model again."


class ConfigFile(ModelFile):
    what = "the configuration of a model"

    model_type: str


class GenerationFile(ModelFile):
    what = "how a model generates"

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class TokenizerFile(ModelFile):
    what = "a tokenizer"

    model: dict[str, Any]
    added_tokens: list[dict[str, Any]] = []


class TokenizerConfigFile(ModelFile):
    what = "the settings of a tokenizer"

    tokenizer_class: str | None = None
    chat_template: str | list[dict[str, str]] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    model_max_length: int | float | None = None
    model_input_names: list[str] | None = None
    clean_up_tokenization_spaces: bool | None = None


MODEL_FILES: dict[str, type[ModelFile]] = {
    "config.json": ConfigFile,
    "generation_config.json": GenerationFile,
    "tokenizer.json": TokenizerFile,
    "tokenizer_config.json": TokenizerConfigFile,
}


def check_model_files(directory: str | os.PathLike) -> None:
    """
    Checks the JSON files of a checkpoint or a program, those that it has.

    Raises:
        ValueError: for one that is not what transformers reads. The message names the file, the key and its value.
    """
    for name in MODEL_FILES:
        path = Path(directory) / name
        if path.is_file():
            stat = path.stat()
            _check_model_file(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


# A tokenizer takes a tenth of a second, and a command opens a model several times.
@functools.lru_cache
def _check_model_file(path: Path, *version: int) -> None:
    MODEL_FILES[path.name].load(path)


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerBase":
    """
    The tokenizer of a directory or a Hub id.

    Raises:
        ValueError: when its files are damaged.
        OSError: when there are none.
    """
    from transformers import AutoTokenizer

    if Path(path).is_dir():
        check_model_files(path)
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path))
    except (ValueError, OSError):
        raise
    # The tokenizers library raises this class itself, and transformers what a value of another type leads to.
    except Exception as error:
        raise ValueError(
            f"The tokenizer of {path} cannot be read: {str(error)[:300]}. {TokenizerFile.remedy}"
        ) from error


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """
    The content of `config.json`.

    Raises:
        ValueError: when it is not the configuration of a model.
        OSError: when it cannot be read.
    """
    path = Path(directory) / "config.json"
    ConfigFile.load(path)
    return json.loads(path.read_bytes())


class ModelDescription(Record):
    """The model that a measurement is about, see [`describe_model`]."""

    name: str
    kind: Literal["checkpoint", "int4", "pte"]
    sha256: str
    bytes: int
    # The content of `config.json`.
    config: dict[str, Any]
    export: Export | None = None

    @property
    def source(self) -> str:
        """Name of the model; for a `.pte`, of the checkpoint that it was exported from."""
        return self.name if self.export is None else self.export.model

    def is_of(self, directory: str | os.PathLike) -> bool:
        """Whether this describes the checkpoint in a directory, or a `.pte` exported from it."""
        if self.export is not None:
            return self.export.is_of(directory)
        return self.sha256 == describe_model(directory).sha256


def is_pte(model: str | os.PathLike) -> bool:
    """Whether this is a directory that `mobilemoe export` wrote for ExecuTorch."""
    return (Path(model) / PROGRAM_FILE).is_file()


def find_gguf(model: str | os.PathLike) -> Path | None:
    """The GGUF file that this is, or that the directory of `mobilemoe export --to gguf` holds."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    return path / GGUF_FILE if (path / GGUF_FILE).is_file() else None


def is_checkpoint(model: str | os.PathLike) -> bool:
    """Whether this is a directory with a `config.json` and weights in safetensors."""
    return (Path(model) / "config.json").is_file() and any(Path(model).glob("*.safetensors"))


def is_shape(model: str | os.PathLike) -> bool:
    """Whether this names a built-in shape. A directory of that name takes precedence."""
    return str(model) in SHAPES and not Path(model).is_dir()


def read_export(directory: str | os.PathLike) -> Export:
    """
    The export report of a program.

    Raises:
        ValueError: when the directory lacks the program or its report.
    """
    for name in (PROGRAM_FILE, EXPORT_FILE):
        if not (Path(directory) / name).is_file():
            raise ValueError(
                f"{directory} holds no {name}. Make one: mobilemoe export --model CHECKPOINT --output DIR"
            )
    return Export.load(Path(directory) / EXPORT_FILE)


def local_checkpoint(model: str | os.PathLike) -> Path:
    """
    The directory itself, or the snapshot of a Hub id, downloaded unless the cache has it.

    A save over the directory that was killed is ended first.

    Raises:
        ValueError: when it is neither, or a JSON file in it is damaged. A name that can only be a path is not looked
            up on the Hub.
    """
    if Path(model).is_dir():
        config = Path(model) / "config.json"
        if config.is_file() and b'"transformers_weights"' in config.read_bytes():
            # Not a file of ours as it should be: a save over it was killed. Imported here, where it is needed.
            from modeling_mobilemoe.saving_mobilemoe import finish_save

            finish_save(model)
        check_model_files(model)
        return Path(model)
    name = str(model)
    if name in SHAPES:
        raise ValueError(
            f"{name} is a shape without trained weights, which only `mobilemoe bench` takes. Name a checkpoint "
            "directory or a Hub id."
        )
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"There is no directory {name}. Name a checkpoint directory or a Hub id, OWNER/NAME.")
    # Imported here: it takes as long as all other imports of this module together.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # Unlike `from_pretrained`, it does not try again and again when the network is down.
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "README.md"]))
    except OSError as error:
        if is_gated(error):
            raise ValueError(GATED.format(name=name)) from error
        chain = list(causes(error))
        if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
            problem = "the Hub has no model of this name that is open to you. Correct it, or log in: `hf auth login`"
        else:
            reason = str(chain[-1]).rstrip(".")
            problem = f"it cannot be downloaded from the Hub: {reason}. Correct the name, or check the network"
        raise ValueError(f"There is no directory {name}, and {problem}.") from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def is_gated(error: OSError) -> bool:
    """Whether a download failed because the model's licence has not been accepted."""
    from huggingface_hub.errors import GatedRepoError

    return any(isinstance(cause, GatedRepoError) for cause in causes(error))


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(directory: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of every safetensors file, by name."""
    return {path.name: file_sha256(path) for path in sorted(Path(directory).glob("*.safetensors"))}


def describe_model(model: str | os.PathLike) -> ModelDescription:
    """
    Kind, size and SHA-256 of a model, over the names and contents of the files that determine its output.

    Raises:
        ValueError: when there is no such model.
    """
    path = local_checkpoint(model)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither model.pte nor config.json. Name a checkpoint or a directory with a .pte."
        )
    config = read_config(path)
    kind = "int4" if config.get("quantization") or config.get("quantization_config") else "checkpoint"
    suffixes = {".pte", ".ptd", ".safetensors", ".jinja"}
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.suffix in suffixes or file.name in names):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
            size += file.stat().st_size
    description = ModelDescription(name=str(model), kind=kind, sha256=digest.hexdigest(), bytes=size, config=config)
    if is_pte(path):
        description.kind, description.export = "pte", read_export(path)
    return description


def nearest_existing(path: str | os.PathLike) -> Path:
    """The path, or of what is above it the lowest that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(path: str | os.PathLike) -> None:
    """
    Raises:
        OSError: when no file can be put there: there is a directory or a device, or nobody may write to the place.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise OSError(f"{path} is {kind} and cannot be replaced by a file. Name another one.")
    parent = nearest_existing(path.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{path} cannot be made: {parent} is no directory one can write to. Name another one.")


@contextmanager
def replace_file(path: str | os.PathLike) -> Generator[Path]:
    """Yields a temporary path next to `path`. If the block succeeds, the file written there replaces `path`."""
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, since some writers choose the format by it.
    prefix = f".{path.stem}.partial-"
    for remnant in path.parent.glob(f"{glob.escape(prefix)}*{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError), open(remnant, "rb") as file:
            # Locked as long as its writer lives, so this fails then.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remnant.unlink()
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        partial = Path(name)
        with contextlib.suppress(OSError):
            # Not every file system has locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have found it before it was locked.
        if partial.exists():
            break
        os.close(handle)
    try:
        yield partial
        # `mkstemp` creates files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file atomically: a reader sees the old file or the complete new one."""
    with replace_file(path) as partial:
        partial.write_text(text)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes JSON atomically, indented by 2."""
    write_text(path, json.dumps(content, indent=2) + "\n")
