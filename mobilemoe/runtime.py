"""Runs models from Python, token ids to logits: an exported `.pte` in ExecuTorch or a checkpoint in PyTorch."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mobilemoe.kernels import BuildError, load_executorch
from modeling_mobilemoe.kernels.modules import FEW_TOKENS, MoEFFN

from .artifacts import GATED, PROGRAM_FILE, check_model_files, is_gated, is_pte, local_checkpoint
from .integrity import check_program, explain
from .limits import limited
from .lookup import PromptLookup, VerificationTimes
from .machine import without_lines


# Longest draft of prompt lookup: with the token before it, what our operators compute in one region.
MAX_DRAFT_TOKENS = FEW_TOKENS - 1


class LanguageModel(ABC):
    """
    Common interface of a `.pte` and a checkpoint: one sequence with a key-value cache, and its tokenizer.

    `generate` and `sequence_logits` run only the tokens that the cache does not hold from earlier calls. Where
    `is_exact`, the logits are those of a run from the first position, bit for bit. Elsewhere they differ by rounding,
    as much as between a prompt in one call and token by token, and the model may choose another of nearly tied tokens;
    `reset` makes the next call run everything.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    eos_ids: list[int]
    # Longest draft that one call verifies.
    max_draft_tokens = MAX_DRAFT_TOKENS
    # Whether tokens have the same logits in one call as one by one, bit for bit.
    is_exact = False

    @cached_property
    def _times(self) -> VerificationTimes:
        return VerificationTimes(self.max_draft_tokens)

    @cached_property
    def _cached(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        return []

    def reset(self) -> None:
        """Forgets the sequence: the next one runs from its first position."""
        self._cached = []

    def forward(self, tokens: list[int], start: int) -> torch.Tensor:
        """
        Runs tokens at positions `start`, `start + 1`, ... and returns the FP32 logits of the last one, `(vocab,)`.

        A call with `start=0` begins a new sequence.

        Raises:
            ValueError: when `tokens` is empty, `start` is not reached by earlier calls, or a position is outside the
                context.
        """
        return self.last_logits(tokens, start, 1)[0]

    def last_logits(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        """
        As `forward`, with the FP32 logits of the last positions.

        Returns:
            `torch.Tensor` of shape `(num_positions, vocab)`.

        Raises:
            ValueError: as `forward`.
        """
        self.check_positions(tokens, start)
        # A call that fails or is interrupted may leave anything in the cache.
        cached, self._cached = self._cached, []
        logits = self._forward(tokens, start, num_positions)
        del cached[start:]
        cached.extend(tokens)
        self._cached = cached
        return logits

    def sequence_logits(self, tokens: list[int], num_positions: int = 1) -> torch.Tensor:
        """
        FP32 logits of the last positions of a sequence. Runs what follows the longest prefix that the cache holds.

        Returns:
            `torch.Tensor` of shape `(num_positions, vocab)`.

        Raises:
            ValueError: when `tokens` is empty, or longer than the context.
        """
        # Of the wanted positions, all run.
        start = max(0, min(common_length(tokens, self._cached), len(tokens) - num_positions))
        return self.last_logits(tokens[start:], start, num_positions)

    def check_positions(self, tokens: list[int], start: int) -> None:
        if not tokens:
            raise ValueError("There are no tokens to run. Give at least one.")
        if start > len(self._cached):
            raise ValueError(
                f"Position {start} cannot be run: the cache holds {len(self._cached)} tokens. Run those before first."
            )
        if start < 0 or start + len(tokens) > self.max_seq_len:
            raise ValueError(
                f"Positions {start} to {start + len(tokens) - 1} exceed the context of {self.max_seq_len} tokens. "
                "Shorten the prompt, or use a model with a longer context."
            )

    @abstractmethod
    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor: ...

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
        prompt_lookup: bool | None = None,
    ) -> Iterator[int]:
        """
        Yields new token ids until an end-of-sequence token, `max_new_tokens` or the end of the context.

        Tokens of the prompt that the cache holds do not run again, as in the next turn of a conversation.

        Args:
            tokens (`list[int]`): the prompt.
            max_new_tokens (`int`): the maximum number of new tokens.
            temperature (`float`, defaults to 0): divides the logits before sampling. 0 decodes greedily.
            top_p (`float`, defaults to 1): sample from the smallest set of tokens whose probabilities sum to `top_p`.
            seed (`int`, *optional*): seed of the sampling.
            prompt_lookup (`bool`, *optional*): where the text repeats itself, verify several tokens in one call, if
                that is faster (lookup.py). The default where `is_exact`, as the tokens stay the same. Elsewhere the
                model may choose another of nearly tied tokens.

        Raises:
            ValueError: for an empty prompt or one longer than the context, a negative temperature, a `top_p` outside
                (0, 1], or `prompt_lookup` of a program that returns the logits of one position only.
        """
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature} and top_p={top_p} cannot be sampled with. "
                "Set temperature to 0 or more and top_p above 0 and at most 1."
            )
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} cannot be generated. Set 0 or more.")
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)

        def choose(logits: torch.Tensor) -> int:
            if temperature == 0:
                token = most_probable(logits)
                check_finite(logits[token])
                return token
            check_finite(logits.amax())
            probabilities = nucleus(((logits - logits.amax()).double() / temperature).softmax(dim=-1), top_p)
            return int(torch.multinomial(probabilities, 1, generator=generator))

        if prompt_lookup is None:
            prompt_lookup = self.is_exact
        elif prompt_lookup and self.max_draft_tokens == 0:
            raise ValueError(
                "prompt_lookup needs the logits of several positions, and this program returns those of the last one. "
                "Export it again with --moe-op mobilemoe, or leave prompt_lookup out."
            )
        longest = self.max_draft_tokens if prompt_lookup else 0
        text, draft = PromptLookup(tokens, self._times), []
        rows = self.sequence_logits(tokens)
        remaining = max_new_tokens
        while remaining > 0:
            # What follows a token that differs from the draft's was computed for a text that the model did not choose.
            for logits, drafted in zip_longest(rows, draft):
                token = choose(logits)
                if token in self.eos_ids:
                    return
                text.append(token)
                remaining -= 1
                yield token
                if token != drafted:
                    break
            # The token after the last position is yielded, but the cache has no room to run it.
            room = self.max_seq_len - len(text.tokens)
            if remaining == 0 or room < 0:
                return
            draft = text.draft(min(longest, remaining - 1, room))
            started = time.perf_counter()
            rows = self.sequence_logits([*text.tokens, *draft], len(draft) + 1)
            self._times.record(len(draft), time.perf_counter() - started)

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """
        Token ids of a prompt, starting with one BOS. With `chat`, the prompt is formatted as the user's message.

        Raises:
            ValueError: for `chat` without a chat template, as in a Base model, or with one that does not end.
        """
        if not chat:
            return self.tokenizer(prompt).input_ids
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "This model has no chat template: it is a base model that continues text. "
                "Give plain text, or use a fine-tuned (SFT or QAT) model."
            )
        messages = [{"role": "user", "content": prompt}]
        with limited("The model's chat template"):
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
        ValueError: for damaged files.
        OSError: when there is no such checkpoint, or it is gated and its licence has not been accepted.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str = "auto"):
        if Path(path).is_dir():
            check_model_files(path)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
            self.tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
        except OSError as error:
            if is_gated(error):
                raise OSError(GATED.format(name=path)) from error
            raise
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
        return self.model(input_ids, cache=self._cache, logits_to_keep=num_positions).logits[0].float()

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
        self._tokenizer: PreTrainedTokenizerBase | None = (
            AutoTokenizer.from_pretrained(path) if has_tokenizer else None
        )
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


