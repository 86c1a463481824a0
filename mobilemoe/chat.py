"""Answers in the terminal: one (`mobilemoe run`), or a conversation (`mobilemoe chat`)."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel
from rich.console import Console

from .artifacts import Artifact
from .device.find import is_device
from .display import number, table
from .generation import LanguageModel, TextModel, Timing, until
from .runtime import CheckpointModel, load_language_model
from .tools import Tool, ToolCall, parse_tool_calls, read_tools


if TYPE_CHECKING:
    from .grammar import Grammar


HELP = """\
/reset        forget the conversation, except the system message
/save FILE    write the conversation to a JSON file
/load FILE    continue the conversation in a file
/stats        tokens and speed so far
/exit         end, as does Ctrl-D
Ctrl-C stops an answer. A line that begins with a space is always a message."""


class Call(BaseModel):
    type: Literal["function"]
    function: ToolCall


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[Call] = []


class Transcript(Artifact):
    """A conversation in a file: also a line of training data, in the format `messages`."""

    what = "a conversation"
    remedy = "Name a file that /save wrote."

    messages: list[Message]
    tools: list[Tool] = []


def load_text_model(model: str, device: str, constrained: bool) -> TextModel:
    """
    Raises:
        ValueError: as [`load_language_model`], and for a phone or a board also when the answer is to be constrained.
    """
    if not is_device(device):
        return load_language_model(model, device)
    if constrained:
        raise ValueError(
            f"--json-schema and --regex need the probabilities of all tokens, which {device} does not send. Leave one "
            "of them out."
        )
    from .device.model import DeviceModel

    return DeviceModel(model, device)


class Writer:
    """
    Writes answers of a model to stdout, and measures them.

    Args:
        arguments (`argparse.Namespace`): those of `add_generation_arguments` in cli.py, and `model`.

    Raises:
        ValueError, OSError: for what is wrong in them, before the model is loaded where that is possible.
    """

    def __init__(self, arguments: argparse.Namespace):
        if arguments.max_new_tokens < 1:
            raise ValueError(
                f"--max-new-tokens is {arguments.max_new_tokens}: an answer has at least 1. Set it higher."
            )
        # Raises for an empty one.
        list(until([], arguments.stop))
        schema = None
        if arguments.json_schema is not None:
            from .grammar import read_schema

            schema = read_schema(arguments.json_schema)
        self.max_new_tokens, self.stop = arguments.max_new_tokens, arguments.stop
        self.model = load_text_model(
            arguments.model, arguments.device, schema is not None or arguments.regex is not None
        )
        if isinstance(self.model, CheckpointModel) and self.model.model.device.type != "cpu":
            device = self.model.model.device
            note(f"[on {device}{': ' + torch.cuda.get_device_name(device) if device.type == 'cuda' else ''}]")
        self.grammar: Grammar | None = None
        if isinstance(self.model, LanguageModel) and schema is not None:
            self.grammar = self.model.grammars.json_schema(schema)
        elif isinstance(self.model, LanguageModel) and arguments.regex is not None:
            self.grammar = self.model.grammars.regex(arguments.regex)
        names = ("temperature", "top_p", "seed", "prompt_lookup")
        self.options: dict[str, Any] = {name: vars(arguments)[name] for name in names}
        self.options |= {} if self.grammar is None else {"grammar": self.grammar}
        self.timings: list[Timing] = []

    def answer(self, prompt: list[int], stopped: Event | None = None) -> str:
        """Writes an answer as it grows. With `stopped`, it is what there is when that is set, or at an interrupt."""
        timing = Timing(len(prompt), self.model.num_cached(prompt), time.perf_counter())
        self.timings.append(timing)

        def tokens() -> Iterator[int]:
            for token in self.model.generate(prompt, self.max_new_tokens, **self.options):
                timing.times.append(time.perf_counter())
                yield token
                if stopped is not None and stopped.is_set():
                    return

        text = ""
        try:
            for piece in until(self.model.stream(tokens()), self.stop):
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if stopped is None:
                raise
        print(flush=True)
        return text

    @property
    def cut(self) -> str | None:
        """Why the last answer is not what the grammar asks for, `None` if it is."""
        if self.grammar is None or self.grammar.is_matched:
            return None
        return (
            f"The answer ended after {len(self.timings[-1].times)} tokens, before it matched what was asked for. "
            "Raise --max-new-tokens, or bound what may be long (maxLength, maxItems, {1,20})."
        )


def note(text: str) -> None:
    """A line that is no part of an answer."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def run(arguments: argparse.Namespace) -> None:
    """
    Writes one answer to stdout, and its speed to stderr.

    Raises:
        ValueError: for an empty prompt, options that cannot be used, or an answer that does not match the grammar.
    """
    prompt = arguments.prompt
    if prompt == "-":
        # The line break that `echo` adds is not meant.
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise ValueError("The prompt is empty. Give text, or --prompt - to read it from standard input.")
    writer = Writer(arguments)
    if arguments.chat or arguments.system is not None:
        messages = [{"role": "user", "content": prompt}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        tokens = writer.model.encode_messages(messages)
    else:
        tokens = writer.model.encode(prompt)
    writer.answer(tokens)
    if len(writer.timings[0].times) > 1:
        print(f"[{writer.timings[0]}]", file=sys.stderr)
    if writer.cut is not None:
        raise ValueError(writer.cut)


class Conversation:
    """
    The messages of a conversation, and which of them the model sees.

    When the next answer has no room in the context, the oldest turns are left out, until what is seen takes at most
    half of the context: later turns can then use the cache. The system message is always seen.
    """

    def __init__(self, model: TextModel, system: str | None, tools: list[dict[str, Any]], max_new_tokens: int):
        self.model, self.tools = model, tools
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        # Room for an answer.
        self.limit = model.max_seq_len - min(max_new_tokens, model.max_seq_len // 4)
        # The first message after the system message that the model sees.
        self.first = self.num_system

    @property
    def num_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def replace(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages
        self.first = self.num_system

    def encode(self, first: int) -> list[int]:
        return self.model.encode_messages(
            [*self.messages[: self.num_system], *self.messages[first:]], self.tools or None
        )

    def prompt(self) -> tuple[list[int], int]:
        """
        Token ids up to where the model answers, and how many messages were left out for them.

        Raises:
            ValueError: when the last turn does not fit into the context.
        """
        tokens = self.encode(self.first)
        if len(tokens) <= self.limit:
            return tokens, 0
        turns = [i for i in range(self.first + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        for start in turns:
            tokens = self.encode(start)
            if len(tokens) <= self.model.max_seq_len // 2 or start == turns[-1] and len(tokens) <= self.limit:
                dropped, self.first = start - self.first, start
                return tokens, dropped
        raise ValueError(
            f"The message does not fit: with what comes before it, it has {len(tokens)} tokens, and the context of "
            f"{self.model.max_seq_len} leaves {self.limit} beside an answer. Shorten it, or lower --max-new-tokens."
        )

    def save(self, path: str) -> None:
        """
        Raises:
            ValueError: when the file exists and holds something else.
        """
        if Path(path).exists():
            try:
                Transcript.load(path)
            except ValueError as error:
                raise ValueError(f"{path} exists and is no conversation. Give another name.") from error
        tools = {"tools": [Tool(**tool) for tool in self.tools]} if self.tools else {}
        Transcript(messages=[Message(**message) for message in self.messages], **tools).save(path)

    def load(self, path: str) -> None:
        transcript = Transcript.load(path).as_dict()
        self.tools = transcript.get("tools", [])
        self.replace(transcript["messages"])


@contextmanager
def stopped_by_interrupt() -> Generator[Event]:
    """Ctrl-C sets the event, as an interrupted call would lose the cache. Ctrl-C again raises KeyboardInterrupt."""
    stopped = Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """
    A conversation in the terminal, or one that is read from a pipe, line by line.

    In a terminal, what is wrong is said and the conversation goes on. In a pipe it is an error, as is Ctrl-C.
    """

    def __init__(self, arguments: argparse.Namespace):
        tools = [] if arguments.tools is None else read_tools(arguments.tools)
        self.session = None
        if sys.stdin.isatty():
            from prompt_toolkit import PromptSession
            from prompt_toolkit.output import create_output

            # Not into an answer that is piped elsewhere.
            self.session = PromptSession(output=create_output(always_prefer_tty=True))
        self.writer = Writer(arguments)
        model = self.writer.model
        self.conversation = Conversation(model, arguments.system, tools, arguments.max_new_tokens)
        # An error without a chat template, before the first message is typed.
        model.encode_messages([{"role": "user", "content": "."}], tools or None)

    def loop(self) -> None:
        if self.session is not None:
            note(f"[context of {self.writer.model.max_seq_len} tokens; /help shows the commands, /exit ends]")
        while (line := self.read("> ")) is not None:
            try:
                if line.startswith("/"):
                    name, _, rest = line.strip().partition(" ")
                    if name == "/exit":
                        return
                    self.command(name, rest.strip())
                elif line.strip():
                    self.turn([{"role": "user", "content": line.strip()}])
            except (ValueError, OSError) as error:
                if self.session is None:
                    raise
                note(f"[{error}]")

    def read(self, prompt: str) -> str | None:
        """A line, `None` at the end of the input."""
        if self.session is None:
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        while True:
            try:
                return self.session.prompt(prompt)
            except KeyboardInterrupt:
                note("[/exit or Ctrl-D ends]")
            except EOFError:
                return None

    def command(self, name: str, rest: str) -> None:
        conversation = self.conversation
        if name in ("/save", "/load") and not rest:
            raise ValueError(f"{name} needs the name of a file: {name} chat.json")
        if name == "/help":
            note(HELP)
        elif name == "/reset":
            conversation.replace(conversation.messages[: conversation.num_system])
        elif name == "/save":
            conversation.save(rest)
            note(f"[{len(conversation.messages)} messages in {rest}]")
        elif name == "/load":
            conversation.load(rest)
            note(f"[{len(conversation.messages)} messages from {rest}]")
        elif name == "/stats":
            self.stats()
        else:
            raise ValueError(
                f"{name} is no command, see /help. Put a space before a message that begins with a slash."
            )

    def turn(self, messages: list[dict[str, Any]]) -> None:
        """Adds messages and what the model answers, or nothing if there is no answer."""
        conversation = self.conversation
        before = len(conversation.messages)
        conversation.messages += messages
        try:
            prompt, dropped = conversation.prompt()
            if dropped:
                note(f"[the context is full: the model no longer sees the oldest {dropped} messages]")
            text = self.answer(prompt)
        except (ValueError, OSError):
            del conversation.messages[before:]
            raise
        content, calls = parse_tool_calls(text) if conversation.tools else (text, [])
        answer: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            answer["tool_calls"] = [{"type": "function", "function": call.model_dump()} for call in calls]
        conversation.messages.append(answer)
        results = []
        for call in calls:
            note(f"[call of {call.name} with {json.dumps(call.arguments)}]")
            result = self.read(f"result of {call.name}> ")
            if result is None:
                return
            results.append({"role": "tool", "content": result})
        if results:
            self.turn(results)

    def answer(self, prompt: list[int]) -> str:
        writer = self.writer
        if self.session is None:
            text = writer.answer(prompt)
        else:
            with stopped_by_interrupt() as stopped:
                text = writer.answer(prompt, stopped)
            if stopped.is_set():
                note("[stopped]")
                return text
        if writer.cut is not None:
            raise ValueError(writer.cut)
        num_tokens = len(writer.timings[-1].times)
        if num_tokens == writer.max_new_tokens:
            note(f"[cut off after {num_tokens} tokens; --max-new-tokens sets how many]")
        elif len(prompt) + num_tokens > writer.model.max_seq_len:
            note(f"[cut off after {num_tokens} tokens: the context is full]")
        return text

    def stats(self) -> None:
        timings, conversation = self.writer.timings, self.conversation
        tokens = len(conversation.encode(conversation.first)) if conversation.messages else 0
        rows = [
            ("messages, seen by the model", f"{len(conversation.messages)}, {self.num_seen()}"),
            ("tokens that it sees, context", f"{tokens}, {self.writer.model.max_seq_len}"),
            ("answers, new tokens", f"{len(timings)}, {sum(len(timing.times) for timing in timings)}"),
        ]
        if timings and timings[-1].times:
            last = timings[-1]
            rows += [
                ("last answer: prompt tokens, cached", f"{last.prompt_tokens}, {last.cached_tokens}"),
                ("last answer: seconds to the first token", f"{last.times[0] - last.started:.2f}"),
                ("last answer: tokens/s", number(last.tokens_per_second) if last.tokens_per_second else "-"),
            ]
        Console(stderr=True).print(table(("", ""), rows))

    def num_seen(self) -> int:
        return len(self.conversation.messages) - self.conversation.first + self.conversation.num_system


def chat(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for options that cannot be used, or a model without a chat template; in a pipe also for an unknown
            command, or a message or an answer that does not fit.
    """
    Chat(arguments).loop()
