"""Tools in conversations: their definitions, and the calls in what a model wrote, in the Hermes format."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .artifacts import first_problem


CALL_START, CALL_END = "<tool_call>", "</tool_call>"


class Function(BaseModel):
    # The template shows the model all that is written.
    model_config = ConfigDict(extra="allow")

    name: str
    # A JSON schema of the arguments.
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """The definition of a function, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class ToolCall(BaseModel):
    """What a model calls: `{"name": "add", "arguments": {"a": 1}}`."""

    name: str
    arguments: dict[str, Any] = {}


def read_tools(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    The definitions in a JSON file, as `apply_chat_template(tools=...)` takes them.

    Raises:
        ValueError: when the file does not hold a list of [`Tool`].
        OSError: when it cannot be read.
    """
    try:
        tools = TypeAdapter(list[Tool]).validate_json(Path(path).read_bytes(), strict=True)
    except ValidationError as error:
        raise ValueError(
            f"{path} does not hold a list of tools: {first_problem(error)}. Each is an object like "
            '{"type": "function", "function": {"name": "add", "parameters": {"type": "object", ...}}}.'
        ) from error
    return [tool.model_dump(exclude_unset=True) for tool in tools]


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    r"""
    Splits an answer into its text and its calls, each `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`.

    At the end of the answer, the closing tag may be missing. A block that is not such a call stays in the text.
    Rendering the text and the calls by the chat template gives the answer again, up to white space.

    Returns:
        The text, empty if there are calls only, and the calls in their order.
    """
    pieces, calls, position, searched = [], [], 0, 0
    while (start := text.find(CALL_START, searched)) != -1:
        searched = start + len(CALL_START)
        found = read_call(text, searched)
        if found is None:
            continue
        # Line breaks around a call are its own.
        pieces.append(text[position:start].removesuffix("\n"))
        calls.append(found[0])
        position = searched = found[1]
    pieces.append(text[position:])
    return pieces[0] + "".join(piece.removeprefix("\n") for piece in pieces[1:]), calls


def read_call(text: str, position: int) -> tuple[ToolCall, int] | None:
    """The call whose JSON begins at a position, and the position after its closing tag."""
    position += len(text[position:]) - len(text[position:].lstrip())
    try:
        # A closing tag may also be part of an argument: the end is that of the JSON.
        content, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text, position)
        call = ToolCall.model_validate(content, strict=True)
    # The latter of thousands of nested brackets.
    except (ValueError, RecursionError):
        return None
    rest = text[end:].lstrip()
    if rest and not rest.startswith(CALL_END):
        return None
    return call, len(text) - len(rest) + len(CALL_END) if rest else len(text)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
