"""Session fixtures: a tiny model with a fixed seed, its checkpoint, and INT4 and exported versions of it."""

import os


# Libraries read both when they are imported, so set them first. No test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Spinning threads make a tiny model ten times slower on a machine with shared cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import copy
import inspect
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from device_daemon import Device, connect
from toy_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobilemoe.cli import main
from mobilemoe.device.bundle import LOADER, RUNNER, build_bundle, runner_command
from mobilemoe.export.random_program import random_packed_model
from mobilemoe.train.qat import convert, prepare
from mobilemoe.train.recipe import CHAT_TEMPLATE
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, dequantize, quantize
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels import build_runner


torch.set_num_threads(2)

ROOT = Path(__file__).parents[1]

# The `quantization` block of the -QAT releases, verbatim (integrallis/models, MobileMoeHuggingFaceConfigTest).
RELEASED_BLOCK = {
    "format": "mobilemoe-int4-g32",
    "group_size": 32,
    "embedding_group_size": 32,
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "packed": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
}


@pytest.fixture(scope="session")
def tiny_config() -> MobileMoEConfig:
    """Do not modify it; pass a copy to models."""
    return MobileMoEConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        # At the default 0.02, attention is nearly uniform and routing nearly tied, which would hide wrong rules.
        initializer_range=0.2,
        # At 8192, the scaled frequencies would have no visible effect within the few tokens of a test.
        rope_scaling={
            "rope_type": "llama3",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
        },
    )