def load_language_model(path: str | Path) -> LanguageModel:
    """
    Loads a `.pte` directory or a checkpoint, from the Hub if there is no such directory.

    Raises:
        ValueError: as [`local_checkpoint`] and [`PteModel`].
    """
    if is_pte(path):
        return PteModel(path)
    directory = local_checkpoint(path)
    # That of the download is over. Reading a local file takes less time than reading what the bar says.
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return CheckpointModel(directory)
    finally:
        if shows_progress:
            logging.enable_progress_bar()


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


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two lists, or of two tuples."""
    length = min(len(one), len(other))
    # The usual case, in C.
    if one[:length] == other[:length]:
        return length
    return next(i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)


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


def check_finite(largest: torch.Tensor) -> None:
    """
    Args:
        largest (`torch.Tensor`): the largest of the logits, which is NaN if one of them is.

    Raises:
        ValueError: when it is not finite.
    """
    if not math.isfinite(largest):
        raise ValueError(
            f"The model's largest logit is {largest.item()}, so no token can be chosen. Its weights are damaged, or "
            "too large for their dtype. For a program, `mobilemoe run --verify` compares them with those exported."
        )


def most_probable(logits: torch.Tensor) -> int:
    """The first of the largest, on one thread: PyTorch's threads would spin for a while, beside those of a program."""
    return int(logits.cpu().numpy().argmax())


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
