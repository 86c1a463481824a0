"""`mobilemoe serve`, asked by OpenAI's client: a scripted model in this process, and real ones in processes."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn

from mobilemoe.cli import main
from mobilemoe.generation import LanguageModel
from mobilemoe.runtime import load_language_model
from mobilemoe.serve import engine
from mobilemoe.serve.app import Limits, Server, is_this_machine
from mobilemoe.serve.main import bind, configuration
from mobilemoe.tools import CALL_END, CALL_START


MESSAGES = [{"role": "user", "content": "import argparse"}]
CHAT = {"model": "scripted", "messages": MESSAGES}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
LIMITS = Limits(prompt_tokens=400, new_tokens=200, body_bytes=100_000, waiting=2)


class Scripted(LanguageModel):
    """Writes the same text for every prompt, each token when it may."""

    max_seq_len = 512
    all_logits = None

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_ids = tokenizer, []
        self.script("def add(a, b): return a + b")

    def _forward(self, tokens, start, num_positions):
        return torch.zeros(num_positions, 1)

    def script(self, text: str, may_write: int = 10_000) -> None:
        self.tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        self.permits = threading.Semaphore(may_write)
        self.prompts, self.options, self.num_written = [], [], 0
        self.error = None

    def generate(self, tokens, max_new_tokens, **options):
        self.prompts.append(self.decode(tokens))
        self.options.append(options)
        for token in self.tokens[:max_new_tokens]:
            # An end for a test that fails.
            assert self.permits.acquire(timeout=60)
            if self.error is not None:
                raise self.error
            self.num_written += 1
            yield token


@contextmanager
def listening(server: Server):
    with bind("127.0.0.1", 0) as listener:
        process = uvicorn.Server(configuration(server.app))
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.should_exit = True
            thread.join()


def client_of(address: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", **{"api_key": "none", "max_retries": 0} | options)


@pytest.fixture(scope="module")
def scripted_server(chat_tokenizer):
    model = Scripted(chat_tokenizer)
    server = Server(model, "scripted", LIMITS)
    with listening(server) as address:
        yield model, server, address


@pytest.fixture
def scripted(scripted_server) -> Scripted:
    scripted_server[0].script("def add(a, b): return a + b")
    return scripted_server[0]


@pytest.fixture(scope="module")
def address(scripted_server) -> str:
    return scripted_server[2]


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return client_of(address)


def until(condition) -> None:
    """Waits, for at most three minutes: a busy machine takes long to load a model."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_chat_answer(scripted, client):
    answer = client.chat.completions.create(**CHAT)
    (choice,) = answer.choices
    assert choice.message.content == "def add(a, b): return a + b" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    prompt = scripted.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert scripted.prompts == [scripted.decode(prompt)]
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(scripted.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(scripted.tokens)
    assert answer.object == "chat.completion" and answer.model == "scripted"
    assert answer.id != client.chat.completions.create(**CHAT).id


def test_a_streamed_chat_answer(scripted, client):
    # With a character of several tokens.
    scripted.script("return 'naïve \N{GRINNING FACE}'")
    options = {"stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, **options))
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *answer, last, counts = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in answer)
    assert "".join(chunk.choices[0].delta.content for chunk in answer) == "return 'naïve \N{GRINNING FACE}'"
    assert len(answer) > 3
    assert last.choices[0].finish_reason == "stop" and not last.choices[0].delta.content
    assert counts.choices == [] and counts.usage.completion_tokens == len(scripted.tokens)
    assert [chunk.usage for chunk in client.chat.completions.create(**CHAT, stream=True)][-1] is None
    # An empty answer, too, begins and ends.
    scripted.script("")
    first, last = client.chat.completions.create(**CHAT, stream=True)
    assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason == "stop"


def test_text_comes_when_it_is_written(scripted, client):
    scripted.script("def add(a, b): return a + b", may_write=2)
    stream = client.chat.completions.create(**CHAT, stream=True)
    next(stream), next(stream)
    assert scripted.num_written == 2
    scripted.permits.release(10_000)
    assert list(stream)[-1].choices[0].finish_reason == "stop"


def test_completions(scripted, client):
    tokens = scripted.tokenizer("import os").input_ids
    for prompt in ("import os", ["import os"]):
        answer = client.completions.create(model="scripted", prompt=prompt, max_tokens=4)
        assert answer.choices[0].text == scripted.decode(scripted.tokens[:4]) and answer.object == "text_completion"
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 4
        assert answer.usage.prompt_tokens == len(tokens)
    assert set(scripted.prompts) == {"import os"}
    scripted.script("a = b + c\n" * 20)
    chunks = list(client.completions.create(model="scripted", prompt="", stream=True))
    # OpenAI's default.
    assert "".join(chunk.choices[0].text for chunk in chunks) == scripted.decode(scripted.tokens[:16])
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[0].object == "text_completion"


def test_sampling_options_reach_the_model(scripted, client):
    client.chat.completions.create(**CHAT, temperature=0.3, top_p=0.9, seed=5)
    assert scripted.options == [{"temperature": 0.3, "top_p": 0.9, "seed": 5, "grammar": None}]
    client.chat.completions.create(**CHAT)
    # OpenAI's defaults.
    assert scripted.options[1:] == [{"temperature": 1, "top_p": 1, "seed": None, "grammar": None}]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_answer_ends_after_max_tokens(scripted, client, name):
    answer = client.chat.completions.create(**CHAT, **{name: 3})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    # All of the text, and no end was seen.
    answer = client.chat.completions.create(**CHAT, **{name: len(scripted.tokens)})
    assert answer.choices[0].finish_reason == "length"
    answer = client.chat.completions.create(**CHAT, **{name: len(scripted.tokens) + 1})
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(scripted, client, stream):
    def text(stop) -> str:
        answer = client.chat.completions.create(**CHAT, stop=stop, stream=stream)
        if not stream:
            assert answer.choices[0].finish_reason == "stop"
            return answer.choices[0].message.content
        *chunks, last = answer
        assert last.choices[0].finish_reason == "stop"
        return "".join(chunk.choices[0].delta.content for chunk in chunks)

    assert text("b)") == "def add(a, "
    assert text([": ret", "return"]) == "def add(a, b)"
    assert text(["urn a * b", "(a, c"]) == "def add(a, b): return a + b"
    assert text("def") == ""
    # The rest is not written.
    scripted.script("def add(a, b): return a + b" * 3)
    text(")")
    assert scripted.num_written < len(scripted.tokens) / 4


CALLS = f'{CALL_START}\n{{"name": "add", "arguments": {{"a": 1, "b": "ü"}}}}\n{CALL_END}'


@pytest.mark.parametrize(
    ("text", "content", "number"),
    [
        (f"Yes.\n{CALLS}\n{CALLS}", "Yes.", 2),
        (CALLS, None, 1),
        ("a <tool> and\nno call", "a <tool> and\nno call", 0),
        (f'{CALL_START}\n{{"name": ', f'{CALL_START}\n{{"name": ', 0),
    ],
)
def test_tool_calls(scripted, client, text, content, number):
    scripted.script(text)
    answer = client.chat.completions.create(**CHAT, tools=[TOOL])
    message = answer.choices[0].message
    calls = message.tool_calls or []
    assert message.content == content and len(calls) == number
    assert all(
        call.function.name == "add" and json.loads(call.function.arguments) == {"a": 1, "b": "ü"} for call in calls
    )
    assert len({call.id for call in calls}) == number
    assert answer.choices[0].finish_reason == ("tool_calls" if number else "stop")
    # The template shows the tool.
    assert '{"type": "function", "function": {"name": "add"' in scripted.prompts[0]
    with client.chat.completions.stream(**CHAT, tools=[TOOL]) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.message.content or None) == (content or None)
    assert streamed.finish_reason == answer.choices[0].finish_reason
    functions = [(call.function.name, call.function.arguments) for call in streamed.message.tool_calls or []]
    assert functions == [(call.function.name, call.function.arguments) for call in calls]
    # Without tools it is text.
    plain = client.chat.completions.create(**CHAT, tools=[TOOL], tool_choice="none").choices[0]
    assert plain.message.content == text and plain.finish_reason == "stop" and "<tools>" not in scripted.prompts[-1]


