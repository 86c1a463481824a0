"""How commands end when they are interrupted, or nobody reads what they write."""

import os
import signal
import subprocess
import sys

import pytest

from mobilemoe import cli
from mobilemoe.console import ends_cleanly


COMMAND = [sys.executable, "-m", "mobilemoe.cli"]


def test_a_closed_pipe_ends_a_command_silently():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([*COMMAND, "--print-completion", "bash"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_pipe_that_closes_in_the_middle_ends_a_command_silently():
    code = (
        "from mobilemoe.console import ends_cleanly\n"
        "with ends_cleanly():\n"
        "    for i in range(10**6):\n"
        "        print('line', i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


def test_a_pipe_to_another_process_is_an_error():
    with pytest.raises(SystemExit, match="mobilemoe: .*Broken pipe"), ends_cleanly():
        read, write = os.pipe()
        os.close(read)
        os.write(write, b"x")


def test_an_interrupt_is_one_line(monkeypatch, capsys, request):
    # Test processes of pytest-xdist ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(cli, "run_generation", lambda arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--model", "x", "--prompt", "x"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_errors_keep_their_status(monkeypatch):
    def fail(arguments):
        raise ValueError("Nothing works.")

    monkeypatch.setattr(cli, "run_generation", fail)
    with pytest.raises(SystemExit, match="mobilemoe run: Nothing works."):
        cli.main(["run", "--model", "x", "--prompt", "x"])
