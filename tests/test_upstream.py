"""The patches of docs/upstream: each applies to the installed release, in which its defect is, and mends it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT


INSTALLED = Path(transformers.__file__).parent
# Loads the module that is named from a patched file, and gives no package of ours.
SITECUSTOMIZE = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mobilemoe":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name == {module!r}:
            return importlib.util.spec_from_file_location(name, {file!r})

sys.meta_path.insert(0, Finder())
"""
TOKENIZE = """
import sys
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1])("import os").input_ids)
"""
SERVE = """
import sys
from transformers.cli.serving.model_manager import ModelManager
model = ModelManager(device="cpu", trust_remote_code=True)._load_model(sys.argv[1])
print(type(model).__name__)
"""


def as_released(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    (directory / "config.json").write_text(json.dumps(config))


def without_workaround(directory: Path) -> None:
    file = directory / "configuration_mobilemoe.py"
    text = file.read_text()
    assert text.count("if server is not None:") == 1
    file.write_text(text.replace("if server is not None:", "if False:"))


@pytest.mark.parametrize(
    ("patch", "module", "prepare", "script", "error"),
    [
        ("tokenizer_fallback", "modeling_rope_utils", as_released, TOKENIZE, "no attribute 'max_position_embeddings'"),
        ("serve_custom_models", "cli/serving/model_manager", without_workaround, SERVE, "has no attribute MobileMoE"),
    ],
)
def test_patch_mends_its_defect(text_checkpoint, tmp_path, patch, module, prepare, script, error):
    if "serve" in patch:
        pytest.importorskip("fastapi", reason="needs transformers[serving]")
    source = tmp_path / f"src/transformers/{module}.py"
    source.parent.mkdir(parents=True)
    shutil.copy(INSTALLED / f"{module}.py", source)
    directory = shutil.copytree(text_checkpoint, tmp_path / "checkpoint")
    prepare(directory)
    name = f"transformers.{module.replace('/', '.')}"
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=name, file=str(source)))
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), inherited))),
        "HF_HOME": str(tmp_path / "hf"),
    }

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, str(directory)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    assert error in run().stderr, "mended upstream: drop the workaround and the patch"
    applied = subprocess.run(
        ["patch", "-p1", "-i", ROOT / f"docs/upstream/{patch}.patch"], cwd=tmp_path, capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stdout
    completed = run()
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.strip().endswith(("]", "MobileMoEForCausalLM"))
