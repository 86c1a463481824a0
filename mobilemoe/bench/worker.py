"""
Measures one model in a separate process, on request: python -m mobilemoe.bench.worker MODEL --threads N

With one process per model, peak memory and load time are those of this model, and models can be interleaved. Requests
are JSON lines on standard input, `{"prompt_length": 128, "new_tokens": 48, "seed": 0, "text": null}`. Answers are JSON
lines on standard output: first the load time, then for every request the seconds of the prompt and of each new token.
A request with `"profile": true` returns the time by operator instead.
"""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from modeling_mobilemoe import kernels
from modeling_mobilemoe.cache_mobilemoe import CACHE_BITS
from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEExperts
from modeling_mobilemoe.packed_mobilemoe import Int4Experts

from ..artifacts import PROGRAM_FILE, is_pte, is_shape, read_export
from ..costs import weight_bytes_read
from ..export.random_program import random_packed_model
from ..generation import LanguageModel, most_probable
from ..machine import peak_memory, without_lines
from ..runtime import CheckpointModel, PteModel
from ..shapes import shapes


class ModelWithoutText(CheckpointModel):
    """A loaded model without a tokenizer."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.max_seq_len = model.config.max_position_embeddings
        self.eos_ids = []
        self._cache = DynamicCache(config=model.config)


def load(name: str) -> tuple[LanguageModel, PretrainedConfig]:
    """Loads a built-in shape or a checkpoint in PyTorch, in BF16, or a directory with `model.pte`."""
    if is_shape(name):
        config = shapes()[name]
        return ModelWithoutText(random_packed_model(config)), config
    if is_pte(name):
        return PteModel(name), AutoConfig.from_pretrained(name)
    if (Path(name) / "tokenizer.json").is_file() or not Path(name).is_dir():
        model = CheckpointModel(name, dtype=torch.bfloat16)
    else:
        model = ModelWithoutText(AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval())
    return model, model.model.config


def weight_bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: all weights except those of unselected experts."""
    total = 0
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        if isinstance(module, (Int4Experts, MobileMoEExperts)):
            size = size * model.config.num_experts_per_tok // module.num_experts
        total += size
    # A tied full-precision head shares the embedding's parameter; count it once.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head._parameters.get("weight") is not None and head.weight is embedding.weight:
        total -= head.weight.numel() * head.weight.element_size()
    return total


def program_bytes_per_token(directory: str, config: MobileMoEConfig) -> int:
    """As [`weight_bytes_per_token`], for a program with packed weights."""
    report = read_export(directory)
    return int(weight_bytes_read(config, expert_bits=report.expert_bits, moe_op=report.moe_op))


def cache_bits(directory: str) -> int:
    """Bits of an entry of a program's key-value cache."""
    return CACHE_BITS[read_export(directory).kv_cache]


def random_tokens(vocab_size: int, count: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def choose_tokens(model: LanguageModel, vocab_size: int, count: int, seed: int, text: str | None) -> list[int]:
    """Random ids, or consecutive tokens of a text at an offset that depends on the seed."""
    if text is None:
        return random_tokens(vocab_size, count, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = model.encode(text)
    if len(tokens) < count:
        raise ValueError(
            f"The prompt file has {len(tokens)} tokens and {count} are needed. Give a longer text, or shorter lengths."
        )
    start = int(torch.randint(len(tokens) - count + 1, (1,), generator=generator))
    return tokens[start : start + count]


def measure(model: LanguageModel, tokens: list[int], prompt_length: int) -> dict:
    """Seconds to the first token, and of every following token. New tokens are given, not sampled."""
    seconds = []
    started = time.perf_counter()
    most_probable(model.forward(tokens[:prompt_length], 0))
    first_token = time.perf_counter() - started
    for position in range(prompt_length, len(tokens)):
        started = time.perf_counter()
        most_probable(model.forward([tokens[position]], position))
        seconds.append(time.perf_counter() - started)
    return {"first_token": first_token, "decode": seconds}


def profile(directory: str, tokens: list[int], prompt_length: int) -> dict[str, dict[str, float]]:
    """
    Milliseconds by operator, summed over the layers, of a prompt and of a decoded token, from ExecuTorch's ETDump.

    Prefill and decode run in separate instances of the program; the first call of each is a warm-up. Decoding starts
    at the prompt's length with an empty cache, which costs the same as a filled one.
    """
    import tempfile

    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    times = {}
    rest = [([token], prompt_length + i) for i, token in enumerate(tokens[prompt_length:])]
    for name, calls in (("prefill", [(tokens[:prompt_length], 0)] * 3), ("decode", rest)):
        program = Runtime.get().load_program(Path(directory, PROGRAM_FILE), enable_etdump=True)
        method = program.load_method("forward")
        for ids, start in calls:
            method.execute((torch.tensor([ids]), torch.tensor([start])))
        with tempfile.TemporaryDirectory() as scratch:
            dump = Path(scratch, "etdump")
            program.write_etdump_result_to_file(str(dump), str(Path(scratch, "debug")))
            blocks = Inspector(etdump_path=str(dump)).event_blocks
        times[name] = {}
        for event in (event for block in blocks if block.name == "Execute" for event in block.events):
            # Every operator call is recorded twice, once as an unnamed OPERATOR_CALL.
            if event.perf_data is not None and event.name != "OPERATOR_CALL":
                operator = event.name.removeprefix("native_call_")
                times[name][operator] = times[name].get(operator, 0.0) + event.perf_data.p50
        times[name] = {key: round(value, 4) for key, value in sorted(times[name].items(), key=lambda item: -item[1])}
    return times


def set_threads(num_threads: int, executorch: bool) -> None:
    torch.set_num_threads(num_threads)
    if executorch:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        # As in `PteModel`.
        with without_lines("cpuinfo_utils"):
            _unsafe_reset_threadpool(num_threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # Libraries print to stdout: redirect it to stderr and keep the original stream for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        executorch = is_pte(arguments.model)
        set_threads(arguments.threads, executorch)
        # Compile the kernels first if needed: that is not part of the load time. If it fails, a program that needs
        # them raises the error below.
        if executorch:
            with suppress(kernels.BuildError):
                kernels.load_executorch()
        else:
            kernels.available()
        started = time.perf_counter()
        model, config = load(arguments.model)
        answer = {
            "load": time.perf_counter() - started,
            "context": model.max_seq_len,
            "runtime": "executorch" if isinstance(model, PteModel) else "pytorch",
            "weight_bytes_per_token": (
                program_bytes_per_token(arguments.model, config)
                if isinstance(model, PteModel)
                else weight_bytes_per_token(model.model)
            ),
            "kv_bits": cache_bits(arguments.model) if isinstance(model, PteModel) else 16,
            "config": json.loads(config.to_json_string()),
        }
        print(json.dumps(answer), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            count = request["prompt_length"] + request["new_tokens"]
            tokens = choose_tokens(model, config.vocab_size, count, request["seed"], request["text"])
            if request.get("profile"):
                print(json.dumps(profile(arguments.model, tokens, request["prompt_length"])), file=answers)
                continue
            answer = measure(model, tokens, request["prompt_length"])
            print(json.dumps(answer | {"peak_memory_bytes": peak_memory()}), file=answers)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(json.dumps({"error": f"{arguments.model}: {error}"}), file=answers)


if __name__ == "__main__":
    main()
