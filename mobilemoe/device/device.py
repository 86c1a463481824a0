"""
A phone or a board: runs commands, copies changed files, reads hardware, clocks and memory. adb.py and ssh.py reach it.

Commands are lists of words, quoted for the device's shell. No shell runs on this machine.
"""

import os
import re
import secrets
import shlex
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, ClassVar

from tqdm import tqdm

from ..artifacts import file_sha256
from ..results import PhoneCondition, PhoneFingerprint
from .cores import Core


# A file beside ours.
KEPT = "kept"
CPU = "/sys/devices/system/cpu"
# Removes the lock of an owner that ended, takes it if it is free, and prints its owner. A symbolic link is made with
# what it holds in one step, and not where one is. Android lets its shell make them there (and no hard links).
LOCK = 'test "$(readlink "$1")" != "$3" || rm -f "$1"; mkdir -p "${1%/*}"; ln -s "$2" "$1"; readlink "$1"'


class DeviceLost(OSError):
    """The connection to the device was lost during an operation."""


class DeviceError(OSError):
    """A command failed on the device."""


class Device(ABC):
    """
    Args:
        name (`str`): of the device, in messages.
    """

    # Of our files on the device.
    directory: str
    # Owners of the locks that this process holds.
    locks: ClassVar[set[str]] = set()

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def command(self, line: str) -> list[str]:
        """The command of this machine that runs a line in the device's shell."""

    @abstractmethod
    def copy(self, path: Path, target: str) -> subprocess.CompletedProcess:
        """Copies a file to the device, in at most an hour."""

    @abstractmethod
    def fingerprint(self) -> PhoneFingerprint:
        """Model, SoC, maximum clocks, memory, system, and the current condition of the device."""

    @abstractmethod
    def condition(self) -> PhoneCondition:
        """Current battery level, temperatures and clocks."""

    @abstractmethod
    def is_connected(self) -> bool: ...

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def run(self, command: list[str], timeout: float, **options) -> subprocess.CompletedProcess:
        """
        Runs a command of this machine that waits for the device.

        Raises:
            DeviceLost: when that takes too long.
        """
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        try:
            return subprocess.run(command, timeout=timeout, **output, **options)
        except subprocess.TimeoutExpired as error:
            raise DeviceLost(f"{self.name} did not answer for {timeout:.0f} s. Check its cable and screen.") from error

    def lost(self, what: str) -> DeviceLost:
        return DeviceLost(f"{self.name} is gone during {what}. Connect it and run the same command again.")

    def failure(self, what: str, result: subprocess.CompletedProcess) -> OSError:
        if not self.is_connected():
            return self.lost(what)
        said = (result.stderr or result.stdout).strip()[-500:]
        if "No space left" in said:
            return DeviceError(f"The device is full during {what}: {said} Free space on it and run this again.")
        return DeviceError(f"{what} failed on {self.name} with status {result.returncode}: {said}")

    def shell(self, *words: str, check: bool = True, timeout: float = 120) -> str:
        """
        Runs a command on the device and returns its output.

        Raises:
            DeviceLost: when the device does not answer or is disconnected.
            DeviceError: when the command fails and `check` is set.
        """
        result = self.run(self.command(shlex.join(words)), timeout, stdin=subprocess.DEVNULL)
        if result.returncode and (check or not self.is_connected()):
            raise self.failure(f"`{words[0]}`", result)
        # adb ends with status 0, too, where the connection does.
        if not result.stdout and not self.is_connected():
            raise self.lost(f"`{words[0]}`")
        return result.stdout

    def start(self, *words: str, directory: str, log: IO[str], stdin: int = subprocess.PIPE) -> subprocess.Popen:
        """
        Starts a command in a directory of the device. Its errors go to `log`, a file: as a second pipe it could fill
        up and block while stdout is read.
        """
        return subprocess.Popen(
            self.command(f"cd {shlex.quote(directory)} && {shlex.join(words)}"),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            # Ctrl-C is for this program, which then ends the other.
            start_new_session=True,
        )

    def lines(self, *words: str, directory: str) -> Iterator[str]:
        """
        Runs a long command in a directory of the device and streams the lines of its output.

        Raises:
            DeviceLost, DeviceError: as [`shell`], when the command fails.
        """
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = self.start(*words, directory=directory, log=log, stdin=subprocess.DEVNULL)
            last = ""
            try:
                for line in process.stdout:
                    last = line.rstrip("\r\n")
                    yield last
                if process.wait():
                    log.seek(0)
                    result = subprocess.CompletedProcess(words, process.returncode, last, log.read())
                    raise self.failure(f"`{words[0]}`", result)
                if not self.is_connected():
                    raise self.lost(f"`{words[0]}`")
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                process.stdout.close()

    def check_runs_arm64(self) -> None:
        """
        Raises:
            ValueError: when its kernel does not run 64-bit Arm programs.
        """
        machine = self.shell("uname", "-m").strip()
        # A 64-bit kernel calls itself armv8l where the shell is a 32-bit program.
        if machine not in ("aarch64", "arm64", "armv8l"):
            bits = ", which is 32-bit" if machine.startswith("armv") else ""
            raise ValueError(
                f"{self.name} has the processor or kernel {machine}{bits}, and the runner is 64-bit Arm code. Use "
                "another device; `bench` also takes a runner that was built for this one, with --runner-binary."
            )

    def free_bytes(self, directory: str) -> int:
        rows = self.shell("df", "-k", directory).splitlines()
        # `df` may print the device name on a separate line.
        fields = " ".join(rows[1:]).split()
        if len(fields) < 4 or not fields[3].isdigit():
            raise DeviceError(f"`df` on {self.name} reports no free space of {directory}: {' '.join(rows)[:200]}")
        return 1024 * int(fields[3])

    def checksums(self, directory: str) -> dict[str, str]:
        """SHA-256 of all files below a directory, by relative path."""
        listing = self.shell(
            "find", directory, "-type", "f", "-exec", "sha256sum", "{}", "+", check=False, timeout=600
        )
        rows = (line.split(maxsplit=1) for line in listing.splitlines() if re.match(r"[0-9a-f]{64}\s", line))
        return {path.removeprefix(f"{directory}/"): digest for digest, path in rows}

    def push(self, files: dict[str, Path], start: str | None = None) -> list[str]:
        """
        Copies the files that the device does not have yet. A file has a temporary name until its copy is complete.

        Args:
            files (`dict[str, Path]`): local files by their path in `directory`, which is created if missing.
            start (`str`, *optional*): the one of them that is started there.

        Returns:
            `list[str]`: names of the copied files.

        Raises:
            ValueError: when the device has too little free space; nothing is copied then.
            DeviceLost, DeviceError: when a copy fails. Completed files stay, and the next call resumes after them.
        """
        directory = self.directory
        self.shell("mkdir", "-p", *sorted({str(Path(directory, name).parent) for name in files}))
        present = self.checksums(directory)
        missing = {name: path for name, path in files.items() if present.get(name) != file_sha256(path)}
        size, free = sum(path.stat().st_size for path in missing.values()), self.free_bytes(directory)
        if size > free:
            raise ValueError(
                f"The device has {free / 1e6:,.0f} MB free in {directory} and {size / 1e6:,.0f} MB are needed. "
                "Free space on it, or measure fewer models at once."
            )
        for name, path in tqdm(missing.items(), desc="push", leave=False, disable=len(missing) < 2):
            target = self.path(name)
            result = self.copy(path, f"{target}.partial")
            if result.returncode:
                error = self.failure(f"the copy of {name}", result)
                if not isinstance(error, DeviceLost):
                    self.shell("rm", "-f", f"{target}.partial", check=False)
                raise error
            self.shell("mv", f"{target}.partial", target)
        if start is not None:
            self.shell("chmod", "755", self.path(start))
        return list(missing)

    @contextmanager
    def lock(self) -> Generator[None]:
        """
        Keeps other commands from the files on the device, which each removes at its end.

        Raises:
            ValueError: when another command is running there. The lock of a process of this computer that ended is
                taken over.
        """
        path = f"{self.directory}.lock"
        host = re.sub(r"\s", "-", socket.gethostname())
        owner = f"{host} {os.getpid()} {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {secrets.token_hex(4)}"
        ended = ""
        while (found := self.shell("sh", "-c", LOCK, "sh", path, owner, ended).strip().splitlines()[-1]) != owner:
            if found == ended or not self.has_ended(found, host):
                who = re.match(r"(\S+) (\d+) (\S+)", found)
                by = f"process {who[2]} on {who[1]}, since {who[3]}" if who else found
                raise ValueError(
                    f"{self.name} is in use by {by}. Wait for its end, or remove {path} from the device if it has "
                    "ended."
                )
            ended = found
        self.locks.add(owner)
        try:
            yield
        finally:
            self.locks.remove(owner)
            with suppress(OSError):
                self.shell("rm", "-f", path)

    def has_ended(self, owner: str, host: str) -> bool:
        """Whether the owner of a lock is a process of this computer that ended, or this one, which lost the device."""
        match = re.match(rf"{re.escape(host)} (\d+) ", owner)
        if match is None or owner in self.locks:
            return False
        number = int(match[1])
        return number == os.getpid() or not is_running(number)

    def keep(self) -> None:
        """Marks our files as ones that later runs leave on the device."""
        self.shell("touch", self.path(KEPT))

    def remove(self, copied: Iterable[str]) -> None:
        """Removes our files; only the given ones where others are to be kept."""
        if KEPT in self.shell("ls", self.directory, check=False).split():
            self.shell("rm", "-f", *map(self.path, copied))
        else:
            self.shell("rm", "-rf", self.directory)

    def sysfs(self, pattern: str) -> str:
        """Lines `PATH:CONTENT` of the files that can be read and whose paths match."""
        return self.shell("sh", "-c", f"grep -s . {pattern} /dev/null || true")

    def of_cores(self, file: str) -> dict[int, int]:
        """A number of every core that is online, in a file of its directory in sysfs. Empty if there is none."""
        rows = self.sysfs(f"{CPU}/cpu[0-9]*/{file}")
        return {int(core): int(value) for core, value in re.findall(r"/cpu(\d+)/\S+?:(\d+)$", rows, re.MULTILINE)}

    def cores(self) -> list[Core]:
        clocks, capacities = self.of_cores("cpufreq/cpuinfo_max_freq"), self.of_cores("cpu_capacity")
        return [Core(number, clocks[number], capacities.get(number)) for number in sorted(clocks)]

    def max_mhz(self) -> list[int]:
        return [core.max_khz // 1000 for core in self.cores()]

    def mhz(self) -> list[int]:
        clocks = self.of_cores("cpufreq/scaling_cur_freq")
        return [clocks[number] // 1000 for number in sorted(clocks)]

    def memory_bytes(self) -> int | None:
        memory = re.search(r"MemTotal:\s+(\d+)", self.shell("cat", "/proc/meminfo"))
        return 1024 * int(memory[1]) if memory else None


def is_running(number: int) -> bool:
    """Whether there is a process with this number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Of another user.
        return True
    return True
