"""Checkpoints on the Hub: the real `huggingface_hub` client, in processes of its own, against a Hub in memory."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer


REPOSITORY_ROOT = Path(__file__).parents[1]
TRAVELLING = "cache checkpoint configuration fused modeling quantization saving"
CODE_FILES = {f"{name}_mobilemoe.py" for name in TRAVELLING.split()}
PROLOGUE = """
import json, os, sys

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import modeling_mobilemoe

input_ids = torch.arange(3, 19)[None]

@torch.no_grad()
def logits(checkpoint, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options)(input_ids).logits

def failure(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

"""


def run_client(endpoint: str, home: Path, script: str, *arguments: object, **environment: str) -> dict:
    """Runs a script after the prologue in a process of its own, and returns the JSON of its last line."""
    # All of it is read when `huggingface_hub` is imported, hence the process.
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Uploads and downloads over LFS: Xet is a protocol of its own behind a compiled client.
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **environment,
    }
    settings_of_the_user = ("HF_", "HUGGING", "TRANSFORMERS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings_of_the_user)}
    completed = subprocess.run(
        [sys.executable, "-c", PROLOGUE + script, *map(str, arguments)],
        cwd=REPOSITORY_ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


UPLOAD = """
packed, full = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(packed)
model = AutoModelForCausalLM.from_pretrained(packed)
model.push_to_hub("user/packed")
tokenizer.push_to_hub("user/packed")
ModelCard("---\\nlibrary_name: transformers\\nlicense: apache-2.0\\n---\\n# Tiny\\n").push_to_hub("user/packed")

model = AutoModelForCausalLM.from_pretrained(full)
model.push_to_hub("user/full")
tokenizer.push_to_hub("user/full")
model.push_to_hub("user/sharded", max_shard_size="200KB")

first = model.push_to_hub("user/pinned").oid
HfApi().create_tag("user/pinned", tag="v1", revision=first)
# The repository with a failing upload gets new weights first: what the Hub has already is not uploaded again.
model.model.norm.weight.data.mul_(2)
model.push_to_hub("user/retried")
model.push_to_hub("user/pinned")

interrupted = failure(model.push_to_hub, "user/interrupted")
unharmed = HfApi().list_repo_files("user/interrupted")
model.push_to_hub("user/interrupted")
print(json.dumps({"first": first, "interrupted": interrupted, "unharmed": unharmed}))
"""


@pytest.fixture(scope="module")
def uploaded(hub, text_checkpoint, tiny_checkpoint, tmp_path_factory) -> dict:
    hub.faults["PUT /user/retried/lfs/"] = "500"
    hub.faults["POST /api/models/user/interrupted/commit/"] = "500"
    home = tmp_path_factory.mktemp("hub") / "uploader"
    return run_client(hub.endpoint, home, UPLOAD, text_checkpoint, tiny_checkpoint, HF_TOKEN="hf_writer")


def test_a_push_carries_everything_a_checkpoint_needs(hub, uploaded, text_checkpoint):
    files = hub.files("user/packed")
    local = {path.name: path.read_bytes() for path in text_checkpoint.iterdir()}
    assert set(files) == set(local) | {"README.md", ".gitattributes"}
    for name in (*CODE_FILES, "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == local[name], name
    config = json.loads(files["config.json"])
    assert config["quantization"] == json.loads(local["config.json"])["quantization"]
    assert files["README.md"].decode().endswith("# Tiny\n")
    # transformers writes a card of its own where there is none.
    assert "library_name: transformers" in hub.files("user/full")["README.md"].decode()
    assert "quantization" not in json.loads(hub.files("user/full")["config.json"])
    # One in a single piece, the other, which is larger, in parts.
    assert any(line.startswith("PUT /user/packed/lfs/") for line in hub.log)
    assert any(line.startswith("POST /user/full/lfs/") and line.endswith("/complete 200") for line in hub.log)


def test_a_sharded_push_has_its_index(hub, uploaded):
    files = hub.files("user/sharded")
    index = json.loads(files["model.safetensors.index.json"])
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert shards == set(index["weight_map"].values())


def test_an_upload_that_fails_is_repeated_or_leaves_the_repository_as_it_was(hub, uploaded):
    uploads = [line.rpartition(" ")[2] for line in hub.log if line.startswith("PUT /user/retried/lfs/")]
    assert uploads.count("500") == 1 and uploads.count("200") == len(uploads) - 1 > 0
    assert "HfHubHTTPError" in uploaded["interrupted"] and "500" in uploaded["interrupted"]
    assert uploaded["unharmed"] == [".gitattributes"]
    for name in ("user/retried", "user/interrupted"):
        assert hub.files(name)["model.safetensors"] == hub.files("user/pinned")["model.safetensors"]


DOWNLOAD = """
import huggingface_hub.constants

packed, full, first = sys.argv[1:]

result = {}
loaded = AutoModelForCausalLM.from_pretrained("user/packed")
with torch.no_grad():
    result["packed"] = torch.equal(loaded(input_ids).logits, logits(packed))
result["quantization"] = loaded.config.quantization
result["dtypes"] = sorted({str(tensor.dtype) for tensor in loaded.state_dict().values()})
ours, theirs = AutoTokenizer.from_pretrained(packed), AutoTokenizer.from_pretrained("user/packed")
chat = [{"role": "user", "content": "Where is the parser?"}]
result["tokenizer"] = ours("import os").input_ids == theirs("import os").input_ids
result["chat"] = ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
result["ends"] = loaded.generation_config.eos_token_id

expected = logits(full)
result["full"] = torch.equal(logits("user/full"), expected)
result["sharded"] = torch.equal(logits("user/sharded"), expected)

def norm(revision):
    return AutoModelForCausalLM.from_pretrained("user/pinned", revision=revision).model.norm.weight

result["pinned"] = torch.equal(logits("user/pinned", revision=first), expected)
result["tag"] = torch.equal(norm("v1"), norm(first))
result["main"] = torch.equal(norm("main"), 2 * norm(first))
result["no such revision"] = failure(norm, "v2")

for options in ({}, {"trust_remote_code": False}):
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer):
        auto_class.from_pretrained("user/trapped", **options)
