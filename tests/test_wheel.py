"""The wheel as people install it: in an environment of its own, outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT
from eval_stand_ins import write_stand_ins


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(workspace, text_checkpoint, base_checkpoint) -> Path:
    """The working directory of a user: data and two checkpoints, nothing of the repository."""
    shutil.rmtree(workspace / "recipes")
    (workspace / "int4").symlink_to(text_checkpoint)
    (workspace / "base").symlink_to(base_checkpoint)
    write_stand_ins(workspace / "data", "foundation")
    return workspace


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Runs a program of an environment that has the wheel; all else is that of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    # No isolation: setuptools is here, and the tests have no network.
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options], check=True)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    programs = directory / "venv/bin"

    def outside() -> dict[str, str]:
        """The environment without a path on which what the wheel was built from would pass for an installation."""
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    install = [programs / "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=outside(), check=True)
    # The dependencies. Path files within that directory are not read, so the editable install is not seen.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory / "venv")}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(program: str, *arguments: str) -> str:
        environment = outside() | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        result = subprocess.run(
            [programs / program, *arguments], cwd=site, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    where = run("python", "-c", "import mobilemoe, modeling_mobilemoe as m; print(mobilemoe.__file__, m.__file__)")
    assert all(Path(path).is_relative_to(directory) for path in where.split())
    return run


def test_load_and_quantise(run, site):
    run(
        "python",
        "-c",
        "import modeling_mobilemoe; from transformers import AutoModelForCausalLM as A;"
        "modeling_mobilemoe.quantize(A.from_pretrained('base')).save_pretrained('packed');"
        "print(A.from_pretrained('packed'))",
    )
    assert json.loads((site / "packed/config.json").read_text())["quantization"]["packed"]


def test_kernels_compile(run, site, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(site / "cache"))
    run("python", "-m", "modeling_mobilemoe.kernels")
    assert any((site / "cache").rglob("libmobilemoe_torch-*"))


def test_plan_for_a_device_by_name(run, site):
    run("mobilemoe", "plan", "--memory-gb", "1", "--tokens", "500e9", "--device", "galaxy-s25", "--output", "planned")
    assert (site / "planned/config.json").is_file()


def test_export_run_and_evaluate(run, site):
    run("mobilemoe", "export", "--model", "int4", "--output", "pte", "--max-seq-len", "64")
    assert run("mobilemoe", "run", "--model", "pte", "--prompt", "import", "--max-new-tokens", "8").strip()
    options = ["--tasks", "piqa", "--limit", "2", "--data-dir", "data", "--output", "report"]
    assert "PIQA" in run("mobilemoe", "eval", "--model", "int4", *options)
    run(
        "mobilemoe", "card", "--model", "int4", "--license", "mit", "--results", "report", "pte", "--output", "card.md"
    )
    assert "PIQA" in (site / "card.md").read_text()


@pytest.mark.parametrize("script", ["sft", "qat"])
def test_a_recipe_by_its_name(run, site, script):
    options = ["--model", "base", "--output_dir", script, "--max_steps", "2"]
    run("python", "-m", f"mobilemoe.recipes.{script}", "--config", f"tiny/{script}", *options)
    assert (site / script / "model.safetensors").is_file()


def test_an_unknown_shape_lists_the_shipped_ones(run):
    with pytest.raises(
        AssertionError, match="model=nowhere is no existing path.*mobilemoe-l, mobilemoe-m, mobilemoe-s"
    ):
        run("python", "-m", "mobilemoe.recipes.pretrain", "--config", "tiny/pretrain", "--model", "nowhere")