def test_answers_and_results_of_calls_may_be_sent_back(scripted, client):
    scripted.script(CALLS)
    first = client.chat.completions.create(**CHAT, tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "3"}
    scripted.script("Three.")
    for sent in (first, first.model_dump()):
        messages = [{"role": "developer", "content": "Be brief."}, *MESSAGES, sent, result]
        answer = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL])
        assert answer.choices[0].message.content == "Three."
    assert len(set(scripted.prompts)) == 1
    assert (
        CALLS in scripted.prompts[0] and "Be brief." in scripted.prompts[0] and "developer" not in scripted.prompts[0]
    )
    parts = [{"type": "text", "text": "import "}, {"type": "text", "text": "argparse"}]
    scripted.script("x")
    client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": parts}])
    client.chat.completions.create(**CHAT)
    assert scripted.prompts[0] == scripted.prompts[1]


def test_half_a_surrogate_pair_in_a_call(scripted, client):
    scripted.script(CALLS.replace("ü", "\\ud800"))
    (call,) = client.chat.completions.create(**CHAT, tools=[TOOL]).choices[0].message.tool_calls
    assert call.function.arguments == '{"a": 1, "b": "\\ud800"}'
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [call.model_dump()]}]
    with pytest.raises(openai.BadRequestError, match="The arguments of a call of 'add' are no JSON object"):
        client.chat.completions.create(model="scripted", messages=messages)


