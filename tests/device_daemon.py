"""
An Android device on loopback, as far as the real `adb` client can tell.

It speaks the part of adb's transport that a benchmark needs (CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; shell,v2; sync STAT,
SEND, RECV, LIST), see protocol.txt, SYNC.TXT and shell_protocol.h in AOSP's packages/modules/adb. Its file system is a
directory, its commands are this machine's shell with that directory in place of the device's paths, and `bin/` of it
first on the PATH: scripts there play getprop, dumpsys and what else only a phone has.
"""

import os
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path


VERSION, MAX_DATA = 0x01000001, 64 * 1024
# Of the device; all other paths of a command are this machine's.
LOADER = "ld-linux-aarch64.so.1"
DEVICE_PATHS = ("/data/local/tmp", "/sys/devices", "/proc/meminfo")


class Device:
    def __init__(self, root: Path):
        self.root = root
        self.state = "device"
        # When set, the next copy stops there: as if the cable was pulled, or the disk was full.
        self.vanish_after: int | None = None
        self.full_after: int | None = None
        # The cable is pulled when a command comes that holds these words.
        self.vanish_at: str | None = None
        self.connected = True
        # What runs the loader of an Arm bundle, in place of the processor.
        self.emulator: list[str] = []
        self.transports: list[Transport] = []
        self.pushed: list[str] = []
        self.commands: list[str] = []
        for path in ("bin", "data/local/tmp", "proc"):
            (root / path).mkdir(parents=True, exist_ok=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def script(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def write(self, path: str, text: str) -> None:
        file = self.local(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def local(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def pull_cable(self) -> None:
        for transport in list(self.transports):
            with suppress(OSError):
                transport.vanish()

    def plug_in(self) -> None:
        self.vanish_after = self.vanish_at = None
        self.connected = True

    def close(self) -> None:
        self.server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            if self.connected:
                Transport(self, connection).start()
            else:
                connection.close()


class Transport(threading.Thread):
    """One connection, with its streams."""

    def __init__(self, device: Device, connection: socket.socket):
        super().__init__(daemon=True)
        self.device, self.connection = device, connection
        # Short messages would wait for one another.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        device.transports.append(self)
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def send(self, command: bytes, arg0: int, arg1: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack("<6I", number, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self.lock:
            self.connection.sendall(header + data)

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.connection.recv(count - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def vanish(self) -> None:
        # The client would connect again by itself.
        self.device.connected = False
        self.connection.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            while True:
                number, arg0, arg1, length, _, _ = struct.unpack("<6I", self.receive(24))
                data = self.receive(length)
                command = number.to_bytes(4, "little")
                if command == b"CNXN":
                    if self.device.state == "unauthorized":
                        self.send(b"AUTH", 1, 0, b"t" * 20)
                    else:
                        banner = b"device::ro.product.name=test;ro.product.model=Test;features=shell_v2,cmd"
                        self.send(b"CNXN", VERSION, MAX_DATA, banner)
                elif command == b"AUTH":
                    # A signature is refused with another token, a public key waits for the user.
                    if arg0 == 2:
                        self.send(b"AUTH", 1, 0, b"t" * 20)
                elif command == b"OPEN":
                    stream = self.streams[arg0] = Stream(self, arg0, data.rstrip(b"\0").decode())
                    stream.start()
                elif arg1 in (ids := {stream.id: stream for stream in list(self.streams.values())}):
                    ids[arg1].deliver(command, data)
        except OSError:
            pass
        finally:
            for stream in list(self.streams.values()):
                stream.deliver(b"CLSE", b"")
            self.connection.close()


class Stream(threading.Thread):
    """One service: a shell command or a sync session."""

    def __init__(self, transport: Transport, remote_id: int, service: str):
        super().__init__(daemon=True)
        self.transport, self.remote_id, self.service = transport, remote_id, service
        # Any number but zero; the client's are unique.
        self.id = remote_id
        self.ready, self.arrived = threading.Semaphore(0), threading.Condition()
        self.data, self.closed = b"", False
        self.process: subprocess.Popen | None = None

    def deliver(self, command: bytes, data: bytes) -> None:
        if command == b"OKAY":
            self.ready.release()
        elif command == b"WRTE":
            with self.arrived:
                self.data += data
                self.arrived.notify()
            self.transport.send(b"OKAY", self.id, self.remote_id)
        elif command == b"CLSE":
            with self.arrived:
                self.closed = True
                self.arrived.notify()
            self.ready.release()
            if self.process is not None:
                self.process.kill()

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_DATA):
            if self.closed:
                raise ConnectionError
            self.transport.send(b"WRTE", self.id, self.remote_id, data[start : start + MAX_DATA])
            self.ready.acquire()

    def read(self, count: int) -> bytes:
        with self.arrived:
            self.arrived.wait_for(lambda: len(self.data) >= count or self.closed)
            if len(self.data) < count:
                raise ConnectionError
            data, self.data = self.data[:count], self.data[count:]
            return data

    def run(self) -> None:
        kind, _, argument = self.service.partition(":")
        try:
            self.transport.send(b"OKAY", self.id, self.remote_id)
            if kind == "sync":
                self.sync()
            elif kind.startswith("shell,v2"):
                self.shell(argument)
            self.transport.send(b"CLSE", self.id, self.remote_id)
        except OSError:
            pass
        finally:
            self.transport.streams.pop(self.remote_id, None)

    def shell(self, command: str) -> None:
        device = self.transport.device
        device.commands.append(command)
        if device.vanish_at is not None and device.vanish_at in command:
            self.transport.vanish()
            raise ConnectionError
        if device.emulator:
            command = command.replace(f"&& ../bundle/{LOADER}", f"&& {' '.join(device.emulator)} ../bundle/{LOADER}")
        for path in DEVICE_PATHS:
            command = command.replace(path, str(device.local(path)))
        environment = os.environ | {
            "PATH": f"{device.root / 'bin'}:{os.environ['PATH']}",
            "DEVICE_ROOT": str(device.root),
        }
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        threading.Thread(target=self.forward_input, daemon=True).start()

        def forward(kind: int, pipe) -> None:
            for line in pipe:
                line = line.replace(str(device.root).encode(), b"")
                try:
                    self.write(struct.pack("<BI", kind, len(line)) + line)
                except OSError:
                    return

        # One after the other would stop a program that fills the second pipe.
        errors = threading.Thread(target=forward, args=(2, self.process.stderr))
        errors.start()
        forward(1, self.process.stdout)
        errors.join()
        status = self.process.wait()
        self.write(struct.pack("<BIB", 3, 1, status if status >= 0 else 128 - status))

    def forward_input(self) -> None:
        try:
            while True:
                kind, length = struct.unpack("<BI", self.read(5))
                data = self.read(length)
                if kind == 4:
                    break
                if kind == 0:
                    self.process.stdin.write(data)
                    self.process.stdin.flush()
        except OSError:
            pass
        with suppress(OSError):
            self.process.stdin.close()

    def sync(self) -> None:
        device = self.transport.device
        while True:
            kind, length = struct.unpack("<4sI", self.read(8))
            if kind == b"QUIT":
                return
            argument = self.read(length).decode()
            if kind == b"STAT":
                path = device.local(argument)
                status = path.stat() if path.exists() else None
                fields = (status.st_mode, status.st_size, int(status.st_mtime)) if status else (0, 0, 0)
                self.write(b"STAT" + struct.pack("<3I", *fields))
            elif kind == b"SEND":
                self.accept_file(device, argument.rpartition(",")[0])
            elif kind == b"RECV":
                content = device.local(argument).read_bytes()
                for start in range(0, len(content), MAX_DATA // 2):
                    part = content[start : start + MAX_DATA // 2]
                    self.write(b"DATA" + struct.pack("<I", len(part)) + part)
                self.write(b"DONE" + struct.pack("<I", 0))

    def accept_file(self, device: Device, path: str) -> None:
        device.pushed.append(path)
        received, full = 0, False
        with open(device.local(path), "wb") as file:
            while True:
                kind, length = struct.unpack("<4sI", self.read(8))
                if kind == b"DONE":
                    break
                data = self.read(length)
                received += len(data)
                if device.vanish_after is not None and received > device.vanish_after:
                    self.transport.vanish()
                    raise ConnectionError
                full = full or (device.full_after is not None and received > device.full_after)
                # As a device does: what still comes is read and thrown away.
                if not full:
                    file.write(data)
        message = b"write failed: No space left on device" if full else b""
        self.write((b"FAIL" if full else b"OKAY") + struct.pack("<I", len(message)) + message)


def connect(device: Device, state: str = "device") -> Device:
    for _ in range(50):
        subprocess.run(["adb", "connect", device.address], capture_output=True)
        listed = subprocess.run(["adb", "devices"], capture_output=True, text=True).stdout
        if f"{device.address}\t{state}" in listed:
            return device
        time.sleep(0.1)
    raise AssertionError(listed)
