"""`mobilemoe run` and `mobilemoe chat`: options, turns, commands, interrupts, a full context, tools."""

import io
import json
import re
import signal

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mobilemoe.chat import Chat, Conversation
from mobilemoe.cli import main, make_parser
from mobilemoe.runtime import CheckpointModel, find_device


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(text_checkpoint):
    return CheckpointModel(text_checkpoint)


@pytest.fixture
def command(text_checkpoint, capsys, monkeypatch):
    """Runs `mobilemoe run` or `chat` on a checkpoint with some standard input, and returns stdout and stderr."""

    def run(*arguments: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        main([arguments[0], "--model", str(text_checkpoint), *arguments[1:]])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(command):
    def run(*arguments: str, stdin: str = "") -> str:
        with pytest.raises(SystemExit) as ended:
            command(*arguments, stdin=stdin)
        return str(ended.value)

    return run


def generated(model, tokens: list[int], max_new_tokens: int) -> str:
    model.reset()
    return "".join(model.stream(model.generate(tokens, max_new_tokens)))


def test_run_reads_the_prompt_and_the_system_message(model, command):
    expected = generated(model, model.encode("import os"), 12)
    for prompt, stdin in (("import os", ""), ("-", "import os\n")):
        answer, speed = command("run", "--prompt", prompt, "--max-new-tokens", "12", stdin=stdin)
        assert answer == expected + "\n"
        assert re.fullmatch(
            r"\[\d+ prompt tokens, first token after .* s; 12 new tokens, .* tokens/s\]", speed.splitlines()[-1]
        )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a walk?"}]
    options = ["--prompt", messages[1]["content"], "--max-new-tokens", "12"]
    alone = command("run", "--chat", *options)[0]
    assert alone == generated(model, model.encode_messages(messages[1:]), 12) + "\n"
    both = command("run", "--system", "Be brief.", *options)[0]
    assert both == generated(model, model.encode_messages(messages), 12) + "\n" and both != alone


def test_run_stops_before_a_text(model, command):
    whole = generated(model, model.encode("import os"), 40)
    stop = whole[len(whole) // 2 :][:3]
    answer = command("run", "--prompt", "import os", "--max-new-tokens", "40", "--stop", "\0", "--stop", stop)[0]
    assert answer == whole[: whole.index(stop)] + "\n"


def test_run_follows_an_expression_and_a_schema(command, refused, tmp_path):
    assert re.fullmatch("[a-c]{4}\n", command("run", "--prompt", "import", "--regex", "[a-c]{4}")[0])
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}')
    answer = json.loads(command("run", "--chat", "--prompt", "Yes?", "--json-schema", str(schema))[0])
    assert [type(item) for item in answer] == [bool, bool]
    error = refused("run", "--prompt", "import", "--regex", "[a-c]{40}", "--max-new-tokens", "3")
    assert "ended after 3 tokens, before it matched what was asked for. Raise --max-new-tokens" in error
    schema.write_text('{"type": "strin"}')
    assert "Invalid type: strin" in refused("run", "--prompt", "x", "--json-schema", str(schema))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--prompt", ""], "The prompt is empty. Give text, or --prompt -"),
        (["--prompt", "-"], "The prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "x", "--stop", ""], "A stop sequence is empty"),
        (["--prompt", "x", "--device", "toaster"], "The device toaster cannot be used: "),
        (["--prompt", "x", "--device", "cuda:99"], "The device cuda:99 cannot be used: "),
        (["--prompt", "x", "--json-schema", "none.json"], "none.json"),
        (["--prompt", "x", "--regex", "("], "The regular expression '(' cannot be followed"),
    ],
)
def test_options_that_cannot_be_used_are_refused(refused, options, error):
    assert error in refused("run", *options, stdin="\n")


def test_a_program_runs_on_the_cpu(pte_directory):
    with pytest.raises(SystemExit, match="runs on the CPU, and the device is cuda"):
        main(["run", "--model", str(pte_directory), "--prompt", "x", "--device", "cuda"])


