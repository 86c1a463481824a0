"""Tool definitions from files, and calls in what a model wrote."""

import json
import random

import pytest

from mobilemoe.tools import CALL_END, CALL_START, ToolCall, parse_tool_calls, read_tools


TOOL = {"type": "function", "function": {"name": "add", "strict": True, "parameters": {"type": "object"}}}


def block(content: str) -> str:
    return f"{CALL_START}\n{content}\n{CALL_END}"


CALL = block('{"name": "add", "arguments": {"a": 1}}')


def test_what_the_template_renders_is_parsed(chat_tokenizer):
    """Any text and any calls, with tags, quotes and line breaks in both."""
    generator = random.Random(0)
    pieces = ["a ", "\n", '"', "}", CALL_START, CALL_END, "é", "{", "\\", "<tool"]

    def words(least: int) -> str:
        return "".join(generator.choices(pieces, k=generator.randrange(least, 5)))

    for _ in range(300):
        # A call in the text, and a line break at its end, cannot be told from a call.
        content = words(0).rstrip("\n")
        calls = [ToolCall(name=words(1), arguments={words(1): [words(0), 1.5, None]}) for _ in range(3)]
        calls = calls[: generator.randrange(4)]
        message = {"role": "assistant", "content": content, "tool_calls": [call.model_dump() for call in calls]}
        rendered = chat_tokenizer.apply_chat_template([message], tokenize=False)
        answer = rendered.partition("assistant<|header_end|>\n\n")[2].removesuffix("<|eot|>")
        assert parse_tool_calls(answer) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("Four.\n", "Four.\n", []),
        ("", "", []),
        (f"Yes.\n{CALL}", "Yes.", ["add"]),
        (f"{CALL}\n{CALL}\n", "", ["add", "add"]),
        (f"Yes.\n{CALL}\nDone.", "Yes.Done.", ["add"]),
        (CALL_START + '{"name": "now"}' + CALL_END, "", ["now"]),
        # Cut off after the JSON, and within it.
        (CALL_START + '\n{"name": "now"}\n', "", ["now"]),
        (CALL_START + '\n{"name": "now", "argum', None, []),
        (block('{"name": "add", "arguments": {"a": NaN}}'), None, []),
        (block('{"name": "add", "arguments": "a"}'), None, []),
        (block('{"name": 3, "arguments": {}}'), None, []),
        (block('{"arguments": {}}'), None, []),
        (block("[" * 100_000), None, []),
        (block('{"name": "now"} or so'), None, []),
        # What is no call does not hide the next one.
        (f"{CALL_START}\n{CALL}", CALL_START, ["add"]),
        (block("add") + CALL, block("add"), ["add"]),
    ],
)
def test_blocks_that_are_no_calls_stay_in_the_text(text, content, names):
    found, calls = parse_tool_calls(text)
    assert found == (text if content is None else content)
    assert [call.name for call in calls] == names


def test_tools_are_read_as_written(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([TOOL]))
    assert read_tools(path) == [TOOL]
    for content, error in (
        ("[", "it is not JSON"),
        (json.dumps(TOOL), "is {.*, expected a valid"),
        (json.dumps([{"type": "function", "function": {}}]), "the key 0.function.name is missing. Each is an object"),
        (json.dumps([TOOL | {"type": "retrieval"}]), "0.type is 'retrieval', expected 'function'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=error):
            read_tools(path)
