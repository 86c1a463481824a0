"""
Controls an Android device through `adb`: runs commands, copies changed files, reads hardware and temperatures.

Commands are lists of words, quoted for the device's shell. No shell runs on this machine.
"""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from ..artifacts import file_sha256
from ..results import PhoneCondition, PhoneFingerprint


class DeviceLost(OSError):
    """The connection to the device was lost during an operation."""


class DeviceError(OSError):
    """A command failed on the device."""


def find_device(serial: str | None = None) -> "Device":
    """
    The connected device, or the one that `serial` names.

    Raises:
        ValueError: when `adb` is missing, or no device, several devices or one that is not ready is connected.
    """
    if shutil.which("adb") is None:
        raise ValueError(
            "adb is not on the PATH, and it is the only way to reach a phone. Install Android's platform tools "
            "(Debian: apt install adb)."
        )
    listed = subprocess.run(["adb", "devices"], capture_output=True, text=True)
    if listed.returncode:
        raise ValueError(f"`adb devices` failed: {listed.stderr.strip()} Run `adb kill-server` and try again.")
    rows = [line.split("\t") for line in listed.stdout.splitlines() if "\t" in line]
    devices = {name: state.strip() for name, state in rows}
    if serial is None:
        if not devices:
            raise ValueError(
                "No device is connected. Enable USB debugging in the phone's developer options, connect it, and check "
                "`adb devices`. Over the network, run `adb connect ADDRESS` first."
            )
        if len(devices) > 1:
            raise ValueError(f"{len(devices)} devices are connected: {', '.join(devices)}. Name one with --serial.")
        (serial,) = devices
    if serial not in devices:
        raise ValueError(
            f"serial={serial} is not connected; connected are: {', '.join(devices) or 'none'}. Name one of these."
        )
    remedies = {
        "unauthorized": "The phone has not authorised this computer. Unlock it and accept the prompt on its screen",
        "offline": "The phone does not respond. Reconnect it, or run `adb reconnect`",
        "no permissions": "This user may not open the USB device. Add the udev rules of Android's documentation",
    }
    state = devices[serial]
    if state != "device":
        remedy = next((text for key, text in remedies.items() if state.startswith(key)), "Reconnect it")
        raise ValueError(f"{serial} is {state.split(';')[0]}. {remedy}, then run this again.")
    return Device(serial)


