"""Examples as training sequences: text and chat are tokenized into documents, and documents packed without cuts."""

import bisect
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


# Label of tokens that the loss ignores.
IGNORED = -100
# The columns of each kind of example. The loss counts every token of a text, the assistant turns of a chat, and the
# completion of a pair.
KINDS = {"text": ["text"], "chat": ["messages"], "pair": ["prompt", "completion"]}
# The column that conversations may have too: the functions that the model may call.
TOOLS = "tools"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class UnreadableExample(ValueError):
    """Why an example cannot be used, and its index among the examples to encode."""

    def __init__(self, reason: str, place: int = 0):
        super().__init__(reason)
        self.place = place


@dataclass
class Document:
    """The unit of packing: token ids, and as many labels, `IGNORED` where the loss skips a token."""

    input_ids: np.ndarray
    labels: np.ndarray


def render_chat(
    messages: list[dict[str, Any]],
    num_prompt_messages: int,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
) -> list[tuple[str, bool]]:
    """
    Splits a conversation up to its last assistant turn into pieces of text, each with whether the loss counts it.

    Prompts and answers are separate pieces, so a prompt is tokenized exactly as in inference.

    Raises:
        UnreadableExample: for no assistant turn after the prompt, or a template that renders earlier turns differently
            once more turns follow.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index >= num_prompt_messages
    ]
    if not turns:
        raise UnreadableExample("it has no assistant turn to learn from")
    if turns[0] == 0:
        raise UnreadableExample("it begins with an assistant turn, which no prompt precedes")
    pieces, done = [], ""
    for index in turns:
        prefix = tokenizer.apply_chat_template(messages[:index], tools, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: index + 1], tools, tokenize=False)
        if not (prefix.startswith(done) and whole.startswith(prefix)):
            raise UnreadableExample("the chat template renders its turns differently once more turns follow")
        # Empty answers are context only: learning one would teach the model to end its turn at once.
        has_answer = bool(messages[index]["content"] or messages[index].get("tool_calls"))
        pieces += [(prefix[len(done) :], False), (whole[len(prefix) :], has_answer)]
        done = whole
    return pieces


def without_nulls(value: Any) -> Any:
    """Without the keys that are `None`: Arrow gives every object of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions that an example's model may call: a list of objects, or its JSON, or `None`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnreadableExample(f"its tools are not JSON: {error}") from error
    else:
        value = without_nulls(value)
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise UnreadableExample(f"its tools are {type(value).__name__}, not a list of objects or its JSON")
    return value or None


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, each `{"name", "arguments"}`, perhaps inside of `{"function": ...}`."""
    calls = message.get("tool_calls", [])
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        functions = [call.get("function", call) for call in calls]
        if all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
            return functions
    raise UnreadableExample(f"the tool_calls of its {message['role']} message are no list of calls with a name")


def as_messages(value: Any, role: str | None = None) -> list[dict[str, Any]]:
    """
    Messages of an example: a list, with ShareGPT keys renamed, or with `role` one turn from a string or `None`.

    A message with `tool_calls` needs no content.
    """
    if role is not None and (value is None or isinstance(value, str)):
        return [{"role": role, "content": value or ""}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        wanted = "a list of messages" if role is None else f"a string or a list of messages on its {role} side"
        raise UnreadableExample(f"it has {type(value).__name__} instead of {wanted}")
    messages = []
    for message in value:
        if "from" in message and "value" in message:
            message = {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        message = {
            key: without_nulls(inner) for key, inner in message.items() if inner is not None or key == "content"
        }
        if "tool_calls" in message:
            message["content"] = message.get("content") or ""
        if not {"role", "content"} <= set(message):
            raise UnreadableExample(f"a message has the keys {sorted(message)} and lacks role or content")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UnreadableExample(f"the content of its {message['role']} message is {kind}, not a string")
        called_functions(message)
        messages.append(message)
    return messages


def encode(
    rows: list[dict[str, Any]], kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Document]]:
    """
    Tokenizes examples; each becomes one document, or several where a text exceeds `max_length`.

    Texts get the tokenizer's end token. Conversations are truncated to `max_length`. Examples with nothing to learn,
    such as an empty text or only empty answers, become no document.

    Raises:
        UnreadableExample: for the first example that is not of this kind.
    """
    if kind == "text":
        texts = [row["text"] or "" for row in rows]
        wrong = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise UnreadableExample(f"its text is {type(texts[wrong]).__name__}, not a string", wrong)
        encoded = []
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
            ids = np.array([*ids, tokenizer.eos_token_id] if text else [], dtype=np.int32)
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            encoded.append([Document(piece, piece) for piece in pieces])
        return encoded

    rendered = []
    for place, row in enumerate(rows):
        try:
            prompt = as_messages(row["prompt"], "user") if kind == "pair" else []
            answer = as_messages(row["completion"], "assistant") if kind == "pair" else as_messages(row["messages"])
            messages = prompt + answer
            rendered.append(render_chat(messages, len(prompt), tokenizer, as_tools(row.get(TOOLS))))
        except UnreadableExample as error:
            raise UnreadableExample(str(error), place) from error
    pieces = [piece for conversation in rendered for piece, _ in conversation]
    ids = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    encoded = []
    for conversation in rendered:
        parts = [(np.array(next(ids), dtype=np.int32), learned) for _, learned in conversation]
        input_ids = np.concatenate([part for part, _ in parts])[:max_length]
        labels = np.concatenate([part if learned else np.full_like(part, IGNORED) for part, learned in parts])
        labels = labels[:max_length]
        encoded.append([Document(input_ids, labels)] if (labels != IGNORED).any() else [])
    return encoded


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """
    Best-fit decreasing: the document indices of every sequence; no document is cut (arXiv 2404.10830).

    Args:
        lengths (`list[int]`): tokens per document, none above `max_length`.
        max_length (`int`): tokens per sequence.
    """
    bins: list[list[int]] = []
    # Sorted (free tokens, bin): the first entry with enough space is the best fit.
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place == len(free):
            space, chosen = max_length, len(bins)
            bins.append([])
        else:
            space, chosen = free.pop(place)
        bins[chosen].append(index)
        bisect.insort(free, (space - lengths[index], chosen))
    return bins


def sequence(documents: list[Document], max_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """
    One training sequence: `input_ids`, `labels` and `position_ids`, each `(max_length,)`.

    Positions restart at 0 with every document, from which transformers derives masks that separate the documents.
    """
    lengths = [len(document.input_ids) for document in documents]
    padding = max_length - sum(lengths)
    labels = np.concatenate([*(document.labels for document in documents), np.full(padding, IGNORED)])
    input_ids = np.concatenate([*(document.input_ids for document in documents), np.full(padding, pad_token_id)])
    # Of the documents, and of the padding.
    starts = np.cumsum([0, *lengths])
    # Otherwise the first token of a document would be predicted from the end of the previous one.
    labels[starts[:-1]] = IGNORED
    positions = np.arange(max_length) - np.repeat(starts, [*lengths, padding])
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions}
