"""Runs cases in forked children: heavy modules are imported once, every child has limits, and its end is classed."""

import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) for name in ("mobilemoe", "modeling_mobilemoe", "recipes"))
# Limits of a child. Address space beyond what the parent has mapped.
MEMORY_BYTES, CPU_SECONDS, WALL_SECONDS = 3 * 10**9, 20, 90

# How a case ends:
#   fine       it worked, and may
#   clear      our error: what was wrong, and what to do
#   upstream   refused by the library that read it, with its message
#   traceback  an exception that the command does not turn into a message
#   silent     it worked, and must not have: the result is wrong
#   crash      killed by a signal
#   hang       not finished within the limits
OUTCOMES = ("fine", "clear", "upstream", "traceback", "silent", "crash", "hang")


class WrongResult(Exception):
    """A case found a result that is wrong, and no error."""


@dataclass(frozen=True)
class Case:
    """
    Args:
        family (`str`): what is damaged.
        damage (`str`): how, in words that reproduce it.
        run (`Callable`): runs it in the child, in a directory of its own.
        is_wrong (`bool`): whether it has to fail.
    """

    family: str
    damage: str
    run: Callable[[], object]
    is_wrong: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a case ended, with the error and the place that raised it."""

    kind: str
    message: str = ""
    place: str = ""


def run_case(case: Case, directory: Path) -> Outcome:
    """In a forked child, in this directory."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.close(read_end)
            os.setpgid(0, 0)
            os.chdir(directory)
            _run_in_child(case, write_end, errors.fileno())
        os.close(write_end)
        reported, status = _wait(child, read_end)
        if status is None:
            return Outcome("hang", f"no end within {WALL_SECONDS} s")
        if reported:
            return Outcome(**json.loads(reported))
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return Outcome("hang", f"more than {CPU_SECONDS} s of processor time")
        errors.seek(0)
        said = errors.read()[-500:].decode(errors="replace")
        end = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit status {status >> 8}"
        return Outcome("crash", f"{end}: {said.strip()}")


def _wait(child: int, read_end: int) -> tuple[bytes, int | None]:
    """What the child reported, and its status, `None` when it had to be killed. Its own children end with it."""
    reported, deadline, status = b"", time.monotonic() + WALL_SECONDS, None
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([pipe], [], [], left)
            part = pipe.read(1 << 16) if ready else b""
            if not part:
                break
            reported += part
    # It may have closed its end and hang on.
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        status = None
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
    return reported, status


def _run_in_child(case: Case, write_end: int, errors: int) -> None:
    """Never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcome = judge(case)
    os.write(write_end, json.dumps(outcome.__dict__).encode())
    os._exit(0)


def judge(case: Case) -> Outcome:
    """Runs a case in this process."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            case.run()
    except WrongResult as error:
        return Outcome("silent", str(error))
    except SystemExit as error:
        if error.code in (None, 0):
            return _ended_well(case)
        # What a command turned into its message.
        cause = error.__context__
        if cause is None:
            return Outcome("clear", str(error.code))
        return _refused(cause, str(error.code))
    except (ValueError, OSError) as error:
        return _refused(error, str(error))
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}"[:500], place_of(error.__traceback__))
    return _ended_well(case)


def _ended_well(case: Case) -> Outcome:
    return Outcome("silent", "no error") if case.is_wrong else Outcome("fine")


def _refused(error: BaseException, message: str) -> Outcome:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    kind = "clear" if raised_in.startswith(OURS) or "argparse" in raised_in else "upstream"
    return Outcome(kind, message[:500], place_of(error.__traceback__))


def place_of(trace: TracebackType | None) -> str:
    """The last place in our code."""
    frames = traceback.extract_tb(trace)
    ours = [frame for frame in frames if frame.filename.startswith(OURS)] or frames
    return f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno}" if ours else ""


def warm_up() -> None:
    """Imports what the cases need. No thread may be started: a child has only the one that forked it."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "examples")]
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
