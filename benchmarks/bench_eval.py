"""
Requests per second of `mobilemoe eval` and of lm-eval's Hugging Face back-end on the same requests, interleaved.

    python benchmarks/bench_eval.py [--model DIR] [--repeats 5]

Without a model it uses random weights, with the width of S and two layers. The requests have the shapes of three
tasks: four choices of several tokens after a short context (HellaSwag), four letters after five shared examples
(MMLU), and four choices after examples that are not shared (ARC-C). The Hugging Face back-end runs with every batch
size of `--batch-sizes`, which may include `auto`; ours chooses its batches itself. Prints the largest difference of
the answers. One JSON line last.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mobilemoe.display import show, table, with_spread
from mobilemoe.eval.models import CheckpointLM
from mobilemoe.runtime import CheckpointModel
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


# The data and the tokenizer of the demo.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from stdlib_data import standard_library_files  # noqa: E402
from toy_tokenizer import train_tokenizer  # noqa: E402


VOCAB_SIZE = 8192


def text(generator: random.Random, words: list[str], length: int) -> str:
    return " ".join(generator.choices(words, k=length))


def requests(words: list[str], num_documents: int) -> dict[str, list[Instance]]:
    generator = random.Random(0)
    shared = text(generator, words, 250)
    tasks = {"short context": [], "shared examples": [], "own examples": []}
    for number in range(num_documents):
        choices = [" " + text(generator, words, generator.randint(4, 12)) for _ in range(4)]
        prompts = {
            "short context": (text(generator, words, generator.randint(15, 50)), choices),
            "shared examples": (
                f"{shared}\n\n{text(generator, words, generator.randint(15, 50))}",
                [" A", " B", " C", " D"],
            ),
            "own examples": (text(generator, words, 300), choices),
        }
        for task, (prompt, answers) in prompts.items():
            tasks[task] += [
                Instance("loglikelihood", {}, (prompt, answer), index, (task, number, 1))
                for index, answer in enumerate(answers)
            ]
    return tasks


def random_model(path: Path) -> Path:
    sources = [source for _, source in standard_library_files()][:200]
    torch.manual_seed(0)
    config = MobileMoEConfig(num_hidden_layers=2, vocab_size=VOCAB_SIZE, bos_token_id=VOCAB_SIZE - 16)
    MobileMoEForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    train_tokenizer(iter(sources), VOCAB_SIZE).save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--documents", type=int, default=16, help="questions per task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "32"])
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    words = [word for word in random.__doc__.split() if word.isalpha()]
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = CheckpointModel(arguments.model or random_model(Path(temporary) / "model"))
    if torch.cuda.is_available():
        checkpoint.model.cuda()
    plain = {
        f"hf, batch size {size}": HFLM(
            pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=size, softmax_dtype="float32"
        )
        for size in arguments.batch_sizes
    }
    models = {"mobilemoe": CheckpointLM(checkpoint)} | plain
    result = {"processor_threads": torch.get_num_threads(), "tasks": {}}
    for task, instances in requests(words, arguments.documents).items():
        seconds, answers = {name: [] for name in models}, {}
        # The first round warms up.
        for repeat in range(arguments.repeats + 1):
            for name, model in models.items():
                started = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    answers[name] = model.loglikelihood(instances, disable_tqdm=True)
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
        rates = {name: len(instances) / statistics.median(values) for name, values in seconds.items()}
        worst = max(
            abs(ours[0] - theirs[0])
            for name in plain
            for ours, theirs in zip(answers["mobilemoe"], answers[name], strict=True)
        )
        spread = {
            name: [len(instances) / max(values), len(instances) / min(values)] for name, values in seconds.items()
        }
        result["tasks"][task] = {"requests_per_s": rates, "range": spread, "largest_difference": worst}
        title = f"{task}: {len(instances)} requests; largest difference of a log-likelihood {worst:.3f}"
        rows = [
            (name, with_spread(rate, low, high))
            for (name, rate), (low, high) in zip(rates.items(), spread.values(), strict=True)
        ]
        show(table(("model", "requests/s, median (range)"), rows, title))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
