"""The routes, and what they answer. Nothing of a request reaches the file system."""

import asyncio
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..generation import LanguageModel
from ..grammar import Grammar
from ..tools import CALL_START, ToolCall, parse_tool_calls
from .engine import Engine, Generation, stopped_by_disconnect
from .requests import ApiError, ChatRequest, CompletionRequest, Kind, parse


# For the whole of a request's body.
BODY_SECONDS = 30


@dataclass(frozen=True)
class Limits:
    """
    What one request may ask for.

    Args:
        prompt_tokens (`int`): longest prompt.
        new_tokens (`int`): most new tokens.
        body_bytes (`int`): longest body.
        waiting (`int`): most requests that wait for the model.
    """

    prompt_tokens: int
    new_tokens: int
    body_bytes: int
    waiting: int


class Server:
    """
    The application for one model.

    Args:
        model (`LanguageModel`): the model.
        name (`str`): its name in requests.
        limits (`Limits`): of a request.
        api_key (`str`, *optional*): what requests must carry. Without one, only requests to this machine by a name of
            its own are answered, so that no page in a browser can read from the server under another name.
    """

    def __init__(self, model: LanguageModel, name: str, limits: Limits, api_key: str | None = None):
        self.model, self.name, self.limits, self.api_key = model, name, limits, api_key
        self.engine = Engine(model, limits.waiting)
        self.created = int(time.time())
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/health", self.health),
        ]
        handlers = {ApiError: refuse, HTTPException: refuse_http, ClientDisconnect: drop, Exception: fail}
        self.app = Starlette(routes=routes, exception_handlers=handlers)
        self.app.add_middleware(partial(Guard, api_key=api_key))

    async def health(self, request: HttpRequest) -> JSONResponse:
        return JSONResponse({"status": "ok", "requests": self.engine.num_requests})

    def description(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mobilemoe"}

    async def list_models(self, request: HttpRequest) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self.description()]})

    async def show_model(self, request: HttpRequest) -> JSONResponse:
        self.check_name(request.path_params["name"])
        return JSONResponse(self.description())

    def check_name(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name[:80]!r}. This server has {self.name!r}."
            raise ApiError(404, message, "model_not_found", "model")

    async def chat(self, http: HttpRequest) -> ASGIApp:
        request = await self.read(ChatRequest, http)
        answer = Answer("chat", self.name, request.uses_tools)
        return partial(self.respond, request, partial(self.encode_messages, request), answer)

    async def complete(self, http: HttpRequest) -> ASGIApp:
        request = await self.read(CompletionRequest, http)
        return partial(self.respond, request, partial(self.encode_prompt, request), Answer("text", self.name))

    async def read(self, kind: type[Kind], http: HttpRequest) -> Kind:
        request = parse(kind, await read_body(http, self.limits.body_bytes))
        self.check_name(request.model)
        return request

    def encode_messages(self, request: ChatRequest) -> tuple[list[int], Grammar | None]:
        messages = [message.for_template() for message in request.messages]
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or [] if request.uses_tools]
        try:
            prompt = self.model.encode_messages(messages, tools or None)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        schema = request.response_format and request.response_format.allowed
        try:
            return prompt, None if schema is None else self.model.grammars.json_schema(schema)
        except ValueError as error:
            raise ApiError(400, str(error), param="response_format") from error

    def encode_prompt(self, request: CompletionRequest) -> tuple[list[int], None]:
        return self.model.encode(request.prompt[0]), None

    def new_tokens(self, request: ChatRequest | CompletionRequest, prompt: list[int]) -> int:
        """
        Raises:
            ApiError: when the prompt or the answer would be too long.
        """
        longest, most = self.limits.prompt_tokens, self.limits.new_tokens
        if len(prompt) > longest:
            message = f"The prompt has {len(prompt)} tokens, and this server takes {longest}. Shorten it."
            raise ApiError(400, message, "context_length_exceeded")
        room = self.model.max_seq_len - len(prompt)
        wanted = request.new_tokens
        if wanted is None:
            return max(1, min(most, room))
        if wanted > most:
            raise ApiError(400, f"max_tokens is {wanted}, and this server writes at most {most}.", param="max_tokens")
        if wanted > max(1, room):
            message = f"{len(prompt)} tokens of the prompt and max_tokens={wanted} exceed the context of "
            message += f"{self.model.max_seq_len} tokens. Set max_tokens to {room} or less, or shorten the prompt."
            raise ApiError(400, message, "context_length_exceeded", "max_tokens")
        return wanted

    async def respond(
        self,
        request: ChatRequest | CompletionRequest,
        encode: Callable[[], tuple[list[int], Grammar | None]],
        answer: "Answer",
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        with self.engine.place():
            prompt, grammar = await self.engine.encode(encode)
            generation = Generation(
                self.engine,
                prompt,
                self.new_tokens(request, prompt),
                request.stop or [],
                answer.hold,
                # OpenAI's defaults.
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=request.seed,
                grammar=grammar,
            )
        async with stopped_by_disconnect(generation, receive):
            if request.stream:
                with_usage = request.stream_options is not None and request.stream_options.include_usage
                await send_events(answer.chunks(generation, with_usage), send)
            else:
                await JSONResponse(await answer.whole(generation))(scope, receive, send)
        generation.log()


class Answer:
    """
    The JSON of an answer, whole or in chunks.

    Args:
        kind (`str`): "chat" or "text".
        model (`str`): name of the model.
        uses_tools (`bool`, defaults to `False`): whether the text may hold calls.
    """

    def __init__(self, kind: str, model: str, uses_tools: bool = False):
        self.is_chat, self.uses_tools = kind == "chat", uses_tools
        # What follows the first tag may be calls, which are known at the end.
        self.hold = [f"\n{CALL_START}", CALL_START] if uses_tools else []
        prefix, name = ("chatcmpl-", "chat.completion") if self.is_chat else ("cmpl-", "text_completion")
        self.name = name
        self.head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    async def whole(self, generation: Generation) -> dict[str, Any]:
        async for _ in generation.pieces():
            pass
        text = generation.text
        reason = finish_reason(generation)
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        if self.is_chat:
            content, calls = parse_tool_calls(text) if self.uses_tools else (text, [])
            choice["message"] = {"role": "assistant", "content": content}
            if calls:
                reason = "tool_calls"
                choice["message"] |= {"content": content or None, "tool_calls": [call_json(call) for call in calls]}
        else:
            choice["text"] = text
        choice["finish_reason"] = reason
        return self.head | {"object": self.name, "choices": [choice], "usage": usage(generation)}

    async def chunks(self, generation: Generation, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The first one comes with the first text, so that what fails before has a status of its own."""
        head = self.head | {"object": f"{self.name}.chunk" if self.is_chat else self.name}
        head |= {"usage": None} if with_usage else {}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            return head | {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}

        is_first, num_sent = self.is_chat, 0
        async for piece in generation.pieces():
            if is_first:
                yield chunk({"role": "assistant", "content": ""})
                is_first = False
            yield chunk({"content": piece})
            num_sent += len(piece)
        if is_first:
            yield chunk({"role": "assistant", "content": ""})
        content, calls = parse_tool_calls(generation.text[num_sent:])
        if content:
            yield chunk({"content": content})
        for index, call in enumerate(calls):
            yield chunk({"tool_calls": [{"index": index} | call_json(call)]})
        yield chunk({}, "tool_calls" if calls else finish_reason(generation))
        if with_usage:
            yield head | {"choices": [], "usage": usage(generation)}


def call_json(call: ToolCall) -> dict[str, Any]:
    # In ASCII: the model may have written half of a surrogate pair.
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def finish_reason(generation: Generation) -> str:
    return "stop" if generation.is_finished else "length"


def usage(generation: Generation) -> dict[str, Any]:
    timing = generation.timing
    prompt, new = timing.prompt_tokens, len(timing.times)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": timing.cached_tokens}}


async def send_events(events: AsyncIterator[dict[str, Any]], send: Send) -> None:
    """Server-sent events. An `ApiError` after the first one is an event, too."""
    is_started = False

    async def send_data(data: str) -> None:
        nonlocal is_started
        if not is_started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            is_started = True
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    try:
        async for event in events:
            await send_data(json.dumps(event, ensure_ascii=False))
        await send_data("[DONE]")
    except ApiError as error:
        if not is_started:
            raise
        await send_data(json.dumps(error.body))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read_body(http: HttpRequest, limit: int) -> bytes:
    """
    Raises:
        ApiError: when the body is not JSON by its type, too long, or takes too long.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site can have a browser send anything else.
        raise ApiError(415, "The body must be JSON. Set the header Content-Type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > limit:
                    message = (
                        f"The body is longer than {limit} bytes. Send less, or start the server with a higher limit."
                    )
                    raise ApiError(413, message, "body_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds. Send it again.") from error
    return bytes(body)


class Guard:
    """Middleware that lets a request pass with the key, or, without a key, under a name of this machine."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.refusal(Headers(scope=scope)) if scope["type"] == "http" and scope["path"] != "/health" else None
        if error is not None:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            # By the end of the process. It would be logged with a traceback.
            pass

    def refusal(self, headers: Headers) -> ApiError | None:
        if self.api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Takes as long for a key that is nearly right.
            if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                return None
            return ApiError(401, "Wrong API key. Set the header Authorization: Bearer KEY.", "invalid_api_key")
        # Another name that leads here is of a page that wants to read from this server in its reader's browser.
        if is_this_machine(headers.get("host", "")):
            return None
        return ApiError(403, "The Host header names another machine. Use http://127.0.0.1, or set an API key.")


def is_this_machine(host: str) -> bool:
    """Of a Host header, without a look-up of the name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def refuse(http: HttpRequest, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def refuse_http(http: HttpRequest, error: HTTPException) -> JSONResponse:
    """Of paths and methods that there are not."""
    message = f"{http.method} of this path is not possible: {error.detail}. See /v1/models, /v1/chat/completions, "
    body = ApiError(error.status_code, message + "/v1/completions, /health.").body
    return JSONResponse(body, error.status_code, error.headers)


async def drop(http: HttpRequest, error: ClientDisconnect) -> Response:
    # Nobody reads it.
    return Response()


async def fail(http: HttpRequest, error: Exception) -> JSONResponse:
    # Its traceback is logged, and the connection closed.
    error_body = ApiError(500, "The server failed. Its log says why.").body
    return JSONResponse(error_body, 500, {"connection": "close"})