def test_models_and_health(scripted, client, address):
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").owned_by == "mobilemoe"
    with pytest.raises(openai.NotFoundError, match="There is no model 'a/b'. This server has 'scripted'"):
        client.models.retrieve("a/b")
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "requests": 0}


def refused(address: str, path: str, **request) -> tuple[int, dict]:
    method = request.pop("method", "POST")
    response = httpx.request(method, address + path, **request)
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] and len(error["message"]) < 600
    return response.status_code, error


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": None}, "messages", "messages is None, expected a valid array"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "is 'robot', expected 'developer', "),
        ({"messages": [{"role": "user"}]}, "messages.0", "a message needs content. Set it to a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "is 5, expected a valid array"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "is 'image_url', expected 'text'",
        ),
        ({"temperature": "hot"}, "temperature", "is 'hot', expected a valid number"),
        ({"temperature": 2.5}, "temperature", "is 2.5, expected less than or equal to 2"),
        ({"top_p": 0}, "top_p", "is 0, expected greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "is 0, expected greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "expected a valid integer"),
        ({"max_tokens": "5"}, "max_tokens", "expected a valid integer"),
        ({"max_tokens": 201}, "max_tokens", "max_tokens is 201, and this server writes at most 200"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None, "are the same. Set one"),
        ({"seed": 2**63}, "seed", "expected less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"stream": "yes"}, "stream", "expected a valid boolean"),
        ({"stream_options": {"include_usage": True}}, None, "need stream: true"),
        ({"n": 2}, "n", "n: this server does not support it. Leave it out"),
        ({"logprobs": True}, "logprobs", "does not support it"),
        ({"presence_penalty": 0.5}, "presence_penalty", "does not support it"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support it"),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "does not support it"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "the key tools.0.function is missing"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, None, "exclude each other"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "is 'xml', expected 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "set type to"),
        ({"top_k": 5}, "top_k", "top_k is not a field that this server knows. Leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_refused(scripted, address, change, param, message):
    status, error = refused(address, "/v1/chat/completions", json=CHAT | change)
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert scripted.prompts == []


@pytest.mark.parametrize(
    ("path", "request_", "status", "code", "message"),
    [
        ("/v1/chat/completions", {"content": b'{"model": ', "headers": JSON}, 400, "invalid_json", "it is not JSON"),
        ("/v1/chat/completions", {"content": b"\xff", "headers": JSON}, 400, "invalid_json", "it is not JSON"),
        ("/v1/chat/completions", {"content": b"", "headers": JSON}, 400, "invalid_json", "it is not JSON"),
        ("/v1/chat/completions", {"content": b"[" * 90_000, "headers": JSON}, 400, "invalid_json", "it is not JSON"),
        ("/v1/chat/completions", {"content": b"[]", "headers": JSON}, 400, None, "its content is [], expected an obj"),
        ("/v1/chat/completions", {"content": json.dumps(CHAT)}, 415, None, "Set the header Content-Type"),
        (
            "/v1/chat/completions",
            {"content": b"x" * 10_000_000, "headers": JSON},
            413,
            "body_too_large",
            "than 100000",
        ),
        ("/v1/chat/completions", {"json": CHAT | {"model": "gpt-5"}}, 404, "model_not_found", "no model 'gpt-5'"),
        (
            "/v1/chat/completions",
            {"json": CHAT | {"temperature": None}, "headers": {"host": "a.example"}},
            403,
            None,
            "",
        ),
        ("/v1/completions", {"json": {"model": "scripted"}}, 400, None, "the key prompt is missing"),
        ("/v1/completions", {"json": {"model": "scripted", "prompt": ["a", "b"]}}, 400, None, "at most 1 item"),
        ("/v1/completions", {"json": {"model": "scripted", "prompt": []}}, 400, None, "at least 1 item"),
        ("/v1/completions", {"json": {"model": "scripted", "prompt": [512]}}, 400, None, "expected a valid string"),
        (
            "/v1/completions",
            {"json": {"model": "scripted", "prompt": "a", "echo": True}},
            400,
            None,
            "echo: this server",
        ),
        (
            "/v1/completions",
            {"json": {"model": "scripted", "prompt": "é" * 200}},
            400,
            "context_length_exceeded",
            "The prompt has 401 tokens, and this server takes 400",
        ),
        (
            "/v1/completions",
            {"json": {"model": "scripted", "prompt": "é" * 199, "max_tokens": 114}},
            400,
            "context_length_exceeded",
            "exceed the context of 512 tokens. Set max_tokens to 113 or less",
        ),
        ("/v1/chat/completions", {"method": "GET"}, 405, None, "Method Not Allowed"),
        ("/v1/embeddings", {"json": {}}, 404, None, "Not Found"),
        ("/../../etc/passwd", {"method": "GET"}, 404, None, "Not Found"),
        ("/v1/models/..%2f..%2fetc%2fpasswd", {"method": "GET"}, 404, "model_not_found", "There is no model"),
    ],
)
def test_wrong_requests_are_refused(scripted, address, path, request_, status, code, message):
    got, error = refused(address, path, **request_)
    assert (got, error["code"]) == (status, code) and message in error["message"]
    assert scripted.prompts == []


def test_a_long_body_is_not_kept(scripted, address):
    """Sent in parts, without its length."""
    parts = (b" " * 50_000 for _ in range(200))
    status, error = refused(address, "/v1/chat/completions", content=parts, headers=JSON)
    assert status == 413 and error["code"] == "body_too_large"


def test_fields_that_change_nothing_are_accepted(scripted, client):
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False}
    neutral |= {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "top_p": None}
    neutral |= {"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto", "stop": None}
    assert client.chat.completions.create(**CHAT, **neutral).choices[0].finish_reason == "stop"


def test_a_base_model_has_no_chat(scripted, client, monkeypatch):
    monkeypatch.setattr(scripted.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(**CHAT)
    assert client.completions.create(model="scripted", prompt="a").choices[0].text


def test_what_the_template_refuses(scripted, client, monkeypatch):
    monkeypatch.setattr(scripted.tokenizer, "chat_template", "{{ raise_exception('Only users may speak.') }}")
    with pytest.raises(openai.BadRequestError, match="rejects the conversation: Only users may speak"):
        client.chat.completions.create(**CHAT)


def test_a_request_waits_its_turn(scripted_server, scripted):
    """In the order of arrival; one more than may wait is refused at once."""
    _, server, address = scripted_server
    scripted.script("a b", may_write=0)
    with ThreadPoolExecutor() as pool:
        asked = []
        for number in range(3):
            request = {"model": "scripted", "prompt": f"import {number}"}
            asked.append(pool.submit(client_of(address).completions.create, **request))
            until(lambda: server.engine.num_requests == len(asked))  # noqa: B023  is called before the next one
        with pytest.raises(openai.RateLimitError, match="2 requests wait for it. Try again later") as refusal:
            client_of(address).completions.create(model="scripted", prompt="late")
        assert refusal.value.code == "queue_full"
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "requests": 3}
        scripted.permits.release(100)
        assert {answer.result().choices[0].text for answer in asked} == {"a b"}
    assert scripted.prompts == ["import 0", "import 1", "import 2"]
    assert server.engine.num_requests == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(scripted_server, scripted, stream):
    _, server, address = scripted_server
    scripted.script("a = b + c\n" * 20, may_write=2)
    body = json.dumps(CHAT | {"stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    port = int(address.rpartition(":")[2])
    running, waiting = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
    for number, connection in enumerate((running, waiting), 1):
        connection.sendall(head.encode() + body)
        until(lambda: server.engine.num_requests == number)  # noqa: B023
    until(lambda: scripted.num_written == 2)
    waiting.close()
    until(lambda: server.engine.num_requests == 1)
    running.close()
    # The token that is being computed when it goes is the last one.
    time.sleep(0.2)
    scripted.permits.release(100)
    until(lambda: server.engine.num_requests == 0)
    assert len(scripted.prompts) == 1 and scripted.num_written <= 4
    # The next one is answered.
    assert (
        client_of(address).completions.create(model="scripted", prompt="a", max_tokens=1).usage.completion_tokens == 1
    )


def test_a_failure_of_the_model(scripted, client, caplog):
    scripted.error = RuntimeError("boom")
    with pytest.raises(openai.InternalServerError, match="The server failed. Its log says why"):
        client.chat.completions.create(**CHAT)
    with pytest.raises(openai.InternalServerError, match="The server failed"):
        client.chat.completions.create(**CHAT, stream=True)
    assert "boom" in caplog.text
    # After the first text, the stream breaks off.
    scripted.script("a b c d", may_write=2)
    stream = client.chat.completions.create(**CHAT, stream=True)
    next(stream), next(stream)
    scripted.error = RuntimeError("boom")
    scripted.permits.release(100)
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
        list(stream)
    scripted.script("a")
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "a"


def test_shutting_down(chat_tokenizer):
    """What waits is told at once, what runs has until the end of the grace period."""
    model = Scripted(chat_tokenizer)
    model.script("a b c d e f", may_write=2)
    server = Server(model, "scripted", LIMITS)
    with listening(server) as address, ThreadPoolExecutor() as pool:
        stream = client_of(address).chat.completions.create(**CHAT, stream=True)
        next(stream), next(stream)
        waiting = pool.submit(client_of(address).chat.completions.create, **CHAT)
        until(lambda: server.engine.num_requests == 2)
        server.engine.close(grace_seconds=1000)
        with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
            client_of(address).chat.completions.create(**CHAT)
        model.permits.release(1)
        next(stream)
        server.engine.close(grace_seconds=0)
        model.permits.release(100)
        with pytest.raises(openai.APIError, match="The server is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
            waiting.result()


def test_an_api_key(chat_tokenizer, monkeypatch):
    server = Server(Scripted(chat_tokenizer), "scripted", LIMITS, api_key="secret")
    with listening(server) as address:
        assert client_of(address, api_key="secret").models.list().data[0].id == "scripted"
        for key in ("wrong", "secre", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="Wrong API key"):
                client_of(address, api_key=key).chat.completions.create(**CHAT)
        for headers in (
            {},
            {"authorization": "secret"},
            {"authorization": "Basic secret"},
            {"authorization": "Bearer é"},
        ):
            headers = {name: value.encode() for name, value in headers.items()}
            assert refused(address, "/v1/models", method="GET", headers=headers)[0] == 401
        # Health tells nothing, and needs no key; a key is enough under any name.
        assert httpx.get(f"{address}/health").status_code == 200
        named = {"host": "phone.example", "authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=named).status_code == 200


def test_no_other_site_may_read(scripted, address):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{address}/v1/chat/completions", headers=preflight).status_code == 405
    response = httpx.get(f"{address}/v1/models", headers={"origin": "https://a.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "server" not in response.headers


def test_names_of_this_machine():
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"):
        assert is_this_machine(host), host
    for host in ("", "a.example", "localhost.a.example", "127.0.0.1.a.example", "192.168.0.1", "[::1", "0.0.0.0"):
        assert not is_this_machine(host), host


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and no API key is set. Set --api-key or"),
        (["--host", "::"], "lets other machines in"),
        (["--host", "0.0.0.0", "--api-key", ""], "must be printable ASCII"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid is not known here"),
        (["--max-tokens", "0"], "--max-tokens is 0. Set it to 1 or more"),
        (["--model", "no/such/directory"], "no/such/directory"),
    ],
)
def test_what_cannot_be_served(text_checkpoint, options, message, monkeypatch):
    monkeypatch.delenv("MOBILEMOE_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="^mobilemoe serve: ") as stop:
        main(["serve", "--model", str(text_checkpoint), "--port", "0", *options])
    assert message in str(stop.value)


def test_a_port_in_use():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="cannot be used: Address already in use. Set another port"):
            bind("127.0.0.1", taken.getsockname()[1])


@contextmanager
def serving(model: Path, directory: Path, *options: str):
    """The process and the address of `mobilemoe serve`, whose log is in the directory."""
    command = [sys.executable, "-m", "mobilemoe.cli", "serve", "--model", model, "--port", "0", *options]
    log = directory / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        until(lambda: process.poll() is not None or " at http" in log.read_text())
        assert process.poll() is None, log.read_text()
        yield process, re.search(r" at (http://\S+)/v1", log.read_text()).group(1)
    finally:
        process.kill()
        process.wait()


def greedy(model: LanguageModel, messages: list[dict], max_tokens: int) -> str:
    prompt = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model.reset()
    return model.decode(list(model.generate(prompt, max_tokens)))


@pytest.mark.parametrize(
    "directory",
    ["text_checkpoint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pte_directory", "kernel_pte"))],
)
def test_a_conversation_with_a_model(directory, request, tmp_path):
    """Its second turn runs what is new, and is what the model writes after all of the text."""
    directory = request.getfixturevalue(directory)
    model = load_language_model(directory)
    with serving(directory, tmp_path) as (process, address):
        client = client_of(address)
        ask = {"model": directory.name, "temperature": 0, "max_tokens": 6}
        messages = [{"role": "user", "content": "import os"}]
        first = client.chat.completions.create(**ask, messages=messages)
        assert first.choices[0].message.content == greedy(model, messages, 6)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "def"}]
        second = client.chat.completions.create(**ask, messages=messages)
        shown = [{"role": message["role"], "content": message["content"]} for message in messages]
        assert second.choices[0].message.content == greedy(model, shown, 6)
        # All of the first prompt, and as much of the answer as is encoded as it was written.
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens
        streamed = client.chat.completions.create(**ask, messages=messages, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == second.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    counts = f"{second.usage.prompt_tokens} prompt tokens ({cached} cached), first token after "
    assert any(counts in line for line in lines)


def test_structured_output(text_checkpoint):
    model = load_language_model(text_checkpoint)
    properties = {"name": {"enum": ["argparse", "os"]}, "lines": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "module", "schema": schema, "strict": True}}
    with listening(Server(model, "text", LIMITS)) as address:
        ask = {"model": "text", "messages": MESSAGES, "max_tokens": 60}
        client = client_of(address)
        for seed in range(5):
            answer = client.chat.completions.create(**ask, seed=seed, response_format=wanted).choices[0]
            assert answer.finish_reason == "stop"
            content = json.loads(answer.message.content)
            assert content.keys() == properties.keys() and content["name"] in ("argparse", "os")
            assert 0 <= content["lines"] <= 99
        # It ends where nothing may follow, also with the last token.
        exact = client.chat.completions.create(**ask, seed=4, response_format=wanted).usage.completion_tokens
        cut = ask | {"max_tokens": exact, "seed": 4, "response_format": wanted}
        assert client.chat.completions.create(**cut).choices[0].finish_reason == "stop"
        cut["max_tokens"] -= 1
        assert client.chat.completions.create(**cut).choices[0].finish_reason == "length"
        streamed = client.chat.completions.create(**ask, seed=4, response_format=wanted, stream=True)
        assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in streamed)) == content
        anything = client.chat.completions.create(**ask, seed=1, response_format={"type": "json_object"}).choices[0]
        assert anything.message.content.startswith("{")
        wanted["json_schema"]["schema"] = {"type": "no such type"}
        with pytest.raises(openai.BadRequestError, match="JSON schema cannot be followed") as refusal:
            client.chat.completions.create(**ask, response_format=wanted)
        assert refusal.value.param == "response_format"


