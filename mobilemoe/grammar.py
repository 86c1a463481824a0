"""Structured output: which tokens may follow, so that an answer matches a JSON schema or a regular expression."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class Grammar:
    """
    The state of one answer. `generate` resets it, masks the logits of every token and appends what it chose.

    Args:
        source (`str`): a grammar of llguidance.
        tokenizer (`LLTokenizer`): of the model, with all its end-of-sequence tokens.
        what (`str`): what the grammar was made from, for errors.

    Raises:
        ValueError: when llguidance does not know the grammar.
    """

    def __init__(self, source: str, tokenizer: LLTokenizer, what: str):
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, tokenizer)
        if failed:
            raise ValueError(
                f"{what} cannot be followed: {messages[0].strip()}. Change it; what is known is listed at "
                "https://github.com/guidance-ai/llguidance/blob/main/docs"
            )
        self._what = what
        # Silent: errors are raised below.
        self._matcher = LLMatcher(tokenizer, source, log_level=0)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(
                f"{self._what} cannot be followed: {self._matcher.get_error().strip()}. Use a simpler one."
            )

    def reset(self) -> None:
        self._matcher.reset()

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(vocab,)` with -inf for tokens that may not follow. The end of the sequence may, after a match."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(len(logits), bool)
        # A model may have more logits than its tokenizer has tokens.
        known = np.unpackbits(bits, bitorder="little")[: len(logits)]
        allowed[: len(known)] = known
        # On one thread: PyTorch's would then spin beside those of a program.
        return torch.from_numpy(np.where(allowed, logits.cpu().numpy(), np.float32(-np.inf)))

    def append(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """The next tokens, as far as there is only one way to continue."""
        return self._matcher.compute_ff_tokens()

    @property
    def is_matched(self) -> bool:
        """Whether the text so far matches. More may follow."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()


class Grammars:
    """
    Makes grammars for one tokenizer.

    Args:
        tokenizer (`LLTokenizer`): of the model, as llguidance reads it, with all that ends a sequence.
    """

    def __init__(self, tokenizer: LLTokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> Self:
        """
        For a tokenizer of transformers, which takes llguidance up to a second to read.

        Raises:
            ValueError: for a tokenizer without a `tokenizer.json`.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError("Structured output needs a tokenizer with a tokenizer.json. Save a fast tokenizer there.")
        return cls(from_tokenizer(tokenizer, eos_token=list(eos_ids)))

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """
        A grammar of JSON on one line that a schema allows. Keywords that llguidance does not implement are errors.

        Raises:
            ValueError: when the schema is not an object, is no schema, or allows nothing.
        """
        if not isinstance(schema, dict):
            raise ValueError(f'The JSON schema is {schema!r}, not an object. Write {{"type": ...}}.')
        # As `json.dumps` and the chat template write JSON, without line breaks: a model that may write white space
        # between tokens may do so without end. A schema chooses otherwise by llguidance's key "x-guidance".
        source = LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        return Grammar(source, self._tokenizer, "The JSON schema")

    def regex(self, pattern: str) -> Grammar:
        """
        A grammar of text that matches a pattern as a whole, in the syntax of Rust's `regex` without look-around.

        Raises:
            ValueError: when it is no such pattern.
        """
        return Grammar(LLMatcher.grammar_from_regex(pattern), self._tokenizer, f"The regular expression {pattern!r}")


def read_schema(path: str | os.PathLike) -> dict[str, Any]:
    """
    Raises:
        ValueError: when the file does not hold JSON.
        OSError: when it cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} does not hold JSON: {error}. Give a file with a JSON schema.") from error
