"""A Raspberry Pi or another Arm Linux board through `ssh`."""

import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from ..results import PhoneCondition, PhoneFingerprint
from .device import Device, DeviceLost


ZONES = "/sys/class/thermal/thermal_zone*"
# [USER@]HOST as in OpenSSH. A name that begins with a dash would be an option of it.
HOST = re.compile(r"(\w[\w.+-]*@)?[\w:\[][\w.:%\]-]*", re.ASCII)


def find_ssh_device(host: str) -> "SshDevice":
    """
    Raises:
        ValueError: when the host cannot be a name, `ssh` is missing, or does not log in without a question.
    """
    if not HOST.fullmatch(host):
        raise ValueError(f"ssh:{host} names no host. Give --device ssh:HOST or ssh:USER@HOST.")
    if shutil.which("ssh") is None:
        raise ValueError("ssh is not on the PATH. Install it (Debian: apt install openssh-client).")
    board = SshDevice(host)
    result = board.run(board.command("true"), 60, stdin=subprocess.DEVNULL)
    if result.returncode:
        said = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise ValueError(
            f"ssh {host} failed: {said.rstrip('.')}. It must log in without a question: ssh-copy-id {host} installs a "
            "key, and ~/.ssh/config has ports and users."
        )
    return board


class SshDevice(Device):
    """
    A machine with Linux and an SSH server.

    Args:
        name (`str`): [USER@]HOST, or a name of ~/.ssh/config.
    """

    # In the user's home, where a login begins: /tmp may be memory.
    directory = ".cache/mobilemoe-device"

    def command(self, line: str) -> list[str]:
        # Without a question, as nobody sees it. A connection that is gone is noticed after 15 seconds.
        options = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3")
        return ["ssh", "-T", *(word for option in options for word in ("-o", option)), "--", self.name, line]

    def copy(self, path: Path, target: str) -> subprocess.CompletedProcess:
        with open(path, "rb") as file:
            return self.run(self.command(f"cat > {shlex.quote(target)}"), 3600, stdin=file)

    def is_connected(self) -> bool:
        with suppress(DeviceLost):
            return self.run(self.command("true"), 60, stdin=subprocess.DEVNULL).returncode == 0
        return False

    def fingerprint(self) -> PhoneFingerprint:
        # A string of the device tree ends with a zero byte.
        model = self.shell("cat", "/proc/device-tree/model", check=False).strip("\0\n ")
        system = re.search(
            r'^PRETTY_NAME="?([^"\n]*)', self.shell("cat", "/etc/os-release", check=False), re.MULTILINE
        )
        kernel = self.shell("uname", "-r").strip()
        return PhoneFingerprint(
            model=model or "Linux machine",
            soc="unknown",
            abi=self.shell("uname", "-m").strip(),
            max_mhz=self.max_mhz(),
            memory_bytes=self.memory_bytes(),
            android=None,
            build=f"{system[1]}, Linux {kernel}" if system else f"Linux {kernel}",
            **self.condition().model_dump(),
        )

    def condition(self) -> PhoneCondition:
        return PhoneCondition(
            battery_percent=None,
            battery_celsius=None,
            zones_celsius=self.zones_celsius(),
            thermal_status=None,
            mhz=self.mhz(),
        )

    def zones_celsius(self) -> dict[str, float]:
        """Temperatures by sensor. Of several with one name, the warmest."""
        rows = re.findall(
            r"/thermal_zone(\d+)/(type|temp):(.+)$", self.sysfs(f"{ZONES}/type {ZONES}/temp"), re.MULTILINE
        )
        names = {number: text for number, file, text in rows if file == "type"}
        zones: dict[str, float] = {}
        for number, file, text in rows:
            # Thousandths. Some sensors report no number, or an impossible one while they are off.
            if file == "temp" and re.fullmatch(r"-?[0-9]{1,6}", text) and -40 < (celsius := int(text) / 1000) < 150:
                name = names.get(number, number)
                zones[name] = max(celsius, zones.get(name, celsius))
        return zones
