"""
Kills training stages, a save, a quantisation and exports at random moments, and runs them again until they end.

    PYTHONPATH=. python tests/kill_moments.py DIRECTORY [--kills 200] [--seed 0] [--jobs pretrain ...]

What comes out is compared with an undisturbed run: losses, and every file bit for bit. Prints a table, and one JSON
line last. What differed is kept in DIRECTORY/different.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[1]
# One thread: sums in one order, and forked children have no threads of their parent.
os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DEACTIVATE_ASYNC_LOAD="1"
)
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]

STAGES = ("pretrain", "midtrain", "sft", "qat")
SETTINGS = {"max_length": 64, "max_steps": 10, "per_device_train_batch_size": 2, "warmup_steps": 0}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
# They hold clock times; what else is in them is compared by `losses`.
CLOCKS = ("trainer_state.json", "training_args.bin")
# Keys of a log that are clock times.
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def make_inputs(root: Path) -> None:
    """Tokenizer, data and configuration of the first stage."""
    import inspect

    from toy_tokenizer import train_tokenizer

    from modeling_mobilemoe import MobileMoEConfig

    train_tokenizer((inspect.getsource(module) for module in (argparse, inspect)), 512).save_pretrained(
        root / "tokenizer"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    sizes |= {"vocab_size": 512, "num_experts_per_tok": 2, "max_position_embeddings": 256}
    MobileMoEConfig(**sizes, bos_token_id=496, eos_token_id=[497, 504]).save_pretrained(root / "model")
    rows = {
        "code": [{"text": f"def f_{i}(value):\n    return value + {i}\n" * 2} for i in range(300)],
        "chat": [{"prompt": f"What is {i} plus 1?", "completion": f"It is {i + 1}."} for i in range(150)],
    }
    for name, examples in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    # Each stage trains what the stage before left.
    before, data = root / "model", "code"
    for stage in STAGES:
        data = "chat" if stage in ("sft", "qat") else "code"
        recipe = yaml.safe_load((ROOT / f"recipes/tiny/{stage}.yaml").read_text()) | SETTINGS
        recipe |= {"model": str(before), "tokenizer": str(root / "tokenizer")}
        recipe["data"] = [{"path": "json", "data_files": str(root / f"{data}.jsonl"), "streaming": data == "code"}]
        (root / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        before = root / "expected" / stage


def train(stage: str, root: Path, output: Path) -> None:
    """As the recipe's script, which resumes where it can."""
    from mobilemoe.train import stages
    from mobilemoe.train.checkpoints import last_checkpoint
    from mobilemoe.train.recipe import run

    script = "pretrain" if stage == "midtrain" else stage
    function = {"pretrain": stages.pretrain, "sft": stages.fine_tune, "qat": stages.quantize_aware}[script]
    arguments = ["--config", str(root / f"{stage}.yaml"), "--output_dir", str(output)]
    if last_checkpoint(str(output)) is not None:
        arguments += ["--resume_from_checkpoint", "true"]
    sys.argv = [script, *arguments]
    run(function, str(ROOT / f"recipes/{script}.py"))


