"""Runs models from Python, token ids to logits: an exported `.pte` in ExecuTorch or a checkpoint in PyTorch."""

import math
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mobilemoe.kernels import BuildError, load_executorch
from modeling_mobilemoe.kernels.modules import MoEFFN

from .artifacts import (
    GATED,
    PROGRAM_FILE,
    check_model_files,
    find_gguf,
    is_gated,
    is_pte,
    load_tokenizer,
    local_checkpoint,
)
from .generation import MAX_DRAFT_TOKENS, LanguageModel
from .integrity import check_program, explain
from .machine import without_lines


class CheckpointModel(LanguageModel):
    """
    A checkpoint in PyTorch, full-precision or packed INT4.

    Args:
        path (`str` or `Path`): checkpoint directory or Hub id.
        dtype (`torch.dtype` or `str`, defaults to `"auto"`): dtype of the weights that are not packed.
        device (`str`, defaults to `"cpu"`): where PyTorch runs it. `"auto"` is a GPU if there is one.

    Raises:
        ValueError: for damaged files, or when there is no such device.
        OSError: when there is no such checkpoint, or it is gated and its licence has not been accepted.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu"):
        place = find_device(device)
        if Path(path).is_dir():
            check_model_files(path)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
            self.tokenizer = load_tokenizer(path)
        except OSError as error:
            if is_gated(error):
                raise OSError(GATED.format(name=path)) from error
            raise
        self.model.to(place)
        self.max_seq_len = self.model.config.max_position_embeddings
        self.eos_ids = end_of_sequence_ids(self.model, self.tokenizer)
        self._cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        if start == 0:
            self._cache = DynamicCache(config=self.model.config)
        # Other tokens may have been at these positions.
        self._cache.crop(start - self._cache.get_seq_length())
        input_ids = torch.tensor([tokens], device=self.model.device)
        return self.model(input_ids, cache=self._cache, logits_to_keep=num_positions).logits[0].float().cpu()

    @torch.inference_mode()
    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens], device=self.model.device), use_cache=False).logits[0].float().cpu()


class PteModel(LanguageModel):
    """
    A `.pte` directory made by `mobilemoe export` or `optimum-cli export executorch`.

    The files are memory-mapped, and locked in memory where the system allows it. ExecuTorch's Python loader has no
    option to turn locking off.

    Args:
        path (`str` or `Path`): the directory.

    Raises:
        ValueError: when the program is missing or incomplete, or this runtime lacks one of its operators.
    """

    def __init__(self, path: str | Path):
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers llama::*
        import executorch.kernels.quantized  # noqa: F401  registers quantized_decomposed::embedding_4bit
        from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count
        from executorch.runtime import Method, Runtime

        path = Path(path)
        report = check_program(path)
        check_model_files(path)
        with without_lines("cpuinfo_utils"):
            # Makes the threads, which says in five lines which files about the processor are not there.
            _threadpool_get_thread_count()
        runtime = Runtime.get()
        if any(name.startswith("mobilemoe::") for name in report.operators):
            load_kernels()
        check_operators(report.operators, runtime.operator_registry.operator_names)
        self._path = path
        # A program with random weights, made for a benchmark, has none.
        has_tokenizer = (path / "tokenizer.json").is_file()
        self._tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(path) if has_tokenizer else None
        data_path = path / report.experts_file if report.experts_file else None
        try:
            self._program = runtime.load_program(path / PROGRAM_FILE, data_path=data_path)
            self._method = cast(Method, self._program.load_method("forward"))
        except RuntimeError as error:
            raise explain(error, path) from error
        self.has_all_logits = report.all_logits
        # Positions whose logits a call of so many tokens returns: (1, vocab), or (1, positions, vocab).
        *positions, self._vocab_size = self._method.metadata.output_tensor_meta(0).sizes()
        self._num_rows = math.prod(positions)
        self.max_draft_tokens = min(MAX_DRAFT_TOKENS, self._num_rows - 1)
        self.is_exact = self.max_draft_tokens > 0 and f"{MoEFFN.operator}.out" in report.operators
        self.max_seq_len = report.max_seq_len
        self.eos_ids = report.eos_ids

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # ty: ignore[incompatible-property-override]
        if self._tokenizer is None:
            raise ValueError(
                f"{self._path} has no tokenizer.json, so it reads and writes token ids and no text. Copy the "
                "tokenizer files of its checkpoint there."
            )
        return self._tokenizer

    def _execute(self, tokens: list[int], start: int) -> torch.Tensor:
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise ValueError(
                f"The token ids {min(tokens)} to {max(tokens)} are not all in the vocabulary, 0 to "
                f"{self._vocab_size - 1}. Encode the text with this model's tokenizer."
            )
        # The runtime copies what it returns by PyTorch, whose threads would then spin beside the program's.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            logits = self._method.execute((torch.tensor([tokens]), torch.tensor([start])))[0]
        except RuntimeError as error:
            raise explain(error, self._path) from error
        finally:
            torch.set_num_threads(num_threads)
        return logits.flatten(0, -2)  # (positions, vocab) of (1, vocab) or (1, positions, vocab)

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        if len(tokens) <= self._num_rows:
            return self._execute(tokens, start)[-num_positions:]
        # A longer call returns the last position only: run up to the first wanted one, then as many as are returned.
        first = len(tokens) - num_positions + 1
        logits = [self._execute(tokens[:first], start)[-1:]]
        for at in range(first, len(tokens), self._num_rows):
            logits.append(self._execute(tokens[at : at + self._num_rows], start + at))
        return torch.cat(logits)

    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.last_logits(tokens, 0, len(tokens))


def load_language_model(path: str | Path, device: str = "cpu") -> LanguageModel:
    """
    Loads a `.pte` directory, a GGUF file or its directory, or a checkpoint, from the Hub if there is no such one.

    Args:
        device (`str`, defaults to `"cpu"`): of a checkpoint, see [`CheckpointModel`]. Others run on the CPU.

    Raises:
        ValueError: as [`local_checkpoint`], [`CheckpointModel`], [`PteModel`] and [`GgufModel`](llamacpp.py), and for
            a device other than `"auto"` and `"cpu"` without a checkpoint.
    """
    gguf = find_gguf(path)
    if (gguf is not None or is_pte(path)) and device not in ("auto", "cpu"):
        raise ValueError(
            f"{path} runs on the CPU, and the device is {device}. Leave it out: only checkpoints have it."
        )
    if gguf is not None:
        from .llamacpp import GgufModel

        return GgufModel(gguf)
    if is_pte(path):
        return PteModel(path)
    directory = local_checkpoint(path)
    # That of the download is over. Reading a local file takes less time than reading what the bar says.
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return CheckpointModel(directory, device=device)
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def find_device(device: str) -> torch.device:
    """
    Raises:
        ValueError: when PyTorch knows no such device, or does not find it on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # PyTorch raises AssertionError where it was built without that kind.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device} cannot be used: {str(error).splitlines()[0]} Set cpu, cuda, or leave it out."
        ) from error
    return found


def load_kernels() -> None:
    """
    Raises:
        ValueError: when the operators of this package do not compile on this machine.
    """
    try:
        load_executorch()
    except BuildError as error:
        raise ValueError(
            f"The program needs operators of this package, which are compiled on first use: {error} "
            "Alternatively, export again with --moe-op llama."
        ) from error


def check_operators(needed: list[str], available: set[str]) -> None:
    """
    Raises:
        ValueError: when this runtime lacks an operator of the program. The message lists all that are missing.
    """
    missing = sorted(set(needed) - set(available))
    if missing:
        raise ValueError(
            f"The program needs {', '.join(missing)}, which this ExecuTorch runtime lacks. Install executorch>=1.5.1 "
            "from PyPI, or export again with operators that this runtime has."
        )


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    All end-of-sequence ids: those of the model's generation config, the tokenizer's, and `<|eot|>`.

    A chat model that stops only at `<|end_of_text|>` generates past the end of its turn.
    """
    ids = {*(model.generation_config.eos_token_id or []), tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot|>")}
    return sorted(token for token in ids if token is not None)
