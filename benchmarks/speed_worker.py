"""
Runs one model in a process of its own: python benchmarks/speed_worker.py MODEL --threads N --context N

MODEL is a directory with `model.pte`, or a GGUF file for llama.cpp. The same loop times both. Requests are JSON lines
on standard input, `{"tokens": [1, 2], "start": 0, "one_by_one": false}`. Answers are JSON lines on standard output:
first the load time, then for every request the seconds of each call, the most probable token after it, and the largest
memory of this process so far. A process with llama.cpp imports neither PyTorch nor this package's runtime.
"""

import argparse
import json
import os
import sys
import time

import numpy as np

from mobilemoe.machine import peak_memory


class LlamaCpp:
    """A GGUF file in llama.cpp with one sequence and its default settings, among them a key-value cache in FP16."""

    def __init__(self, path: str, num_threads: int, context: int):
        import llama_cpp

        self.library = llama_cpp
        # Keep a reference, or the callback would be garbage-collected while the library uses it.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        # It takes a prompt in one call, and computes 512 tokens of it at a time, as by default.
        options.n_ctx = options.n_batch = context
        options.n_threads = options.n_threads_batch = num_threads
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(
                f"llama.cpp {llama_cpp.__version__} does not load {path}. Install a llama-cpp-python that knows "
                "exaone-moe, or delete the file if it is truncated."
            )
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, tokens: list[int], start: int) -> int:
        """Runs tokens at positions from `start` on, forgets later ones, and returns the most probable next token."""
        memory = self.library.llama_get_memory(self.context)
        if not self.library.llama_memory_seq_rm(memory, 0, start, -1):
            raise ValueError(f"llama.cpp cannot remove the positions from {start} on from its cache.")
        # The batch points to the array: keep a reference to it.
        array = (self.library.llama_token * len(tokens))(*tokens)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))) != 0:
            raise ValueError(f"llama.cpp failed to run {len(tokens)} tokens at position {start}.")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class Pte:
    """A program in ExecuTorch from Python."""

    def __init__(self, path: str, num_threads: int):
        from mobilemoe.bench.worker import set_threads
        from mobilemoe.generation import most_probable
        from mobilemoe.runtime import PteModel

        set_threads(num_threads, executorch=True)
        self.model, self.most_probable = PteModel(path), most_probable

    def forward(self, tokens: list[int], start: int) -> int:
        return self.most_probable(self.model.forward(tokens, start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    arguments = parser.parse_args()
    # Libraries print to stdout: redirect it to stderr and keep the original stream for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        started = time.perf_counter()
        if arguments.model.endswith(".gguf"):
            model = LlamaCpp(arguments.model, arguments.threads, arguments.context)
        else:
            model = Pte(arguments.model, arguments.threads)
        print(json.dumps({"load": time.perf_counter() - started}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            tokens, start = request["tokens"], request["start"]
            calls = [(tokens, start)]
            if request["one_by_one"]:
                calls = [([token], start + i) for i, token in enumerate(tokens)]
            seconds, predicted = [], []
            for call in calls:
                started = time.perf_counter()
                predicted.append(model.forward(*call))
                seconds.append(time.perf_counter() - started)
            answer = {"seconds": seconds, "predicted": predicted, "peak_memory_bytes": peak_memory()}
            print(json.dumps(answer), file=answers)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(json.dumps({"error": f"{arguments.model}: {error}"}), file=answers)


if __name__ == "__main__":
    main()
