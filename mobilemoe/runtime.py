"""Runs models from Python, token ids to logits: an exported `.pte` in ExecuTorch or a checkpoint in PyTorch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import GatedRepoError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mobilemoe.kernels import BuildError, load_executorch

from .artifacts import PROGRAM_FILE, is_pte, read_export


class LanguageModel(ABC):
    """Common interface of a `.pte` and a checkpoint: one sequence with a key-value cache, and its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    eos_ids: list[int]

    def forward(self, tokens: list[int], start: int) -> torch.Tensor:
        """
        Runs tokens at positions `start`, `start + 1`, ... and returns the FP32 logits of the last one, `(vocab,)`.

        A call with `start=0` begins a new sequence.

        Raises:
            ValueError: when `tokens` is empty, or a position is outside the context.
        """
        self.check_positions(tokens, start)
        return self._forward(torch.tensor([tokens]), start)

    def check_positions(self, tokens: list[int], start: int) -> None:
        if not tokens:
            raise ValueError("There are no tokens to run. Give at least one.")
        if start < 0 or start + len(tokens) > self.max_seq_len:
            raise ValueError(
                f"Positions {start} to {start + len(tokens) - 1} exceed the context of {self.max_seq_len} tokens. "
                "Shorten the prompt, or use a model with a longer context."
            )

    @abstractmethod
    def _forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor: ...

    @abstractmethod
    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        """FP32 logits at every position of one sequence, `(len(tokens), vocab)`."""

    def generate(
        self,
        tokens: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """
        Yields new token ids until an end-of-sequence token, `max_new_tokens` or the end of the context.

        Args:
            tokens (`list[int]`): the prompt.
            max_new_tokens (`int`): the maximum number of new tokens.
            temperature (`float`, defaults to 0): divides the logits before sampling. 0 decodes greedily.
            top_p (`float`, defaults to 1): sample from the smallest set of tokens whose probabilities sum to `top_p`.
            seed (`int`, *optional*): seed of the sampling.

        Raises:
            ValueError: for a negative temperature or a `top_p` outside (0, 1].
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature} and top_p={top_p} cannot be sampled with. "
                "Set temperature to 0 or more and top_p above 0 and at most 1."
            )
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
        logits = self.forward(tokens, 0)
        position = len(tokens)
        for remaining in reversed(range(max_new_tokens)):
            if temperature > 0:
                probabilities = nucleus((logits / temperature).softmax(dim=-1), top_p)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token in self.eos_ids:
                return
            yield token
            # The token after the last position is yielded, but the cache has no room to run it.
            if remaining == 0 or position == self.max_seq_len:
                return
            logits = self.forward([token], position)
            position += 1

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """
        Token ids of a prompt, starting with one BOS. With `chat`, the prompt is formatted as the user's message.

        Raises:
            ValueError: for `chat` without a chat template, as in a Base model.
        """
        if not chat:
            return self.tokenizer(prompt).input_ids
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "This model has no chat template: it is a base model that continues text. "
                "Give plain text, or use a fine-tuned (SFT or QAT) model."
            )
        messages = [{"role": "user", "content": prompt}]
        return cast(
            list[int], self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )

    def decode(self, tokens: list[int]) -> str:
        # The released tokenizer config enables a clean-up that removes spaces before punctuation, which damages code.
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yields the text that each token completes, which may be empty, and at the end the remaining text."""
        read, text = [], ""
        for token in tokens:
            read.append(token)
            # Decode all tokens: a character may span several, and until its last one the text ends in U+FFFD.
            grown = self.decode(read)
            if grown.endswith("\ufffd"):
                yield ""
            else:
                yield grown[len(text) :]
                text = grown
        yield self.decode(read)[len(text) :]


class CheckpointModel(LanguageModel):
    """
    A checkpoint in PyTorch, full-precision or packed INT4.

    Args:
        path (`str` or `Path`): checkpoint directory or Hub id.
        dtype (`torch.dtype` or `str`, defaults to `"auto"`): dtype of the weights that are not packed.

    Raises:
        OSError: when there is no such checkpoint, or it is gated and its licence has not been accepted.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str = "auto"):
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
            self.tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
        except OSError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, GatedRepoError):
                cause = cause.__cause__
            if cause is None:
                raise
            # The message of transformers mentions neither the licence nor how to log in.
            raise OSError(
                f"{path} is gated: only accounts that have accepted its licence can download it. "
                f"Accept the licence at https://huggingface.co/{path}, then log in with `hf auth login`."
            ) from error
        self.max_seq_len = self.model.config.max_position_embeddings
        self.eos_ids = end_of_sequence_ids(self.model, self.tokenizer)
        self._cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        if start == 0:
            self._cache = DynamicCache(config=self.model.config)
        tokens = tokens.to(self.model.device)
        return self.model(tokens, cache=self._cache, logits_to_keep=1).logits[0, -1].float()

    @torch.inference_mode()
    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens], device=self.model.device), use_cache=False).logits[0].float()


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
        from executorch.runtime import Method, Runtime

        path = Path(path)
        report = read_export(path)
        size = (path / PROGRAM_FILE).stat().st_size
        if size != report.pte_bytes:
            raise ValueError(
                f"{path / PROGRAM_FILE} has {size} bytes, export.json says {report.pte_bytes}: it is truncated or "
                "belongs to another export. Copy the whole directory again."
            )
        runtime = Runtime.get()
        if any(name.startswith("mobilemoe::") for name in report.operators):
            load_kernels()
        check_operators(report.operators, runtime.operator_registry.operator_names)
        data_path = path / report.experts_file if report.experts_file else None
        if data_path is not None and not data_path.is_file():
            raise ValueError(f"{data_path} is missing: it holds the experts of model.pte. Copy the whole directory.")
        self._program = runtime.load_program(path / PROGRAM_FILE, data_path=data_path)
        self._method = cast(Method, self._program.load_method("forward"))
        self.has_all_logits = report.all_logits
        self.max_seq_len = report.max_seq_len
        self.eos_ids = report.eos_ids
        # A program with random weights, made for a benchmark, has no tokenizer.
        if (path / "tokenizer.json").is_file():
            self.tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))

    def _execute(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        # The runtime reuses the output memory in the next call, hence the clone.
        return self._method.execute((tokens, torch.tensor([start])))[0][0].clone()

    def _forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        logits = self._execute(tokens, start)
        return logits[-1] if self.has_all_logits else logits

    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.last_logits(tokens, 0, len(tokens))

    def last_logits(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        """
        Runs tokens after `start` cached ones and returns the FP32 logits of the last positions.

        Returns:
            `torch.Tensor` of shape `(num_positions, vocab)`.

        Raises:
            ValueError: as `forward`.
        """
        self.check_positions(tokens, start)
        if self.has_all_logits:
            return self._execute(torch.tensor([tokens]), start)[-num_positions:]
        # The program returns the last position only: run up to the first wanted one, then token by token.
        first = len(tokens) - num_positions + 1
        logits = [self.forward(tokens[:first], start)]
        logits += [self.forward([token], start + first + i) for i, token in enumerate(tokens[first:])]
        return torch.stack(logits)


def load_language_model(path: str | Path) -> LanguageModel:
    """Loads a `.pte` directory or a checkpoint. Raises the errors of [`PteModel`] and [`CheckpointModel`]."""
    return PteModel(path) if is_pte(path) else CheckpointModel(path)


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


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zeroes the probabilities of tokens outside the top-p set. The rest is not renormalised."""
    if top_p == 1:
        return probabilities
    ranked, order = probabilities.sort(descending=True)
    # Keep a token while the sum of the more probable ones is below top_p; the first is always kept.
    dropped = order[ranked.cumsum(dim=-1) - ranked >= top_p]
    return probabilities.index_fill(-1, dropped, 0.0)


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    All end-of-sequence ids: those of the model's generation config, the tokenizer's, and `<|eot|>`.

    A chat model that stops only at `<|end_of_text|>` generates past the end of its turn.
    """
    ids = {*(model.generation_config.eos_token_id or []), tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot|>")}
    return sorted(token for token in ids if token is not None)