def test_a_long_prompt_runs_in_parts(text_checkpoint, monkeypatch):
    model = load_language_model(text_checkpoint)
    prompt = model.encode("é" * 100)
    expected = model.decode(list(model.generate(prompt, 6)))
    model.reset()
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 32)
    ran, forward = [], model._forward
    monkeypatch.setattr(model, "_forward", lambda tokens, *rest: ran.append(len(tokens)) or forward(tokens, *rest))
    with listening(Server(model, "text", LIMITS)) as address:
        options = {"model": "text", "prompt": "é" * 100, "max_tokens": 6, "temperature": 0}
        answer = client_of(address).completions.create(**options)
    assert answer.choices[0].text == expected
    assert ran[:7] == [32] * 6 + [len(prompt) - 6 * 32] and sum(ran) == len(prompt) + 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server(text_checkpoint, tmp_path, number):
    with serving(text_checkpoint, tmp_path) as (process, address):
        ask = {"model": text_checkpoint.name, "messages": MESSAGES, "stream": True}
        stream = client_of(address).chat.completions.create(**ask)
        next(stream)
        process.send_signal(number)
        # It ends by itself within the grace period, or is told that it ends.
        try:
            assert list(stream)[-1].choices[0].finish_reason
        except openai.APIError as error:
            assert "shutting down" in str(error)
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(text_checkpoint, tmp_path):
    with serving(text_checkpoint, tmp_path) as (process, address):
        # A request that never comes to its end.
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
            connection.sendall(b"Content-Type: application/json\r\n\r\n")
            until(lambda: httpx.get(f"{address}/health").status_code == 200)
            process.send_signal(signal.SIGINT)
            until(lambda: process.poll() is not None or not can_connect(address))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