def build_tiny_model(config: MobileMoEConfig) -> MobileMoEForCausalLM:
    """Norm weights and expert biases are random too: at one and zero, leaving them out would not be detected."""
    torch.manual_seed(0)
    model = MobileMoEForCausalLM(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("expert_bias"):
                tensor.uniform_(-0.3, 0.3)
    return model


@pytest.fixture
def tiny_model(tiny_config: MobileMoEConfig) -> MobileMoEForCausalLM:
    """A new FP32 model in eval mode."""
    return build_tiny_model(tiny_config)


@pytest.fixture
def one_thread():
    """Sums in one order, so that weights and losses are equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def input_ids(tiny_config: MobileMoEConfig) -> torch.Tensor:
    """Two rows of 24 tokens, without the special ids 0 to 2."""
    return torch.randint(3, tiny_config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: MobileMoEConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    build_tiny_model(tiny_config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def int4_checkpoint(tiny_config: MobileMoEConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "int4"
    quantize(build_tiny_model(tiny_config)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """512 tokens with the structure of the released tokenizer. BOS is 496, the end tokens are 497 and 504."""
    return train_tokenizer((inspect.getsource(module) for module in (argparse, inspect)), 512)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def base_checkpoint(tiny_config: MobileMoEConfig, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision checkpoint with a tokenizer and, like base models, no chat template."""
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    config = copy.deepcopy(tiny_config)
    config.bos_token_id, config.eos_token_id = 496, [497, 504]
    build_tiny_model(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def train_on_source(model: MobileMoEForCausalLM, tokenizer, steps: int) -> MobileMoEForCausalLM:
    """Trains a few steps on the source of argparse, with batches of 8 windows of 64 tokens."""
    tokens = torch.tensor(tokenizer(inspect.getsource(argparse)).input_ids)
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (8,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def trained_model(tiny_config: MobileMoEConfig, tokenizer) -> MobileMoEForCausalLM:
    """Do not modify it; use a copy."""
    config = copy.deepcopy(tiny_config)
    config.bos_token_id, config.eos_token_id = 496, [497, 504]
    return train_on_source(build_tiny_model(config), tokenizer, steps=100)


def save_with_tokenizer(model: MobileMoEForCausalLM, tokenizer, path: Path) -> Path:
    model.save_pretrained(path)
    chat_tokenizer = copy.deepcopy(tokenizer)
    chat_tokenizer.chat_template = CHAT_TEMPLATE
    chat_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_checkpoint(trained_model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed INT4 checkpoint in the released layout, with tokenizer and chat template."""
    path = tmp_path_factory.mktemp("checkpoints") / "text"
    return save_with_tokenizer(quantize(copy.deepcopy(trained_model)), tokenizer, path)


@pytest.fixture(scope="session")
def qat_checkpoint(trained_model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed INT4 checkpoint trained with QAT, with groups of expert weights along the input."""
    model = prepare(copy.deepcopy(trained_model), Int4Format("input"))
    path = tmp_path_factory.mktemp("checkpoints") / "qat"
    return save_with_tokenizer(convert(train_on_source(model, tokenizer, steps=30)), tokenizer, path)


@pytest.fixture(scope="session")
def float_text_checkpoint(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_checkpoint` in full precision."""
    path = tmp_path_factory.mktemp("checkpoints") / "float"
    dequantize(AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32)).save_pretrained(path)
    AutoTokenizer.from_pretrained(text_checkpoint).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pte_directory(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with the stock operator: experts requantised to INT8 groups along the input; context 64."""
    output = tmp_path_factory.mktemp("export") / "pte"
    options = ["--max-seq-len", "64", "--moe-op", "llama"]
    main(["export", "--model", str(text_checkpoint), "--output", str(output), *options])
    return output


@pytest.fixture(scope="session")
def kernel_pte(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with our operators; context 64."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    output = tmp_path_factory.mktemp("kernel") / "pte"
    options = ["--max-seq-len", "64", "--moe-op", "mobilemoe"]
    main(["export", "--model", str(text_checkpoint), "--output", str(output), *options])
    return output


@pytest.fixture(scope="session")
def chat_pte(text_checkpoint: Path, kernel_pte: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `kernel_pte`, with a context of 256, which holds a conversation."""
    output = tmp_path_factory.mktemp("chat") / "pte"
    main(["export", "--model", str(text_checkpoint), "--output", str(output), "--moe-op", "mobilemoe"])
    return output


@pytest.fixture(scope="session")
def arm_bundle() -> Path:
    """Our runner for Arm, with the libraries that it needs."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs g++-aarch64-linux-gnu")
    try:
        return build_bundle()
    except ValueError as error:
        if "was not downloaded" in str(error):
            pytest.skip("executorch's wheel for Arm could not be downloaded")
        raise


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs Arm programs, with an empty directory as the root of the system that they expect."""
    command = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if command is None:
        pytest.skip("needs qemu-user")
    return [command, "-L", str(tmp_path_factory.mktemp("root"))]


@pytest.fixture(scope="session")
def arm_runner(arm_bundle: Path, emulator: list[str]) -> list[str]:
    """The command that runs our runner for Arm in QEMU."""
    return [*emulator, *runner_command(str(arm_bundle))]


@pytest.fixture
def stub_bundle(tmp_path: Path, monkeypatch) -> Path:
    """A bundle for the processor of this machine: a script in place of the loader, and our runner."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    bundle = tmp_path / "stub-bundle"
    bundle.mkdir()
    shutil.copy2(build_runner(), bundle / RUNNER)
    (bundle / LOADER).write_text('#!/bin/sh\n[ "$1" = --library-path ] && shift 2 && chmod 755 "$1" && exec "$@"\n')
    monkeypatch.setattr("mobilemoe.device.runner.build_bundle", lambda: bundle)
    return bundle


@pytest.fixture(scope="module")
def adb_server(tmp_path_factory):
    """An adb server of its own, which knows no devices."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb (Debian: apt install adb)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        # The kernels' builds stay in the real cache. Read before HOME changes.
        patch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser()))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True)


@pytest.fixture
def phone(adb_server, tmp_path):
    device = Device(tmp_path / "device")
    device.script(
        "getprop",
        "cat <<END\n[ro.product.manufacturer]: [Test]\n[ro.product.model]: [Phone 1]\n[ro.soc.manufacturer]: [QTI]\n"
        "[ro.soc.model]: [SM8750]\n[ro.product.cpu.abi]: [arm64-v8a]\n[ro.build.version.release]: [15]\nEND",
    )
    device.script(
        "dumpsys",
        'case $1 in battery) printf "Current Battery Service state:\\n  level: 83\\n  temperature: 312\\n" ;;\n'
        'thermalservice) echo "Thermal Status: 0" ;; esac',
    )
    for core in range(2):
        device.write(f"/sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq", "4320000\n")
        device.write(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", "1000000\n")
    device.script("uname", "echo aarch64")
    device.write("/proc/meminfo", "MemTotal:       11534336 kB\n")
    yield connect(device)
    subprocess.run(["adb", "disconnect"], capture_output=True)
    device.close()


@pytest.fixture(scope="module")
def workspace(tokenizer, tmp_path_factory):
    """A small copy of the repository root with the demo's data, one per test module."""
    root = tmp_path_factory.mktemp("workspace")
    data = root / "out/demo/data"
    data.mkdir(parents=True)
    config = json.loads((ROOT / "recipes/tiny/config.json").read_text()) | {
        "vocab_size": len(tokenizer),
        "bos_token_id": 496,
        "eos_token_id": [497, 504],
        "num_hidden_layers": 2,
    }
    shutil.copytree(ROOT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("mobilemoe-*", "__pycache__"))
    (root / "recipes/tiny/config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(root / "out/demo/tokenizer")
    texts = [f"def function_{i}(value):\n    return value + {i}\n" * 20 for i in range(40)]
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"What does function_{i} add?"}],
            "completion": [{"role": "assistant", "content": f"It adds {i} to the value."}],
        }
        for i in range(40)
    ]
    for name in ("code", "docstrings"):
        (data / f"{name}.train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (data / "chat.train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return root


@pytest.fixture
def wide_model():
    """Creates random packed FP32 models with the width of S, fewer layers and a small vocabulary."""

    def make(num_layers: int) -> torch.nn.Module:
        model = random_packed_model(MobileMoEConfig(num_hidden_layers=num_layers, vocab_size=1024))
        generator = torch.Generator().manual_seed(1)
        for layer in model.model.layers:
            # Not zero, or leaving it out would not be detected.
            layer.feed_forward.expert_bias.uniform_(-0.3, 0.3, generator=generator)
        # Packed models reject `.float()`; packed tensors keep their dtype anyway.
        return torch.nn.Module.float(model)

    return make
