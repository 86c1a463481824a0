"""
Compares llama.cpp with our `.pte` programs, interleaved: same shapes, random 4-bit weights, same tokens.

    pip install gguf && pip install --no-binary :all: llama-cpp-python
    python benchmarks/bench_llama_cpp.py [--shapes S MobileLLM-Pro] [--json FILE] [--picture FILE]

llama.cpp has no MobileMoE. The closest architecture is `bailingmoe2`: routed and shared experts, sigmoid scores with a
bias, norms of queries and keys, and matrices of the same sizes. The dense shape uses `llama`. Weights are Q4_0, with
an FP16 scale per 32 weights like ours. The head is a separate tensor of the size of the embedding. All other settings
are the defaults of each runtime. One JSON line last.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from mobilemoe.bench.host import model_files, run_benchmark, worker_command
from mobilemoe.bench.report import draw, tables
from mobilemoe.display import show
from mobilemoe.export.gguf import add_experts, add_sizes
from mobilemoe.export.random_program import write_random_program
from mobilemoe.shapes import program_config, shapes
from modeling_mobilemoe import MobileMoEConfig


CONTEXT = 2048


def write_gguf(name: str, path: Path) -> None:
    """Writes a shape with random weights as a GGUF file."""
    from gguf import GGMLQuantizationType, GGUFWriter

    shape = shapes()[name]
    is_moe = isinstance(shape, MobileMoEConfig)
    config = program_config(shape)
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "bailingmoe2" if is_moe else "llama", use_temp_file=True)
    add_sizes(writer, config)
    if is_moe:
        add_experts(writer, config)
    writer.add_context_length(CONTEXT)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("no_vocab")

    def add_packed(tensor: str, *size: int) -> None:
        blocks = generator.integers(0, 256, (*size[:-1], size[-1] // 32, 18), dtype=np.uint8)
        scales = generator.uniform(0.003, 0.006, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., :2] = scales.view(np.uint8)
        writer.add_tensor(tensor, blocks.reshape(*size[:-1], -1), raw_dtype=GGMLQuantizationType.Q4_0)

    def add_ones(tensor: str, size: int) -> None:
        writer.add_tensor(tensor, np.ones(size, np.float32))

    add_packed("token_embd.weight", config.vocab_size, hidden)
    add_packed("output.weight", config.vocab_size, hidden)
    add_ones("output_norm.weight", hidden)
    for i in range(config.num_hidden_layers):
        layer = f"blk.{i}."
        add_ones(layer + "attn_norm.weight", hidden)
        add_ones(layer + "ffn_norm.weight", hidden)
        add_packed(layer + "attn_output.weight", hidden, query)
        if not is_moe:
            for part, rows in (("q", query), ("k", key), ("v", key)):
                add_packed(f"{layer}attn_{part}.weight", rows, hidden)
            for part in ("gate", "up"):
                add_packed(f"{layer}ffn_{part}.weight", config.intermediate_size_mlp, hidden)
            add_packed(layer + "ffn_down.weight", hidden, config.intermediate_size_mlp)
            continue
        add_packed(layer + "attn_qkv.weight", query + 2 * key, hidden)
        add_ones(layer + "attn_q_norm.weight", config.head_dim)
        add_ones(layer + "attn_k_norm.weight", config.head_dim)
        router = generator.normal(0, 0.02, (config.num_local_experts, hidden)).astype(np.float32)
        writer.add_tensor(layer + "ffn_gate_inp.weight", router)
        writer.add_tensor(layer + "exp_probs_b.bias", np.zeros(config.num_local_experts, np.float32))
        experts, width = config.num_local_experts, config.intermediate_size
        for part in ("gate", "up"):
            add_packed(f"{layer}ffn_{part}_exps.weight", experts, width, hidden)
            add_packed(f"{layer}ffn_{part}_shexp.weight", config.intermediate_size_mlp, hidden)
        add_packed(layer + "ffn_down_exps.weight", experts, hidden, width)
        add_packed(layer + "ffn_down_shexp.weight", hidden, config.intermediate_size_mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp with one sequence: takes token ids, returns the most probable next token."""

    def __init__(self, path: str, num_threads: int):
        import llama_cpp

        self.library = llama_cpp
        # Keep a reference, or the callback would be garbage-collected while the library uses it.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, CONTEXT, 512
        options.n_threads = options.n_threads_batch = num_threads
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, tokens: list[int], start: int) -> int:
        if start == 0:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        # The batch points to the array: keep a reference to it.
        array = (self.library.llama_token * len(tokens))(*tokens)
        batch = self.library.llama_batch_get_one(array, len(tokens))
        if self.library.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp failed to decode the tokens.")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def serve(path: str, num_threads: int) -> None:
    """Implements the protocol of mobilemoe/bench/worker.py."""
    from mobilemoe.bench.worker import random_tokens
    from mobilemoe.machine import peak_memory

    started = time.perf_counter()
    model = LlamaCpp(path, num_threads)
    answer = {"load": time.perf_counter() - started, "context": CONTEXT, "runtime": "llama.cpp"}
    print(json.dumps(answer | {"weight_bytes_per_token": None, "kv_bits": 16, "config": {}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        length = request["prompt_length"]
        tokens = random_tokens(model.vocab_size, length + request["new_tokens"], request["seed"])
        times = []
        for begin, end in [(0, length)] + [(i, i + 1) for i in range(length, len(tokens))]:
            started = time.perf_counter()
            model.forward(tokens[begin:end], begin)
            times.append(time.perf_counter() - started)
        answer = {"first_token": times[0], "decode": times[1:], "peak_memory_bytes": peak_memory()}
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--shapes", nargs="+", default=["S", "MobileLLM-Pro"], choices=shapes())
    parser.add_argument("--prompt-lengths", nargs="+", type=int, default=[16, 512])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--directory", type=Path, default=Path("out/bench-llama-cpp"), help="directory of the models, which are kept"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--picture", type=Path, help="plot the speeds to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.threads)
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    commands, files = {}, {}
    for name in arguments.shapes:
        program, gguf = arguments.directory / name, arguments.directory / f"{name}.gguf"
        if not program.exists():
            write_random_program(shapes()[name], program, CONTEXT)
        if not gguf.exists():
            write_gguf(name, gguf)
        commands[name], files[name] = worker_command(program, arguments.threads), model_files(program)
        theirs = f"{name}, llama.cpp"
        commands[theirs] = [sys.executable, __file__, "--worker", str(gguf), "--threads", str(arguments.threads)]
        files[theirs] = [gguf]
    result = run_benchmark(
        commands, files, arguments.prompt_lengths, arguments.new_tokens, arguments.repeats, arguments.threads
    )
    show(*tables(result))
    for name in arguments.shapes:
        for length in arguments.prompt_lengths:
            ours, theirs = (result.models[key].lengths[str(length)] for key in (name, f"{name}, llama.cpp"))
            ratios = {
                "prefill": ours.prefill_tokens_per_s.median / theirs.prefill_tokens_per_s.median,
                "decode": ours.decode_tokens_per_s.median / theirs.decode_tokens_per_s.median,
            }
            print(f"{name}, prompt of {length}: " + ", ".join(f"{key} {ratio:.2f} x" for key, ratio in ratios.items()))
    result.benchmark, result.command = "llama.cpp", shlex.join(["python", *sys.argv])
    if arguments.json:
        result.save(arguments.json)
    if arguments.picture:
        draw(result, arguments.picture)
    print(json.dumps(result.as_dict()))


if __name__ == "__main__":
    main()
