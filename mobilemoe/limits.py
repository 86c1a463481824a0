"""Bounds what a chat template may use: it comes with a model, and its sandbox bounds neither time nor memory."""

import ctypes
import threading
from collections.abc import Generator
from contextlib import contextmanager


try:
    import resource
except ImportError:
    # Windows: time is bounded, memory is not.
    resource = None

# A conversation of the whole context renders in milliseconds, in some MB.
SECONDS, MEMORY_BYTES = 10.0, 2**30
# Memory is a limit of the process: one block at a time sets and resets it.
_memory = threading.Lock()


class TimeOver(BaseException):
    """Not an `Exception`, so that nothing in the block handles it."""


@contextmanager
def limited(what: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Generator[None]:
    """
    Ends a block of Python code that takes too long or too much memory.

    Args:
        what (`str`): names the block in the error.
        seconds (`float`): of wall time. One call into C, such as a large copy, is not interrupted.
        memory_bytes (`int`): more than at the beginning, of the whole process.

    Raises:
        ValueError: when the block was ended.
    """
    thread, lock, is_over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeOver))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    try:
        with _memory, _memory_limit(memory_bytes):
            timer.start()
            try:
                yield
            finally:
                with lock:
                    is_over = True
                # What was raised and has not arrived.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except TimeOver as error:
        raise ValueError(f"{what} takes more than {seconds:g} seconds and was stopped. Use another one.") from error
    except MemoryError as error:
        raise ValueError(
            f"{what} takes more than {memory_bytes / 1e9:.1f} GB of memory and was stopped. Use another one."
        ) from error
    finally:
        timer.cancel()


@contextmanager
def _memory_limit(memory_bytes: int) -> Generator[None]:
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0])
    except OSError:
        # Not Linux, where this limit has no effect either.
        size = None
    if resource is None or size is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = size * resource.getpagesize() + memory_bytes
    limits = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