def can_connect(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.HTTPError:
        return False


def one_request(client: openai.OpenAI, name: str, kind: str, number: int) -> None:
    """Asks, and checks the answer, however wrong the question is."""
    address = str(client.base_url).removesuffix("/v1/")
    ask = {"model": name, "max_tokens": 6, "messages": [{"role": "user", "content": f"import {number}"}]}
    if kind == "chat":
        assert client.chat.completions.create(**ask).usage.completion_tokens <= 6
    elif kind == "completion":
        assert client.completions.create(model=name, prompt=f"def f{number}(", max_tokens=4).choices
    elif kind == "stream":
        assert list(client.chat.completions.create(**ask, stream=True))[-1].choices[0].finish_reason
    elif kind == "aborted stream":
        with client.chat.completions.create(**ask | {"max_tokens": 30}, stream=True) as stream:
            next(stream)
    elif kind == "aborted body":
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
            connection.sendall(b"Content-Type: application/json\r\n\r\n{")
    else:
        path = "/v1/chat/completions"
        request, expected = {
            "wrong JSON": ({"content": b'{"model": nope', "headers": JSON}, 400),
            "10 MB": ({"content": b" " * 10_000_000, "headers": JSON}, 413),
            "unknown model": ({"json": ask | {"model": "gpt-5"}}, 404),
            "wrong type": ({"json": ask | {"temperature": "hot"}}, 400),
            "too long": ({"json": ask | {"messages": [{"role": "user", "content": "a b " * 1000}]}}, 400),
            "no such path": ({"json": ask}, 404),
        }[kind]
        status, error = refused(address, path + "s" * (kind == "no such path"), **request)
        assert status == expected and error["message"]


KINDS = ["chat", "completion", "stream", "aborted stream", "aborted body", "wrong JSON", "10 MB", "unknown model"]
KINDS += ["wrong type", "too long", "no such path"]


def load(address: str, name: str, num_requests: int, num_clients: int, seed: int) -> Counter[str]:
    kinds = random.Random(seed).choices(KINDS, k=num_requests)
    clients = [client_of(address) for _ in range(num_clients)]

    def work(which: int) -> None:
        for number in range(which, num_requests, num_clients):
            one_request(clients[which], name, kinds[number], number)
        clients[which].close()

    with ThreadPoolExecutor(num_clients) as pool:
        for done in [pool.submit(work, which) for which in range(num_clients)]:
            done.result()
    return Counter(kinds)


def resources(process: subprocess.Popen) -> dict[str, int]:
    """Resident memory in MB, threads, open sockets."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s+(\d+)", status).group(1)) for name in ("VmRSS", "Threads"))
    links = []
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:
            # Closed meanwhile.
            pass
    return {"MB": memory // 1000, "threads": threads, "sockets": sum(link.startswith("socket:") for link in links)}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(
    ("directory", "num_requests", "num_clients"),
    [
        ("text_checkpoint", 60, 8),
        pytest.param("text_checkpoint", 1000, 16, marks=pytest.mark.slow),
        pytest.param("kernel_pte", 1000, 16, marks=pytest.mark.slow),
    ],
)
def test_load(directory, num_requests, num_clients, request, tmp_path):
    directory = request.getfixturevalue(directory)
    with serving(directory, tmp_path, "--max-waiting", "64") as (process, address):
        # What is allocated once.
        load(address, directory.name, num_requests // 2, num_clients, seed=0)
        idle = {"status": "ok", "requests": 0}
        until(lambda: httpx.get(f"{address}/health").json() == idle)
        before = resources(process)
        started = time.perf_counter()
        counts = load(address, directory.name, num_requests, num_clients, seed=1)
        seconds = time.perf_counter() - started
        until(lambda: httpx.get(f"{address}/health").json() == idle)
        until(lambda: resources(process)["sockets"] <= before["sockets"])
        after = resources(process)
        print(f"{num_requests} requests in {seconds:.1f} s: {dict(counts)}; before {before}, after {after}")
        assert after["threads"] == before["threads"]
        # A body of 10 MB that is kept, or the cache of one request, would show.
        assert after["MB"] < before["MB"] + 20
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
