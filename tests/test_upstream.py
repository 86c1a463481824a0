"""
The patches of docs/upstream: each applies to the installed release, in which its defect is, and mends it.

The branch that adds MobileMoE to transformers is made in a clone of the checkout that `TRANSFORMERS_CHECKOUT` names,
in an environment that has `pip install "transformers[quality]"`:

    TRANSFORMERS_CHECKOUT=transformers make test-slow
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, build_tiny_model
from safetensors.torch import load_file, save_file


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
BRANCH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

directory = sys.argv[1]
inputs = load_file(f"{directory}/inputs.safetensors")["input_ids"]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(inputs).logits
    generated = model.generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
save_file({"logits": logits, "generated": generated}, f"{directory}/outputs.safetensors")
print(type(model).__module__, half.model.layers[0].feed_forward.router.weight.dtype, half.dtype)
"""
CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")


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


@pytest.fixture(scope="module")
def branch(tmp_path_factory) -> Path:
    """A clone of the checkout, with the branch."""
    pytest.importorskip("libcst", reason="needs transformers[quality]")
    clone = tmp_path_factory.mktemp("upstream") / "transformers"
    subprocess.run(["git", "clone", "--quiet", CHECKOUT, str(clone)], check=True)
    subprocess.run(["git", "switch", "--quiet", "--force-create", "main"], cwd=clone, check=True)
    for key, value in (("user.name", "mobilemoe"), ("user.email", "mobilemoe@localhost")):
        subprocess.run(["git", "config", key, value], cwd=clone, check=True)
    completed = subprocess.run(
        [sys.executable, ROOT / "docs/upstream/make_branch.py", clone], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return clone


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="needs a checkout of transformers: set TRANSFORMERS_CHECKOUT to it")
@pytest.mark.parametrize("rope_type", ["llama3", "yarn"])
def test_branch_computes_what_the_package_does(branch, tiny_config, input_ids, tmp_path, rope_type):
    config = copy.deepcopy(tiny_config)
    if rope_type == "yarn":
        config.rope_scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    model = build_tiny_model(config)
    model.save_pretrained(tmp_path)
    save_file({"input_ids": input_ids}, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        logits = model(input_ids).logits
        generated = model.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    environment = os.environ | {"PYTHONPATH": str(branch / "src"), "HF_HOME": str(tmp_path / "hf")}
    completed = subprocess.run(
        [sys.executable, "-c", BRANCH, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    # Its own class, not the code in the directory; the router in FP32 in a BF16 model.
    assert completed.stdout.split() == [
        "transformers.models.mobilemoe.modeling_mobilemoe",
        "torch.float32",
        "torch.bfloat16",
    ]
    outputs = load_file(tmp_path / "outputs.safetensors")
    torch.testing.assert_close(outputs["logits"], logits, rtol=0, atol=1e-5)
    assert torch.equal(outputs["generated"], generated)


@pytest.mark.parametrize("present", [(), (".git", "src/transformers/models/auto/modeling_auto.py")])
def test_branch_needs_a_checkout_of_transformers(tmp_path, present):
    for name in present:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    completed = subprocess.run(
        [sys.executable, ROOT / "docs/upstream/make_branch.py", tmp_path], capture_output=True, text=True
    )
    assert completed.returncode == 1
    assert "ValueError" in completed.stderr and "is no checkout of transformers" in completed.stderr
