"""Generation of text, whatever runs the model: the interface of models, sampling, stop sequences."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modeling_mobilemoe.kernels.modules import FEW_TOKENS

from .limits import limited
from .lookup import PromptLookup, VerificationTimes


if TYPE_CHECKING:
    from .grammar import Grammar, Grammars


# Longest draft of prompt lookup: with the token before it, what our operators compute in one region.
MAX_DRAFT_TOKENS = FEW_TOKENS - 1


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} and top_p={top_p} cannot be sampled with. "
            "Set temperature to 0 or more and top_p above 0 and at most 1."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} cannot be generated. Set 0 or more.")


class TextModel(ABC):
    """What a conversation needs: a tokenizer, and answers of a model that keeps what it has read in a cache."""

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    eos_ids: list[int]

    @abstractmethod
    def num_cached(self, tokens: list[int]) -> int:
        """How many tokens of a prompt are in the cache and do not run again."""

    @abstractmethod
    def generate(
        self,
        tokens: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        prompt_lookup: bool | None = None,
    ) -> Iterator[int]:
        """As [`LanguageModel.generate`], which says what the arguments mean."""

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """
        Token ids of a prompt, starting with one BOS. With `chat`, the prompt is formatted as the user's message.

        Raises:
            ValueError: for `chat` without a chat template, as in a Base model, or with one that does not end.
        """
        if chat:
            return self.encode_messages([{"role": "user", "content": prompt}])
        return self.tokenizer(prompt).input_ids

    def encode_messages(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """
        Token ids of a conversation in the chat template, up to where the model answers.

        Args:
            messages (`list[dict]`): with `role` and `content`, as `apply_chat_template` takes them.
            tools (`list[dict]`, *optional*): definitions of functions that the model may call.

        Raises:
            ValueError: without a chat template, as in a Base model, or when the template rejects a message.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "This model has no chat template: it is a base model that continues text. "
                "Give plain text, or use a fine-tuned (SFT or QAT) model."
            )
        try:
            with limited("The model's chat template"):
                tokens = self.tokenizer.apply_chat_template(
                    messages, tools=cast(Any, tools), add_generation_prompt=True, return_dict=False
                )
        except TemplateError as error:
            raise ValueError(f"The chat template rejects the conversation: {error}") from error
        return cast(list[int], tokens)

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


class LanguageModel(TextModel):
    """
    Common interface of a `.pte` and a checkpoint: one sequence with a key-value cache, and its tokenizer.

    `generate` and `sequence_logits` run only the tokens that the cache does not hold from earlier calls. Where
    `is_exact`, the logits are those of a run from the first position, bit for bit. Elsewhere they differ by rounding,
    as much as between a prompt in one call and token by token, and the model may choose another of nearly tied tokens;
    `reset` makes the next call run everything.
    """

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

    @cached_property
    def grammars(self) -> "Grammars":
        """Makes grammars for `generate` from JSON schemas and regular expressions. Needs the extra `chat`."""
        from .grammar import Grammars

        return Grammars.of(self.tokenizer, self.eos_ids)

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
        start = self.num_cached(tokens, num_positions)
        return self.last_logits(tokens[start:], start, num_positions)

    def num_cached(self, tokens: list[int], num_positions: int = 1) -> int:
        """How many tokens `sequence_logits` would not run: those in the cache, before the last positions."""
        return max(0, min(common_length(tokens, self._cached), len(tokens) - num_positions))

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
        grammar: "Grammar | None" = None,
    ) -> Iterator[int]:
        """
        Yields new token ids until an end-of-sequence token, `max_new_tokens` or the end of the context.

        Tokens of the prompt that the cache holds do not run again, as in the next turn of a conversation.

        Args:
            tokens (`list[int]`): the prompt.
            max_new_tokens (`int`): the maximum number of new tokens.
            temperature (`float`, defaults to 0): divides the logits before sampling. 0 decodes greedily.
            top_p (`float`, defaults to 1): sample from the smallest set of tokens whose probabilities sum to `top_p`.
            seed (`int`, *optional*): seed of the sampling. The default is another one every time.
            prompt_lookup (`bool`, *optional*): where the text repeats itself, verify several tokens in one call, if
                that is faster (lookup.py). The default where `is_exact`, as the tokens stay the same. Elsewhere the
                model may choose another of nearly tied tokens.
            grammar (`Grammar`, *optional*): what the text must match, see `grammars`. The answer ends where nothing
                else may follow. It is cut off, and `grammar.is_matched` false, when tokens or context end before that.
                Tokens that the grammar leaves no choice of are verified together, like those of prompt lookup.

        Raises:
            ValueError: for an empty prompt or one longer than the context, a negative temperature, a `top_p` outside
                (0, 1], or `prompt_lookup` of a program that returns the logits of one position only.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        generator = torch.Generator()
        # A new generator always has the same seed.
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

        def choose(logits: torch.Tensor) -> int:
            if grammar is not None:
                logits = grammar.mask(logits)
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
        if grammar is not None:
            grammar.reset()
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
                if grammar is not None:
                    grammar.append(token)
                remaining -= 1
                yield token
                if grammar is not None and grammar.is_complete:
                    return
                if token != drafted:
                    break
            # The token after the last position is yielded, but the cache has no room to run it.
            room = self.max_seq_len - len(text.tokens)
            if remaining == 0 or room < 0:
                return
            most = min(longest, remaining - 1, room)
            forced = [] if grammar is None else grammar.forced()
            draft = forced[:most] or text.draft(most)
            started = time.perf_counter()
            rows = self.sequence_logits([*text.tokens, *draft], len(draft) + 1)
            self._times.record(len(draft), time.perf_counter() - started)


@dataclass
class Timing:
    """Of one answer. Times are in seconds, of `perf_counter`."""

    prompt_tokens: int
    cached_tokens: int
    started: float
    times: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, which needs the prompt."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None

    def __str__(self) -> str:
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        text = f"{self.prompt_tokens} prompt tokens{cached}"
        if self.times:
            text += f", first token after {self.times[0] - self.started:.2f} s; {len(self.times)} new tokens"
        return text + (f", {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else "")


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """
    Yields text that comes in pieces, up to the first of some sequences. What may begin a sequence is held back.

    Raises:
        ValueError: for an empty sequence.
    """
    if "" in stop:
        raise ValueError("A stop sequence is empty, so there would be no text. Leave it out.")
    held = ""
    for piece in pieces:
        held += piece
        starts = [start for sequence in stop if (start := held.find(sequence)) >= 0]
        if starts:
            yield held[: min(starts)]
            return
        known = next(
            (at for at in range(len(held)) if any(sequence.startswith(held[at:]) for sequence in stop)), len(held)
        )
        yield held[:known]
        held = held[known:]
    yield held


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


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two lists, or of two tuples."""
    length = min(len(one), len(other))
    # The usual case, in C.
    if one[:length] == other[:length]:
        return length
    return next(i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
