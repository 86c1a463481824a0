"""A program on a phone or a board as a model: text becomes tokens here; they are computed, and cached, there."""

import secrets
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from ..artifacts import load_tokenizer
from ..generation import TextModel, check_sampling, common_length
from ..integrity import check_program
from .cores import fast_cores
from .device import Device, DeviceError
from .find import find_device
from .runner import (
    LOADER_PATH,
    START,
    Answered,
    Loaded,
    Token,
    bundle_files,
    check_program_directory,
    program_files,
    program_options,
    read_events,
)


Kind = TypeVar("Kind", Loaded, Token, Answered, Token | Answered)


class DeviceModel(TextModel):
    """
    Args:
        path (`str` or `Path`): directory with model.pte, of the default operator.
        name (`str`): `"adb"` or `"ssh:HOST"`.

    Raises:
        ValueError: when the program or the device cannot be used, before anything is copied.
        OSError: when the device is lost or full.
    """

    def __init__(self, path: str | Path, name: str):
        path = Path(path)
        check_program_directory(path)
        report = check_program(path)
        foreign = [operator for operator in report.operators if operator.startswith("llama::")]
        if foreign:
            raise ValueError(
                f"{path} needs {', '.join(foreign)}, which our runner lacks. Export it again with --moe-op mobilemoe."
            )
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"{path} has no tokenizer.json. Copy the tokenizer files of its checkpoint there.")
        self.tokenizer = load_tokenizer(path)
        self.max_seq_len, self.eos_ids = report.max_seq_len, report.eos_ids
        self._cached: list[int] = []
        device = find_device(name)
        device.check_runs_arm64()
        cores = device.cores()
        chosen = fast_cores(cores) if cores else []
        with ExitStack() as stack:
            stack.enter_context(device.lock())
            # What `bench --keep` left stays.
            copied = device.push(bundle_files() | program_files(path), LOADER_PATH)
            command = [*START, "--serve", *program_options(report, len(chosen), chosen)]
            self._device, self._name = device, path.resolve().name
            self._log = tempfile.TemporaryFile("w+", errors="replace")
            self._process = device.start(*command, directory=device.path(self._name), log=self._log)
            self._finish = weakref.finalize(self, finish, device, self._process, copied, stack.pop_all())
        self._num_rows = self._next(Loaded).num_rows

    def num_cached(self, tokens: list[int]) -> int:
        return min(common_length(tokens, self._cached), len(tokens) - 1)

    def generate(
        self,
        tokens: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        prompt_lookup: bool | None = None,
    ) -> Iterator[int]:
        check_sampling(max_new_tokens, temperature, top_p)
        if not 0 < len(tokens) <= self.max_seq_len:
            raise ValueError(
                f"The prompt has {len(tokens)} tokens, and the context is 1 to {self.max_seq_len}. Change the prompt, "
                "or use a model with a longer context."
            )
        if prompt_lookup and self._num_rows < 2:
            raise ValueError("prompt_lookup needs the logits of several positions. Export this program again.")
        seed = secrets.randbits(64) if seed is None else seed % 2**64
        lookup = int(prompt_lookup is None or prompt_lookup)
        words = [max_new_tokens, temperature, top_p, seed, lookup, len(self.eos_ids), *self.eos_ids, *tokens]
        text = list(tokens)
        self._send(f"answer {' '.join(map(str, words))}")
        # After an error, nothing is known to be cached.
        self._cached = []
        try:
            while (token := self._next_token(text)) is not None:
                yield token
        except GeneratorExit:
            # The answer is not wanted to its end.
            self._send("stop")
            while self._next_token(text) is not None:
                pass
            raise

    def _next_token(self, text: list[int]) -> int | None:
        """Of the answer, which is added to the text; `None` at its end."""
        event = self._next(Token, Answered)
        if isinstance(event, Token):
            text.append(event.id)
            return event.id
        self._cached = text[: event.cached]
        return None

    def _send(self, line: str) -> None:
        # Where the process has ended, the next line that is read says why.
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _next(self, *kinds: type[Kind]) -> Kind:
        """The next event of the runner, which has to be one of these."""
        for event in read_events(self._device, self._process.stdout, self._name):
            if isinstance(event, kinds):
                return event
            raise DeviceError(f"The runner on {self._device.name} sent '{event.event}' out of turn.")
        self._log.seek(0)
        said = subprocess.CompletedProcess("", self._process.wait(), "", self._log.read())
        raise self._device.failure("the conversation", said)


def finish(device: Device, process: subprocess.Popen, copied: list[str], lock: ExitStack) -> None:
    """Ends the runner, which its input does, and removes what was copied for it."""
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    with suppress(OSError):
        device.remove(copied)
    lock.close()