def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_conversation_from_a_pipe(model, command, tmp_path):
    """Every answer is that of a new model to the messages before it."""
    path = tmp_path / "chat.json"
    lines = ["What is a walk?", "", "/stats", "And a run?", " /save it?", f"/save {path}", "/exit", "not read"]
    options = ["--system", "Be brief.", "--max-new-tokens", "10"]
    answers, notes = command("chat", *options, stdin="\n".join(lines))
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    assert [message["content"] for message in messages[1::2]] == ["What is a walk?", "And a run?", "/save it?"]
    for index in range(2, 7, 2):
        assert messages[index]["content"] == generated(model, model.encode_messages(messages[:index]), 10)
    assert answers == "".join(message["content"] + "\n" for message in messages[2::2])
    assert "7 messages in" in notes and "last answer: tokens/s" in notes
    # What is saved goes on, and can be written again.
    again, _ = command("chat", "--max-new-tokens", "10", stdin=f"/load {path}\nAnd?\n/save {path}\n")
    messages = json.loads(path.read_text())["messages"]
    assert len(messages) == 9 and messages[-1]["content"] + "\n" == again
    assert again == generated(model, model.encode_messages(messages[:-1]), 10) + "\n"


def test_a_command_that_fails_ends_a_pipe_with_its_error(refused, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('{"messages": [{"role": "robot", "content": "x"}]}')
    for line, error in (
        ("/sing", "/sing is no command, see /help"),
        ("/save", "/save needs the name of a file"),
        (f"/load {path}", "does not hold a conversation: messages.0.role is 'robot'"),
        (f"/save {path}", "exists and is no conversation"),
        ("x" * 2000, r"The message does not fit: with what comes before it, it has"),
        (f"/load {tmp_path}/none", "No such file"),
    ):
        assert error in refused("chat", stdin=line + "\n")
    assert "robot" in path.read_text()


def test_chat_needs_a_template(base_checkpoint):
    with pytest.raises(SystemExit, match="no chat template"):
        main(["chat", "--model", str(base_checkpoint)])


def make_chat(checkpoint, *options: str) -> Chat:
    return Chat(make_parser().parse_args(["chat", "--model", str(checkpoint), *options]))


def test_a_turn_runs_what_is_new(text_checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a walk?\nAnd a run?\n/reset\nWhat is a walk?\n"))
    chat = make_chat(text_checkpoint, "--max-new-tokens", "8")
    chat.loop()
    first, second, third = chat.writer.timings
    assert first.cached_tokens == 0
    # At least the first prompt: the tokens of an answer may not be those of its text.
    assert first.prompt_tokens <= second.cached_tokens < second.prompt_tokens
    # The same prompt again, except its last token.
    assert third.cached_tokens == third.prompt_tokens - 1 == first.prompt_tokens - 1
    assert len(chat.conversation.messages) == 2


def test_a_full_context_leaves_out_the_oldest_turns(text_checkpoint, model, monkeypatch, capsys):
    lines = "\n".join(f"Number {i} of all the walks" for i in range(30))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat = make_chat(text_checkpoint, "--max-new-tokens", "12", "--system", "Be brief.")
    prompts, answer = [], chat.writer.answer
    monkeypatch.setattr(chat.writer, "answer", lambda prompt, *rest: prompts.append(prompt) or answer(prompt, *rest))
    chat.loop()
    assert len(prompts) == 30 and len(chat.conversation.messages) == 61
    start = model.encode_messages([{"role": "system", "content": "Be brief."}])
    start = start[: start.index(504) + 1]
    for i, prompt in enumerate(prompts):
        assert len(prompt) <= model.max_seq_len - 12
        assert prompt[: len(start)] == start and f"Number {i} of" in model.decode(prompt)
    # After a cut, the next turns use the cache.
    timings = chat.writer.timings
    cut = [i for i in range(1, 30) if timings[i].cached_tokens < timings[i - 1].prompt_tokens]
    assert 1 < len(cut) < 10 and all(later - earlier > 2 for earlier, later in zip(cut, cut[1:], strict=False))
    assert capsys.readouterr().err.count("the context is full: the model no longer sees the oldest") == len(cut)


def test_turns_are_dropped_up_to_the_last(model):
    conversation = Conversation(model, None, [], 12)
    conversation.messages = [{"role": "user", "content": "short"}, {"role": "assistant", "content": "walk " * 60}]
    conversation.messages += [{"role": "user", "content": "walk " * 50}]
    tokens, dropped = conversation.prompt()
    assert dropped == 2 and len(tokens) > model.max_seq_len // 2
    assert conversation.prompt() == (tokens, 0)


def test_calls_of_tools_ask_for_results(text_checkpoint, tmp_path, monkeypatch, capsys):
    path, tools = tmp_path / "chat.json", tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Add one.\n2\n3\n/save {path}\nAdd one.\n"))
    chat = make_chat(text_checkpoint, "--tools", str(tools))
    prompts, answers = [], iter([f"Yes.\n{CALL}\n{CALL}", "Five.", CALL])
    monkeypatch.setattr(chat.writer, "answer", lambda prompt, *_: prompts.append(prompt) or next(answers))
    monkeypatch.setattr(chat, "answer", chat.writer.answer)
    chat.conversation.limit = 1024
    chat.loop()
    shown = chat.writer.model.tokenizer.decode(prompts[1])
    assert '"name": "add", "parameters"' in shown and f"Yes.\n{CALL}\n{CALL}<|eot|>" in shown
    assert "tool<|header_end|>\n\n2<|eot|>" in shown and shown.index("\n\n2<") < shown.index("\n\n3<")
    assert capsys.readouterr().err.count('[call of add with {"a": 1}]') == 3
    saved = json.loads(path.read_text())
    assert saved["tools"] == [TOOL]
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert saved["messages"][1] == {"role": "assistant", "content": "Yes.", "tool_calls": [call] * 2}
    # The file brings its tools.
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/load {path}\n"))
    chat = make_chat(text_checkpoint)
    chat.loop()
    assert chat.conversation.messages == saved["messages"] and chat.conversation.tools == [TOOL]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(text_checkpoint, monkeypatch):
    """Types keys into a chat. Returns it afterwards, and its model before."""

    def type_keys(keys: str, prepare=lambda chat: None) -> Chat:
        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **_: DummyOutput())
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            chat = make_chat(text_checkpoint, "--max-new-tokens", "12")
            prepare(chat)
            pipe.send_text(keys)
            chat.loop()
        return chat

    return type_keys


def test_errors_and_interrupts_at_the_prompt_do_not_end_a_chat(talk, capsys):
    # Ctrl-C deletes a line, and Ctrl-D ends.
    chat = talk("/sing\nhalf a line\x03/help\n" + "x" * 2000 + "\nWhat is a walk?\n\x04")
    assert [message["role"] for message in chat.conversation.messages] == ["user", "assistant"]
    notes = capsys.readouterr().err
    for text in ("/sing is no command", "/exit or Ctrl-D ends", "/load FILE", "The message does not fit"):
        assert text in notes


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_stops_the_answer_only(talk, model, capsys, interrupts):
    def prepare(chat: Chat) -> None:
        forward, calls = chat.writer.model._forward, []

        def interrupted(*arguments):
            calls.append(arguments)
            logits = forward(*arguments)
            if len(calls) == 4:
                for _ in range(interrupts):
                    signal.raise_signal(signal.SIGINT)
            return logits

        chat.writer.model._forward = interrupted

    before = signal.getsignal(signal.SIGINT)
    chat = talk("What is a walk?\nAnd a run?\n/exit\n", prepare)
    assert signal.getsignal(signal.SIGINT) == before
    answers = [message["content"] for message in chat.conversation.messages[1::2]]
    # The token that was being computed is still written, unless the call was interrupted.
    tokens = list(model.generate(model.encode_messages(chat.conversation.messages[:1]), 12))
    assert answers[0] == model.decode(tokens[: 5 - interrupts])
    assert answers[1] == generated(model, model.encode_messages(chat.conversation.messages[:3]), 12)
    assert capsys.readouterr().err.count("[stopped]") == 1
    # An interrupted call leaves nothing in the cache.
    assert (chat.writer.timings[1].cached_tokens > 0) == (interrupts == 1)