def save(root: Path, output: Path) -> None:
    """In shards, over the model of another stage."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(root / "expected/midtrain").save_pretrained(output, max_shard_size="100KB")


def quantise(root: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling_mobilemoe import quantize

    quantize(AutoModelForCausalLM.from_pretrained(root / "expected/sft")).save_pretrained(output)
    AutoTokenizer.from_pretrained(root / "expected/sft").save_pretrained(output)


def export(runtime: str, root: Path, output: Path) -> None:
    """Exports refuse to replace one another, so one that is there is whole."""
    import importlib

    if output.exists():
        return
    name, function = ("exporter", "export_checkpoint") if runtime == "pte" else (runtime, f"export_{runtime}")
    module = importlib.import_module(f"mobilemoe.export.{name}")
    vars(module)[function](root / "expected/qat", output)


def losses(output: Path) -> list[dict]:
    """What was logged, and the place in the data at every checkpoint."""
    found = []
    for file in sorted(output.rglob("trainer_state.json")):
        state = json.loads(file.read_text())
        history = [{key: value for key, value in row.items() if key not in TIMES} for row in state["log_history"]]
        found.append({"file": str(file.relative_to(output)), "history": history})
        found[-1]["callbacks"] = state["stateful_callbacks"].get("MixtureCallback")
    return found


def outcome(output: Path) -> dict[str, str]:
    """Every file that a directory holds, hidden ones too, by its hash."""
    from crash_worker import digest

    from mobilemoe.artifacts import file_sha256

    found = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(file.relative_to(output))
        if file.name == "export.json":
            report = json.loads(file.read_text())
            report = {key: value for key, value in report.items() if key not in ("seconds", "peak_memory_bytes")}
            found[name] = digest(json.dumps(report).encode())
        else:
            found[name] = "" if file.name in CLOCKS else file_sha256(file)
    return found | {"losses": json.dumps(losses(output))}


class Child:
    """
    A forked process that runs a function.

    Args:
        function (`Callable`): what it runs.
        log (`Path`): what it prints.
    """

    def __init__(self, function: Callable[[], object], log: Path):
        self.function, self.log = function, log
        self.process = os.fork()
        if self.process == 0:
            status = 1
            try:
                with open(log, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    function()
                    status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def kill_after(self, seconds: float) -> bool:
        """Whether it still ran then."""
        time.sleep(seconds)
        os.kill(self.process, signal.SIGKILL)
        status = self._end()
        if status > 0:
            raise RuntimeError(f"exit status {status}: {self.log.read_text()[-2000:]}")
        return status == -signal.SIGKILL

    def _end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def finish(self) -> None:
        if status := self._end():
            raise RuntimeError(f"exit status {status}: {self.log.read_text()[-2000:]}")


# With their shares of the kills.
JOBS: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    **{stage: (partial(train, stage), 3) for stage in STAGES},
    "save": (save, 2),
    "quantise": (quantise, 2),
    **{f"export {runtime}": (partial(export, runtime), 1) for runtime in ("gguf", "mlx", "glm4_moe", "pte")},
}


def run_job(name: str, root: Path, num_kills: int, generator: random.Random) -> dict:
    """Kills one job so often, in as many runs as that takes, and compares each run once it has ended."""
    function, expected = JOBS[name][0], root / "expected" / name.replace("export ", "")
    log = root / "log"

    def begin(output: Path) -> Path:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir(parents=True)
        if name == "save":
            shutil.copytree(root / "expected/pretrain", output)
        return output

    if name == "save":
        shutil.copytree(root / "expected/pretrain", expected)
    started = time.monotonic()
    Child(lambda: function(root, expected), log).finish()
    duration, wanted = time.monotonic() - started, outcome(expected)
    result = {"job": name, "seconds": round(duration, 1), "kills": 0, "runs": 0, "problems": []}
    output = root / "killed" / expected.name
    while result["kills"] < num_kills:
        begin(output)
        moments = []
        # Half of the runs that were killed are killed again.
        while result["kills"] + len(moments) < num_kills and (not moments or generator.random() < 0.5):
            moment = generator.uniform(0, duration)
            if not Child(lambda: function(root, output), log).kill_after(moment):
                break
            moments.append(round(moment, 3))
        result["kills"] += len(moments)
        try:
            Child(lambda: function(root, output), log).finish()
        except RuntimeError as error:
            result["problems"].append({"moments": moments, "error": str(error)})
            continue
        found = outcome(output)
        result["runs"] += 1
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        different += [str(path) for path in output.parent.iterdir() if path != output]
        if different:
            kept = root / "different" / f"{expected.name}-{len(result['problems'])}"
            shutil.copytree(output, kept)
            result["problems"].append({"moments": moments, "different": different, "kept": str(kept)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", nargs="+", default=list(JOBS), choices=JOBS, help="in order: each needs those before"
    )
    arguments = parser.parse_args()
    root = arguments.directory.absolute()
    temporary = root / "tmp"
    temporary.mkdir(parents=True)
    os.environ.update(HF_HOME=str(root / "hf"), TMPDIR=str(temporary))
    import torch

    torch.set_num_threads(1)
    # Imported once, for all children.
    import trl  # noqa: F401

    import mobilemoe.train.stages  # noqa: F401

    Child(lambda: make_inputs(root), root / "log").finish()
    results, left, shares = [], arguments.kills, sum(JOBS[name][1] for name in arguments.jobs)
    for name in arguments.jobs:
        weight = JOBS[name][1]
        share = left * weight // shares
        left, shares = left - share, shares - weight
        result = run_job(name, root, share, random.Random(f"{arguments.seed} {name}"))
        results.append(result)
        line = "{job:16} undisturbed {seconds:6} s, killed {kills:3} times in {runs:3} runs".format(**result)
        print(f"{line}, {len(result['problems'])} problems", flush=True)
        for problem in result["problems"]:
            print(f"    {problem}", flush=True)
    with suppress(FileNotFoundError):
        print(f"temporary files left: {sorted(path.name for path in temporary.iterdir())[:20]}")
    kills = sum(result["kills"] for result in results)
    problems = [problem for result in results for problem in result["problems"]]
    print(json.dumps({"kills": kills, "runs": sum(result["runs"] for result in results), "problems": problems}))


if __name__ == "__main__":
    main()
