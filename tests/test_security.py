"""SECURITY.md: every promise, and the tests that hold it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mobilemoe.device.adb import AdbDevice
from mobilemoe.device.ssh import SshDevice, find_ssh_device


# By the first words of a promise: tests of it.
TESTS = {
    "Weights are read from safetensors only": [
        "test_checkpoint_mobilemoe.test_pickle_is_never_read",
        "test_checkpoint_mobilemoe.test_pickle_beside_safetensors_is_not_read",
    ],
    "No remote code": ["test_modeling_mobilemoe.test_remote_code_never_runs_where_the_package_is_imported"],
    "No shell strings from input": [
        "test_security.test_no_shell_and_no_pickle_in_the_code",
        "test_security.test_arguments_for_a_phone_are_quoted",
        "test_security.test_a_host_cannot_be_an_option_of_ssh",
    ],
    "No network without a request": ["test_security.test_a_local_model_opens_no_connection"],
    "The server is for this machine": [
        "test_serve.test_an_api_key",
        "test_serve.test_no_other_site_may_read",
        "test_serve.test_names_of_this_machine",
        "test_serve.test_what_cannot_be_served",
        "test_serve.test_wrong_requests_are_refused",
    ],
    "Nothing else runs": ["test_kernels.test_a_damaged_build_is_compiled_again"],
    "A checkpoint reads its own files only": ["test_checkpoint_mobilemoe.test_malformed_checkpoint_is_named"],
    "A chat template is bounded": ["test_limits.test_a_template_without_end_is_stopped"],
    "What was exported is what runs": [
        "test_integrity.test_one_changed_bit_is_refused",
        "test_integrity.test_weights_of_a_large_program_are_read_on_request_and_once",
        "test_runtime.test_a_random_file_of_the_right_size_is_named",
    ],
    "Nothing is half-written": [
        "test_crash_consistency.test_every_state_is_the_old_or_the_new_one",
        "test_crash_consistency.test_what_a_killed_writer_left_goes_with_the_next",
    ],
    "Damaged weights are refused": [
        "test_checkpoint_mobilemoe.test_malformed_checkpoint_is_named",
        "test_quantization_mobilemoe.test_a_model_with_values_that_are_not_finite_is_not_quantized",
        "test_runtime.test_logits_that_are_not_finite_end_the_generation",
    ],
}
CODE = [
    path for name in ("mobilemoe", "modeling_mobilemoe", "optimum", "recipes") for path in (ROOT / name).rglob("*.py")
]


def test_every_promise_has_tests():
    promises = re.findall(r"^- \*\*(.+?)\.\*\*", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert promises == list(TESTS)
    for test in (test for tests in TESTS.values() for test in tests):
        file, _, name = test.partition(".")
        assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), test


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_and_no_pickle_in_the_code(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("os.system", "os.popen", "eval", "exec", "torch.load"), (path, node.lineno)
            assert not any(keyword.arg == "shell" for keyword in node.keywords), (path, node.lineno)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(names), (path, node.lineno)


@pytest.mark.parametrize("device", [AdbDevice("serial"), SshDevice("host")], ids=["adb", "ssh"])
def test_arguments_for_a_phone_are_quoted(device: AdbDevice | SshDevice, tmp_path, monkeypatch):
    """The device's shell gets one string. That of this machine stands in for it."""
    started = []

    def run(command: list[str], timeout: float, **options) -> subprocess.CompletedProcess:
        assert command[:-1] == device.command("")[:-1]
        started.append(command[-1])
        return subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, cwd=tmp_path)

    monkeypatch.setattr(device, "run", run)
    for word in ("a; touch x", "$(touch x)", "`touch x`", "'; touch x; '", "a && touch x", "a\ntouch x"):
        assert device.shell("printf", "%s", word) == word
    assert len(started) == 6 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "me@-x", "", "a b", "a;b", "$(x)", "--", "a\nb", "a@b@c"])
def test_a_host_cannot_be_an_option_of_ssh(host: str, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    with pytest.raises(ValueError, match="names no host"):
        find_ssh_device(host)
    assert SshDevice("host").command("x")[-3:] == ["--", "host", "x"]


def test_a_local_model_opens_no_connection(text_checkpoint):
    script = """
import os, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        # Not an exception, which a library could handle.
        print(event, arguments, flush=True)
        os._exit(3)

sys.addaudithook(refuse)
from mobilemoe.artifacts import describe_model
from mobilemoe.runtime import CheckpointModel

describe_model(sys.argv[1])
model = CheckpointModel(sys.argv[1])
print(len(list(model.generate(model.encode("import os", chat=True), 2))))
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    command = [sys.executable, "-c", script, str(text_checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