result["trapped"] = torch.equal(logits("user/trapped"), logits(packed))

for name in ("user/pickle", "user/untyped-pickle"):
    result[name] = failure(AutoModelForCausalLM.from_pretrained, name, weights_only=False)
result["user/incomplete"] = failure(AutoModelForCausalLM.from_pretrained, "user/incomplete")

# Smaller than the weights, so that a part of them is on disk when the connection breaks.
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
result["cut"] = torch.equal(logits("user/cut"), expected)
result["broken"] = failure(logits, "user/broken")
result["mended"] = torch.equal(logits("user/broken"), expected)
print(json.dumps(result))
"""


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def reader_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub") / "reader"


@pytest.fixture(scope="module")
def markers(tmp_path_factory) -> Path:
    """What the trapped files would write, if they ran."""
    return tmp_path_factory.mktemp("markers")


@pytest.fixture(scope="module")
def downloaded(hub, uploaded, text_checkpoint, tiny_checkpoint, reader_home, markers) -> dict:
    trap = f"open({str(markers / 'code')!r}, 'w').close()\nraise RuntimeError('remote code was executed')\n"
    trapped = {name: trap.encode() for name in (*CODE_FILES, "tokenizer.py", "custom_generate/generate.py")}
    tokenizer_config = json.loads(hub.files("user/packed")["tokenizer_config.json"])
    tokenizer_config["auto_map"] = {"AutoTokenizer": [None, "tokenizer.Tokenizer"]}
    trapped["tokenizer_config.json"] = json.dumps(tokenizer_config).encode()
    hub.add("user/trapped", hub.files("user/packed") | trapped)
    config = json.loads(hub.files("user/full")["config.json"])
    bomb = pickle.dumps(Bomb(markers / "pickle"))
    hub.add("user/pickle", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": bomb})
    del config["dtype"]
    hub.add("user/untyped-pickle", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": bomb})
    for name, fault in (("user/cut", "cut"), ("user/broken", "500")):
        hub.add(name, hub.files("user/full"))
        hub.faults[f"GET /{name}/lfs/"] = fault
    sharded = hub.files("user/sharded")
    hub.add("user/incomplete", {name: sharded[name] for name in sharded if "model-00002-of-" not in name})
    arguments = text_checkpoint, tiny_checkpoint, uploaded["first"]
    return run_client(hub.endpoint, reader_home, DOWNLOAD, *arguments)


def test_a_fresh_cache_loads_what_was_pushed(downloaded, text_checkpoint):
    for name in ("packed", "tokenizer", "chat", "full", "sharded"):
        assert downloaded[name] is True, name
    assert downloaded["quantization"] == json.loads((text_checkpoint / "config.json").read_text())["quantization"]
    assert "torch.uint8" in downloaded["dtypes"]
    assert downloaded["ends"] == [497, 504]


def test_a_revision_pins_the_weights(downloaded):
    for name in ("pinned", "tag", "main"):
        assert downloaded[name] is True, name
    assert "v2 is not a valid git identifier" in downloaded["no such revision"]


def test_code_in_a_repository_is_neither_run_nor_downloaded(hub, downloaded, markers):
    assert downloaded["trapped"] is True
    assert not (markers / "code").exists()
    assert any("/user/trapped/resolve/" in line for line in hub.log)
    assert [line for line in hub.log if "/resolve/" in line and ".py " in line] == []


# Without a dtype in config.json transformers looks for one in the weights.
@pytest.mark.parametrize("repository", ["user/pickle", "user/untyped-pickle"])
def test_a_pickle_is_refused_and_neither_run_nor_downloaded(hub, downloaded, markers, repository):
    assert f"OSError: {repository} does not appear to have a file named model.safetensors" in downloaded[repository]
    assert not (markers / "pickle").exists()
    assert [line for line in hub.log if line.startswith(f"GET /{repository}/lfs/")] == []


def test_a_missing_shard_is_named(downloaded):
    assert "user/incomplete does not appear to have a file named model-00002-of-" in downloaded["user/incomplete"]


def test_a_download_that_breaks_is_resumed_or_can_be_repeated(hub, downloaded):
    assert downloaded["cut"] is True
    statuses = [line.rpartition(" ")[2] for line in hub.log if line.startswith("GET /user/cut/lfs/")]
    assert statuses == ["200", "206"]
    assert "500 Internal Server Error" in downloaded["broken"]
    assert downloaded["mended"] is True


OFFLINE = """
from mobilemoe.cli import main