class Device:
    """
    A connected Android device.

    Args:
        serial (`str`): its serial number, as listed by `adb devices`.
    """

    def __init__(self, serial: str):
        self.serial = serial

    def _adb(self, *arguments: str, timeout: float | None) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                ["adb", "-s", self.serial, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceLost(
                f"{self.serial} did not answer for {timeout:.0f} s. Check its cable and screen."
            ) from error

    def is_connected(self) -> bool:
        with suppress(DeviceLost):
            return self._adb("get-state", timeout=20).stdout.strip() == "device"
        return False

    def _failed(self, what: str, result: subprocess.CompletedProcess) -> OSError:
        if not self.is_connected():
            return DeviceLost(f"{self.serial} is gone during {what}. Connect it and run the same command again.")
        said = (result.stderr or result.stdout).strip()[-500:]
        if "No space left" in said:
            return DeviceError(f"The device is full during {what}: {said} Free space on it and run this again.")
        return DeviceError(f"{what} failed on {self.serial} with status {result.returncode}: {said}")

    def shell(self, *words: str, check: bool = True, timeout: float | None = 120) -> str:
        """
        Runs a command on the device and returns its output.

        Raises:
            DeviceLost: when the device does not answer or is disconnected.
            DeviceError: when the command fails and `check` is set.
        """
        result = self._adb("shell", shlex.join(words), timeout=timeout)
        if result.returncode and (check or not self.is_connected()):
            raise self._failed(f"`{words[0]}`", result)
        return result.stdout

    def lines(self, *words: str, directory: str) -> Iterator[str]:
        """
        Runs a long command in a directory of the device and streams the lines of its output.

        Raises:
            DeviceLost, DeviceError: as [`shell`], when the command fails.
        """
        command = f"cd {shlex.quote(directory)} && {shlex.join(words)}"
        # stderr goes to a file: as a second pipe it could fill up and block while stdout is read.
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                ["adb", "-s", self.serial, "shell", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
            )
            last = ""
            try:
                for line in process.stdout:
                    last = line.rstrip("\r\n")
                    yield last
                if process.wait():
                    log.seek(0)
                    result = subprocess.CompletedProcess(words, process.returncode, last, log.read())
                    raise self._failed(f"`{words[0]}`", result)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                process.stdout.close()

    def free_bytes(self, directory: str) -> int:
        rows = self.shell("df", "-k", directory).splitlines()
        # `df` may print the device name on a separate line.
        fields = " ".join(rows[1:]).split()
        return 1024 * int(fields[3])

    def checksums(self, directory: str) -> dict[str, str]:
        """SHA-256 of all files below a directory, by relative path."""
        listing = self.shell(
            "find", directory, "-type", "f", "-exec", "sha256sum", "{}", "+", check=False, timeout=600
        )
        rows = (line.split(maxsplit=1) for line in listing.splitlines() if re.match(r"[0-9a-f]{64}\s", line))
        return {path.removeprefix(f"{directory}/"): digest for digest, path in rows}

    def push(self, files: dict[str, Path], directory: str) -> list[str]:
        """
        Copies the files that the device does not have yet. A file has a temporary name until its copy is complete.

        Args:
            files (`dict[str, Path]`): local files by their path in `directory`.
            directory (`str`): directory on the device, created if missing.

        Returns:
            `list[str]`: names of the copied files.

        Raises:
            ValueError: when the device has too little free space; nothing is copied then.
            DeviceLost, DeviceError: when a copy fails. Completed files stay, and the next call resumes after them.
        """
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
            target = f"{directory}/{name}"
            result = self._adb("push", str(path), f"{target}.partial", timeout=3600)
            if result.returncode:
                error = self._failed(f"the copy of {name}", result)
                if not isinstance(error, DeviceLost):
                    self.shell("rm", "-f", f"{target}.partial", check=False)
                raise error
            self.shell("mv", f"{target}.partial", target)
        return list(missing)

    def properties(self) -> dict[str, str]:
        return dict(re.findall(r"^\[(.+?)\]: \[(.*)\]", self.shell("getprop"), re.MULTILINE))

    def fingerprint(self) -> PhoneFingerprint:
        """Model, SoC, maximum clocks, memory, Android version, and the current condition of the device."""
        properties = self.properties()
        clocks = self.shell("sh", "-c", "cat /sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq", check=False)
        memory = re.search(r"MemTotal:\s+(\d+)", self.shell("cat", "/proc/meminfo"))
        soc = " ".join(properties.get(f"ro.soc.{name}", "") for name in ("manufacturer", "model")).strip()
        return PhoneFingerprint(
            model=" ".join(properties.get(f"ro.product.{name}", "") for name in ("manufacturer", "model")).strip(),
            soc=soc or properties.get("ro.board.platform", "unknown"),
            abi=properties.get("ro.product.cpu.abi"),
            max_mhz=[int(clock) // 1000 for clock in clocks.split() if clock.isdigit()],
            memory_bytes=1024 * int(memory[1]) if memory else None,
            android=properties.get("ro.build.version.release"),
            build=properties.get("ro.build.fingerprint"),
            **self.condition().model_dump(),
        )

    def condition(self) -> PhoneCondition:
        """Current battery level, temperatures and clocks."""
        battery = parse_battery(self.shell("dumpsys", "battery", check=False))
        thermal = re.search(r"Thermal Status: (\d+)", self.shell("dumpsys", "thermalservice", check=False))
        clocks = self.shell("sh", "-c", "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq", check=False)
        return PhoneCondition(
            **battery,
            thermal_status=int(thermal[1]) if thermal else None,
            mhz=[int(clock) // 1000 for clock in clocks.split() if clock.isdigit()],
        )


def parse_battery(text: str) -> dict:
    """Parses `dumpsys battery`, which prints tenths of a degree. Missing values are `None`."""
    level = re.search(r"^\s*level: (\d+)", text, re.MULTILINE)
    temperature = re.search(r"^\s*temperature: (-?\d+)", text, re.MULTILINE)
    return {
        "battery_percent": int(level[1]) if level else None,
        "battery_celsius": int(temperature[1]) / 10 if temperature else None,
    }
