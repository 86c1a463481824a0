"""An Android device through `adb`."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from ..results import PhoneCondition, PhoneFingerprint
from .device import Device, DeviceLost


def find_adb_device(serial: str | None = None) -> "AdbDevice":
    """
    The connected device, or the one that `serial` or the variable ANDROID_SERIAL names.

    Raises:
        ValueError: when `adb` is missing, or no device, several devices or one that is not ready is connected.
    """
    if shutil.which("adb") is None:
        raise ValueError(
            "adb is not on the PATH, and it is the only way to reach a phone. Install Android's platform tools "
            "(Debian: apt install adb)."
        )
    listed = subprocess.run(["adb", "devices"], capture_output=True, text=True, errors="replace")
    if listed.returncode:
        raise ValueError(f"`adb devices` failed: {listed.stderr.strip()} Run `adb kill-server` and try again.")
    rows = [line.split("\t") for line in listed.stdout.splitlines() if "\t" in line]
    devices = {name: state.strip() for name, state in rows}
    serial = serial or os.environ.get("ANDROID_SERIAL")
    if serial is None:
        if not devices:
            raise ValueError(
                "No device is connected. Enable USB debugging in the phone's developer options, connect it, and check "
                "`adb devices`. Over the network, run `adb connect ADDRESS` first."
            )
        if len(devices) > 1:
            raise ValueError(
                f"{len(devices)} devices are connected: {', '.join(devices)}. Name one with --serial, or with the "
                "variable ANDROID_SERIAL."
            )
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
    return AdbDevice(serial)


class AdbDevice(Device):
    """
    A connected Android device.

    Args:
        name (`str`): its serial number, as listed by `adb devices`.
    """

    # The only place where the user of `adb shell` may run programs.
    directory = "/data/local/tmp/mobilemoe"

    def command(self, line: str) -> list[str]:
        return ["adb", "-s", self.name, "shell", line]

    def copy(self, path: Path, target: str) -> subprocess.CompletedProcess:
        return self.run(["adb", "-s", self.name, "push", str(path), target], 3600)

    def is_connected(self) -> bool:
        with suppress(DeviceLost):
            return self.run(["adb", "-s", self.name, "get-state"], 20).stdout.strip() == "device"
        return False

    def properties(self) -> dict[str, str]:
        return dict(re.findall(r"^\[(.+?)\]: \[(.*)\]", self.shell("getprop"), re.MULTILINE))

    def fingerprint(self) -> PhoneFingerprint:
        properties = self.properties()
        soc = " ".join(properties.get(f"ro.soc.{name}", "") for name in ("manufacturer", "model")).strip()
        return PhoneFingerprint(
            model=" ".join(properties.get(f"ro.product.{name}", "") for name in ("manufacturer", "model")).strip(),
            soc=soc or properties.get("ro.board.platform", "unknown"),
            abi=properties.get("ro.product.cpu.abi"),
            max_mhz=self.max_mhz(),
            memory_bytes=self.memory_bytes(),
            android=properties.get("ro.build.version.release"),
            build=properties.get("ro.build.fingerprint"),
            **self.condition().model_dump(),
        )

    def condition(self) -> PhoneCondition:
        battery = parse_battery(self.shell("dumpsys", "battery", check=False))
        thermal = re.search(r"Thermal Status: (\d+)", self.shell("dumpsys", "thermalservice", check=False))
        return PhoneCondition(**battery, thermal_status=int(thermal[1]) if thermal else None, mhz=self.mhz())


def parse_battery(text: str) -> dict:
    """Parses `dumpsys battery`, which prints tenths of a degree. Missing values are `None`."""
    level = re.search(r"^\s*level: (\d+)", text, re.MULTILINE)
    temperature = re.search(r"^\s*temperature: (-?\d+)", text, re.MULTILINE)
    return {
        "battery_percent": int(level[1]) if level else None,
        "battery_celsius": int(temperature[1]) / 10 if temperature else None,
    }
