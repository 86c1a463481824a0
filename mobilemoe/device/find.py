"""The device that an option names."""

from .adb import find_adb_device
from .device import Device
from .ssh import find_ssh_device


def is_device(name: str) -> bool:
    return name == "adb" or name.startswith("ssh:")


def find_device(name: str, serial: str | None = None) -> Device:
    """
    Args:
        name (`str`): `"adb"`, or `"ssh:HOST"`.
        serial (`str`, *optional*): of the device, if adb has several.

    Raises:
        ValueError: when it cannot be reached.
    """
    return find_ssh_device(name.removeprefix("ssh:")) if name.startswith("ssh:") else find_adb_device(serial)