packed, full, first = sys.argv[1:]
result = {}
result["packed"] = torch.equal(logits("user/packed"), logits(packed))
result["tokenizer"] = AutoTokenizer.from_pretrained("user/packed").chat_template is not None
result["sharded"] = torch.equal(logits("user/sharded"), logits(full))
result["pinned"] = torch.equal(logits("user/pinned", revision=first), logits(full))
result["main"] = not torch.equal(logits("user/pinned"), logits(full))
result["uncached"] = failure(AutoModelForCausalLM.from_pretrained, "user/retried")
try:
    main(["run", "--model", "user/retried", "--prompt", "import"])
except SystemExit as end:
    result["command"] = end.code
print(json.dumps(result))
"""


def test_a_cached_checkpoint_loads_offline(hub, uploaded, downloaded, text_checkpoint, tiny_checkpoint, reader_home):
    with HubServer() as stopped:
        pass
    num_requests = len(hub.log)
    arguments = text_checkpoint, tiny_checkpoint, uploaded["first"]
    result = run_client(stopped.endpoint, reader_home, OFFLINE, *arguments, HF_HUB_OFFLINE="1")
    for name in ("packed", "tokenizer", "sharded", "pinned", "main"):
        assert result[name] is True, name
    assert f"couldn't connect to '{stopped.endpoint}'" in result["uncached"]
    assert "couldn't find them in the cached files" in result["uncached"]
    assert result["command"].startswith(
        f"mobilemoe run: There is no directory user/retried, and it cannot be downloaded from the Hub: Cannot reach "
        f"{stopped.endpoint}/"
    )
    assert stopped.log == [] and len(hub.log) == num_requests


GATED = """
from mobilemoe.cli import main
from mobilemoe.runtime import CheckpointModel

def run(checkpoint):
    try:
        main(["run", "--model", checkpoint, "--prompt", "import", "--max-new-tokens", "2"])
    except SystemExit as end:
        return end.code

result = {"missing": failure(AutoConfig.from_pretrained, "user/missing"), "missing command": run("user/missing")}
for token in ("", "hf_stranger"):
    os.environ["HF_TOKEN"] = token
    result[f"config {token}"] = failure(AutoConfig.from_pretrained, "meta/gated")
    result[f"model {token}"] = failure(AutoModelForCausalLM.from_pretrained, "meta/gated")
    result[f"runtime {token}"] = failure(CheckpointModel, "meta/gated")
    result[f"command {token}"] = run("meta/gated")
os.environ["HF_TOKEN"] = "hf_member"
result["member"] = run("meta/gated")
print(json.dumps(result))
"""


def test_gated_weights_say_to_accept_the_licence_and_to_log_in(hub, uploaded, tmp_path):
    hub.add("meta/gated", hub.files("user/packed"))
    hub.repositories["meta/gated"].accepted_tokens = {"hf_member"}
    result = run_client(hub.endpoint, tmp_path, GATED)
    for token, status in (("", 401), ("hf_stranger", 403)):
        for loader in ("config", "model"):
            error = result[f"{loader} {token}"]
            assert "OSError: You are trying to access a gated repo" in error
            assert f"https://huggingface.co/meta/gated.\n{status} Client Error" in error
        message = (
            "meta/gated is gated: only accounts that have accepted its licence can download it. Accept the "
            "licence at https://huggingface.co/meta/gated, then log in with `hf auth login`."
        )
        assert result[f"runtime {token}"] == f"OSError: {message}"
        assert result[f"command {token}"] == f"mobilemoe run: {message}"
    assert result["member"] is None
    # In Python, an error of another kind stays as transformers words it.
    assert "user/missing is not a local folder and is not a valid model identifier" in result["missing"]
    assert result["missing command"] == (
        "mobilemoe run: There is no directory user/missing, and the Hub has no model of this name that is open to "
        "you. Correct it, or log in: `hf auth login`."
    )
