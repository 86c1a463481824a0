"""A GGUF file in llama.cpp, as a model of this package. Text is split and the template read by what is in the file."""

import ctypes
import os
import weakref
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .generation import LanguageModel
from .limits import limited


if TYPE_CHECKING:
    from .grammar import Grammars


class GgufModel(LanguageModel):
    """
    A GGUF file, with llama.cpp's default settings, among them a key-value cache in FP16.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        ValueError: when llama-cpp-python is not installed, or does not load the file.
    """

    def __init__(self, path: str | Path):
        try:
            import llama_cpp
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path} runs in llama.cpp, which is not installed. pip install llama-cpp-python"
            ) from error
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path}. Make one: mobilemoe export --to gguf --model DIR --output DIR")
        self._library = llama_cpp
        # Keep a reference, or the callback would be garbage-collected while the library uses it.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        if model:
            # It takes a prompt in one call, and computes 512 tokens of it at a time, as by default.
            options.n_ctx = options.n_batch = llama_cpp.llama_model_n_ctx_train(model)
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        self._context = model and llama_cpp.llama_init_from_model(model, options)
        if not self._context:
            raise ValueError(
                f"llama.cpp {llama_cpp.__version__} does not load {path}. Install a llama-cpp-python that knows its "
                "architecture (exaone-moe for MobileMoE), or copy the file again if it is truncated."
            )
        weakref.finalize(self, free, llama_cpp, model, self._context)
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        template = llama_cpp.llama_model_chat_template(model, None)
        self._template = template.decode() if template else None
        self._pieces: dict[int, bytes] = {}
        self.max_seq_len = llama_cpp.llama_n_ctx(self._context)
        self.eos_ids = [token for token in range(self._vocab_size) if llama_cpp.llama_vocab_is_eog(self._vocab, token)]

    def _forward(self, tokens: list[int], start: int, num_positions: int) -> torch.Tensor:
        library, count = self._library, len(tokens)
        if not library.llama_memory_seq_rm(library.llama_get_memory(self._context), 0, start, -1):
            raise ValueError(f"llama.cpp cannot remove the positions from {start} on from its cache.")
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = i >= count - num_positions
            status = library.llama_decode(self._context, batch)
        finally:
            library.llama_batch_free(batch)
        if status != 0:
            raise ValueError(f"llama.cpp failed to run {count} tokens at position {start}, with status {status}.")
        rows = [library.llama_get_logits_ith(self._context, i) for i in range(count - num_positions, count)]
        # The next call overwrites them.
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows]))

    def all_logits(self, tokens: list[int]) -> torch.Tensor:
        return self.last_logits(tokens, 0, len(tokens))

    def _split(self, text: str, add_bos: bool) -> list[int]:
        content = text.encode()
        # A token has at least one byte, and BOS and EOS may come in addition.
        array = (self._library.llama_token * (len(content) + 2))()
        # The names of special tokens in the text are these tokens, as in transformers.
        count = self._library.llama_tokenize(self._vocab, content, len(content), array, len(array), add_bos, True)
        return list(array[:count])

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        return super().encode(prompt, chat) if chat else self._split(prompt, add_bos=True)

    def encode_messages(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        if self._template is None:
            raise ValueError("This file has no chat template. Give plain text, or export a fine-tuned model.")
        bos = self._piece(self._library.llama_vocab_bos(self._vocab), special=True).decode()
        try:
            with limited("The chat template"):
                (text,), _ = render_jinja_template(
                    [messages], tools=tools, chat_template=self._template, add_generation_prompt=True, bos_token=bos
                )
        except TemplateError as error:
            raise ValueError(f"The chat template rejects the conversation: {error}") from error
        return self._split(text, add_bos=False)

    def _piece(self, token: int, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        count = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(count, 0)]

    def decode(self, tokens: list[int]) -> str:
        for token in tokens:
            if token not in self._pieces:
                self._pieces[token] = self._piece(token)
        return b"".join(self._pieces[token] for token in tokens).decode(errors="replace")

    @cached_property
    def grammars(self) -> "Grammars":
        from llguidance.llamacpp import lltokenizer_from_vocab

        from .grammar import Grammars

        return Grammars(lltokenizer_from_vocab(self._vocab, eos_token=self.eos_ids))


def free(library, model, context) -> None:
    library.llama_free(context)
    library.llama_model_free(model)
