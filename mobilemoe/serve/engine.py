"""One model, one sequence at a time: requests take their turn in order, and each gets its text as it is written."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from ..generation import LanguageModel, Timing, until
from .requests import ApiError


logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# Of a prompt, run in one call.
PREFILL_TOKENS = 256


class Engine:
    """
    A model and the queue in front of it.

    Args:
        model (`LanguageModel`): runs in one thread of its own.
        max_waiting (`int`): requests that may wait for it; one more is refused with status 429.
    """

    def __init__(self, model: LanguageModel, max_waiting: int):
        self.model, self.max_waiting = model, max_waiting
        # The running one, those that wait, and those whose prompt is being encoded.
        self.num_requests = 0
        self._closing_at = math.inf
        self._model_thread = ThreadPoolExecutor(1, "model")
        # A prompt that is refused does not wait for the model.
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")

    @contextmanager
    def place(self) -> Iterator[None]:
        """
        A place in the queue, until a [`Generation`] takes it.

        Raises:
            ApiError: when all are taken, or the server is shutting down.
        """
        if self._closing_at < math.inf:
            raise shutting_down()
        if self.num_requests > self.max_waiting:
            message = f"The model is busy and {self.max_waiting} requests wait for it. Try again later."
            raise ApiError(429, message, "queue_full")
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    async def encode(self, encode: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, encode)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        return self._model_thread.submit(work)

    def check(self, is_running: bool) -> None:
        """Raises `ApiError` when the server shuts down; what runs already has until the end of the grace period."""
        if self._closing_at < math.inf and not (is_running and time.monotonic() < self._closing_at):
            raise shutting_down()

    def close(self, grace_seconds: float) -> None:
        """Ends what waits now, and what runs after so many seconds. May be called in a signal handler."""
        self._closing_at = min(self._closing_at, time.monotonic() + grace_seconds)


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down. Try again later.", "shutting_down")


class Generation:
    """
    The answer to one request.

    Args:
        engine (`Engine`): where it queues, from now on.
        prompt (`list[int]`): token ids.
        max_new_tokens (`int`): the maximum number of new tokens.
        stop (`list[str]`): the text ends before the first of these.
        hold (`list[str]`): the text from the first of these on is not among the `pieces`. The end of `text` has it.
        options: of [`LanguageModel.generate`].
    """

    def __init__(
        self, engine: Engine, prompt: list[int], max_new_tokens: int, stop: list[str], hold: list[str], **options: Any
    ):
        self.engine, self.prompt, self.max_new_tokens = engine, prompt, max_new_tokens
        # The whole of it, once the `pieces` have ended.
        self.text = ""
        self.timing = Timing(len(prompt), 0, 0.0)
        self._reached_stop = False
        self._stop, self._hold, self._options = stop, hold, options
        self._stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        engine.num_requests += 1
        self._future = engine.submit(self._run)
        self._future.add_done_callback(lambda future: self._call(self._end))

    def stop(self) -> None:
        """Ends it before its next token, or its next `PREFILL_TOKENS` of the prompt."""
        self._stopped.set()
        self._future.cancel()

    def _call(self, function: Callable, *arguments: object) -> None:
        # It is closed after a second Ctrl-C.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _end(self) -> None:
        # Its place is free, also while a slow client reads.
        self.engine.num_requests -= 1
        self._pieces.put_nowait(None)

    def _run(self) -> None:
        self.engine.check(is_running=False)
        model = self.engine.model
        self.timing = Timing(len(self.prompt), model.num_cached(self.prompt), time.perf_counter())
        # In parts, for a client may go away, and the other threads of Python wait while a program runs.
        for end in range(self.timing.cached_tokens + PREFILL_TOKENS, len(self.prompt), PREFILL_TOKENS):
            if self._is_stopped():
                return
            model.sequence_logits(self.prompt[:end])
        texts = self._texts()
        for piece in until(texts, self._hold):
            if piece:
                self._call(self._pieces.put_nowait, piece)
        # What is held.
        for _ in texts:
            pass

    def _is_stopped(self) -> bool:
        self.engine.check(is_running=True)
        return self._stopped.is_set()

    def _texts(self) -> Iterator[str]:
        self._reached_stop = True
        for piece in until(self._decoded(), self._stop):
            self.text += piece
            yield piece

    def _decoded(self) -> Iterator[str]:
        yield from self.engine.model.stream(self._tokens())
        # Read to its end: no stop sequence was found.
        self._reached_stop = False

    def _tokens(self) -> Iterator[int]:
        tokens = self.engine.model.generate(self.prompt, self.max_new_tokens, **self._options)
        while not self._is_stopped() and (token := next(tokens, None)) is not None:
            self.timing.times.append(time.perf_counter())
            yield token

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end by itself, not by the limit of its length."""
        grammar = self._options["grammar"]
        is_complete = grammar is not None and grammar.is_complete
        return self._reached_stop or is_complete or len(self.timing.times) < self.max_new_tokens

    async def pieces(self) -> AsyncIterator[str]:
        """
        The text as it comes. May be read once.

        Raises:
            ApiError: when the server shuts down; and whatever the model raises.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if not self._future.cancelled():
            self._future.result()

    def log(self) -> None:
        if self.timing.tokens_per_second is not None:
            logger.info(str(self.timing))


@asynccontextmanager
async def stopped_by_disconnect(generation: Generation, receive: Callable) -> AsyncIterator[None]:
    """Stops a generation when its client goes away, and in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.stop()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.stop()
