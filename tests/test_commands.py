"""
Every command of the documentation runs, on the tiny model.

Read are the documents of `DOCUMENTS`: each line of a ```bash block, each line behind `$ ` in another block, each line
of an indented block and each `code` in running text or a table that begins with one of `PROGRAMS`, and each ```python
block. Commands that are the same once `PLACES` has been put in are one.

To add a command to a document, write it and run this file: a command without a rule fails with its text. Then add the
rule, first match wins:

    Rule(r"mobilemoe plan .*")                                        runs as it stands
    Rule(r"python recipes/sft\\.py .*", append="--max_steps 2")       with more options behind it: the last one wins
    Rule(r"mobilemoe export .*", without="out/pte", writes="out/pte/model.pte")
    Rule(r"mobilemoe bench .*", replace={"--model S": "--model out/demo/4-qat"})
    Rule(r"hf auth login", skip="needs an account of the Hub")

A command runs in a copy of its own of `site`, which looks like a clone of the repository after `make demo`, with
recipes and data cut down. `without` are paths there that the command is to make, `writes` what it has to leave. A
Python block is matched by any part of it. `fast` ones run without `-m slow`, Python and `mobilemoe` within this
process. One with an `error` has to end in it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import ROOT
from eval_stand_ins import write_stand_ins
from hub_server import HubServer
from markdown_it import MarkdownIt
from stand_ins import bench_result, localize

from modeling_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.cli import main


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*.md")),
    ROOT / "modeling_mobilemoe/kernels/README.md",
]
PROGRAMS = "python mobilemoe make accelerate optimum-cli pip hf source cmake ruff adb git pytest".split()
# What stands in `site` for what a document names.
PLACES = {
    r"mobilemoe-[ml]\b": "mobilemoe-s",
    r"facebook/MobileMoE-[SML]-Base": "out/demo/2-midtrain",
    r"facebook/MobileMoE-[SML]-SFT": "out/demo/3-sft",
    r"facebook/MobileMoE-[SML]-QAT": "out/demo/4-qat",
}
FEW_STEPS = "--max_steps 2 --logging_steps 1"
# Of the recipes of S, M and L, whose sequences and batches are for 8 GPUs.
ONE_PROCESS = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
ON_A_CPU = (
    f"{FEW_STEPS} --max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --use_cpu true "
    "--bf16 false --torch_compile false --num_data_readers 2 --save_strategy no"
)
SMALL_MODELS = {"--model S MobileLLM-Pro": "--model out/demo/4-qat out/demo/3-sft"}
FEW_TOKENS = "--prompt-lengths 8 16 --new-tokens 2 --repeats 1 --threads 1"


@dataclass(frozen=True)
class Rule:
    pattern: str
    replace: dict[str, str] = field(default_factory=dict)
    append: str = ""
    without: str = ""
    writes: str = ""
    fast: bool = False
    error: str = ""
    skip: str = ""


RULES = [
    Rule(
        r"mobilemoe plan .*--tokens-per-second 5000 .*",
        fast=True,
        error="is above what Galaxy S25, 4 threads can read",
    ),
    Rule(r"mobilemoe plan .*", fast=True),
    Rule(r"mobilemoe run --model out/\S+/pte .*|mobilemoe run --model out/pte .*", append="--max-new-tokens 8"),
    Rule(r"mobilemoe run .*", append="--max-new-tokens 8", fast=True),
    Rule(
        r"mobilemoe export .*--output out/pte",
        append="--max-seq-len 64",
        without="out/pte",
        writes="out/pte/model.pte out/pte/tokenizer.json out/pte/export.json",
    ),
    Rule(
        r"mobilemoe export .*--output out/mobilemoe-s/pte",
        append="--max-seq-len 64",
        without="out/mobilemoe-s/pte",
        writes="out/mobilemoe-s/pte/model.pte",
    ),
    Rule(
        r"optimum-cli export executorch --model .*--output_dir out/pte-optimum",
        append="--max_seq_len 64",
        writes="out/pte-optimum/model.pte",
    ),
    Rule(
        r"mobilemoe bench --device adb.*",
        skip="needs a phone; test_bench_phone.py runs it against a device on loopback",
    ),
    Rule(r"mobilemoe bench .*--json .*", replace=SMALL_MODELS, append=FEW_TOKENS, writes="**/*bench.json"),
    Rule(r"mobilemoe bench .*", replace=SMALL_MODELS, append=FEW_TOKENS),
    Rule(
        r"mobilemoe eval prepare .*",
        skip="needs the network: its commits are the Hub's. test_evaluation.py runs it against a Hub in memory",
    ),
    Rule(r"mobilemoe eval compare .*", writes="out/eval/comparison.json out/eval/comparison.png", fast=True),
    Rule(r"mobilemoe eval check .*", replace={"FILE": "heldout.py"}, append="--max-tokens 64", fast=True),
    # The contexts of the tiny models hold these.
    Rule(r"mobilemoe eval --model out/\S*pte\S* .*", append="--tasks winogrande --limit 2"),
    Rule(r"mobilemoe eval --model .*", append="--tasks piqa winogrande --limit 2", fast=True),
    Rule(r"mobilemoe card .*--output out/demo/4-qat/README.md", writes="out/demo/4-qat/README.md"),
    Rule(
        r"python recipes/\w+\.py --config recipes/tiny/\S+.*", append=FEW_STEPS, writes="out/demo/*/trainer_state.json"
    ),
    Rule(
        r"python recipes/\w+\.py --config recipes/\w+\.yaml .*--lora_budget .*",
        append=f"{ON_A_CPU} --lora_budget 40000",
    ),
    Rule(
        r"python recipes/qat\.py --config recipes/qat\.yaml .*--quantize_from_step .*",
        append=f"{ON_A_CPU} --quantize_from_step 1",
    ),
    Rule(
        r"python recipes/\w+\.py --config recipes/\w+\.yaml .*",
        append=ON_A_CPU,
        writes="out/mobilemoe-s/*/trainer_state.json",
    ),
    Rule(
        # The file for 8 GPUs is read in test_recipe_files.py, and two processes train in test_processes.py.
        r"accelerate launch --config_file recipes/accelerate/fsdp2\.yaml recipes/pretrain\.py .*",
        replace={"--config_file recipes/accelerate/fsdp2.yaml": ONE_PROCESS},
        append=ON_A_CPU,
    ),
    Rule(
        # By name, as from an installed wheel, whose own files are not the clone's.
        r"python -m mobilemoe\.recipes\.sft .*",
        replace={"-m mobilemoe.recipes.sft": "recipes/sft.py"},
        append=ON_A_CPU,
        writes="out/mobilemoe-s/*/trainer_state.json",
    ),
    Rule(r"python examples/bench_load\.py .*", append="--directory out/demo/4-qat"),
    Rule(r"python examples/bench_forward\.py .*", append="--tokens 16 --layers 1 --repeats 3"),
    Rule(
        # It makes a checkpoint of a recipe's shape, and that of the clone is smaller than its tokenizer.
        r"python examples/bench_export\.py .*",
        replace={"--sizes S": "--sizes tiny", "examples/": f"{ROOT}/examples/"},
        append="--exports int4",
    ),
    Rule(
        r"python examples/bench_eval\.py .*",
        append="--model out/demo/2-midtrain --documents 2 --repeats 1 --batch-sizes 4",
    ),
    Rule(r"python examples/bench_law\.py", append="--trials 2 --bootstrap 10"),
    Rule(r"python examples/bench_train\.py --device cuda .*", skip="needs an NVIDIA GPU; the line without is run"),
    Rule(r"python examples/bench_train\.py", append="--layers 1 --length 32 --repeats 3"),
    Rule(r"python examples/bench_qat\.py .*", append="--shape tiny --tokens 64 --repeats 3"),
    Rule(r"python examples/balance\.py", append="--steps 12", writes="docs/balance.png"),
    Rule(r"python examples/qat_table\.py .*", append="--rows 2 --seeds 1 --max-steps 2"),
    Rule(
        r"python examples/ablation\.py.*",
        append="--sizes 16x1 --tokens 2048 --seeds 0 --batch 2 --cache out/ablation --output out/ablation/runs.jsonl",
        writes="out/ablation/runs.md",
    ),
    Rule(r"python examples/bench_granularity\.py", append="--tokens 1 --repeats 3"),
    Rule(
        r"python examples/bench_llama_cpp\.py .*",
        skip="needs llama-cpp-python and two large exports; test_examples.py runs it where that is installed",
    ),
    Rule(r"python examples/notebooks\.py", skip="runs five notebooks; test_notebooks.py runs each on the tiny model"),
    Rule(r"python -m modeling_mobilemoe\.kernels( runner)?"),
    Rule(r"make (\w|-)+", replace={"make ": "make --dry-run "}, fast=True),
    Rule(r"python -m pytest \S+", append="--collect-only --quiet"),
    Rule(r"ruff check \. && ruff format \.", append="--check", fast=True),
    Rule(r"source \.venv/bin/activate", skip="enters the environment that the tests run in"),
    Rule(r"adb devices", skip="needs a phone; test_bench_phone.py runs it against a device on loopback"),
    Rule(r"hf auth login", skip="needs an account of the Hub"),
    Rule(r"pip (install|download) .*", skip="needs the package index"),
    Rule(r"python -m zipfile .*", skip="unpacks what the line before it downloads; conftest.py does both"),
    Rule(r"cmake .*build-arm .*", skip="needs the wheel that the line before it unpacks; test_runner.py builds it"),
    Rule(r"cmake .*", skip="needs Android's NDK; test_kernels.py builds the same targets for this machine"),
]
# `code` in running text that names a command and does not call it.
NAMES = r"(mobilemoe|optimum-cli|accelerate)( [a-z]+){0,2}"
LOAD = """
from transformers import AutoModelForCausalLM
import modeling_mobilemoe
model = AutoModelForCausalLM.from_pretrained("out/demo/3-sft")
"""
BLOCKS = [
    Rule(r"quantize\(model\)\n.*push_to_hub", replace={r"\A": f"{LOAD}\n"}),
    Rule(r"model\.generate\(\*\*inputs", fast=True),
    Rule(r"AutoModelForCausalLM\.from_pretrained\(\"out/demo/4-qat\"\)", fast=True),
    Rule(r"PteModel\(\"out/pte\"\)"),
    Rule(r"optimum\.executorch"),
    Rule(r"TextLLMRunner\("),
]  # fmt: skip


def logical_lines(text: str) -> list[str]:
    """Lines without comments, with continued ones joined."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def read_document(text: str) -> tuple[list[str], list[str]]:
    """Commands and Python blocks of a Markdown document."""
    commands, blocks = [], []
    begins = tuple(f"{program} " for program in PROGRAMS)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        language = token.info.strip()
        if token.type == "fence" and language == "python":
            blocks.append(token.content)
        elif token.type == "fence" and language in ("bash", "sh", "console"):
            commands += [line.removeprefix("$ ") for line in logical_lines(token.content)]
        elif token.type == "fence":
            commands += [line.removeprefix("$ ") for line in logical_lines(token.content) if line.startswith("$ ")]
        elif token.type == "code_block":
            commands += [line for line in logical_lines(token.content) if line.startswith(begins)]
        elif token.type == "inline":
            spans = [child.content for child in token.children if child.type == "code_inline"]
            commands += [span for span in spans if span.startswith(begins) and not re.fullmatch(NAMES, span)]
    return commands, blocks


def put_in(text: str, replacements: dict[str, str]) -> str:
    for pattern, replacement in replacements.items():
        text = re.sub(pattern, replacement, text)
    return text


def collect() -> tuple[dict[str, Rule], dict[str, Rule], list[str], set[str]]:
    """Commands and Python blocks to run, each with its rule; those without one; and the patterns that matched."""
    commands, blocks, unknown, used = {}, {}, [], set()
    for document in DOCUMENTS:
        for texts, rules, found, matches in zip(
            read_document(document.read_text()),
            (RULES, BLOCKS),
            (commands, blocks),
            (re.fullmatch, re.search),
            strict=True,
        ):
            for text in texts:
                placed = put_in(text, PLACES)
                rule = next((rule for rule in rules if matches(rule.pattern, placed, re.DOTALL)), None)
                if rule is None:
                    unknown.append(f"{document.relative_to(ROOT)}: {text}")
                    continue
                used.add(rule.pattern)
                placed = put_in(
                    placed, {re.escape(key) if rules is RULES else key: value for key, value in rule.replace.items()}
                )
                found[f"{placed} {rule.append}".strip()] = rule
    return commands, blocks, unknown, used


COMMANDS, PYTHON, UNKNOWN, USED = collect()


def parameters(found: dict[str, Rule], name: str) -> list:
    return [
        pytest.param(text, rule, marks=[] if rule.fast or rule.skip else pytest.mark.slow, id=f"{name} {number}")
        for number, (text, rule) in enumerate(found.items())
    ]


@pytest.fixture(scope="module")
def site(workspace, base_checkpoint, float_text_checkpoint, text_checkpoint) -> Path:
    """A clone of the repository after `make demo` and an evaluation, with recipes and data cut down."""
    for name in ("examples", "modeling_mobilemoe", "tests", "docs"):
        shutil.copytree(ROOT / name, workspace / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, workspace)
    stages = {"1-pretrain": base_checkpoint, "2-midtrain": base_checkpoint}
    stages |= {"3-sft": float_text_checkpoint, "4-qat": text_checkpoint, "lora": float_text_checkpoint}
    for stage, checkpoint in stages.items():
        for run in ("demo", "mobilemoe-s"):
            shutil.copytree(checkpoint, workspace / "out" / run / stage)
    data = workspace / "out/demo/data"
    for name in ("code", "docstrings", "chat"):
        shutil.copy(data / f"{name}.train.jsonl", data / f"{name}.heldout.jsonl")
    # The recipes on rows in the schemas of their data sets, with a tiny model for S.
    recipes = workspace / "recipes"
    for size in "sml":
        shutil.copytree(ROOT / f"recipes/mobilemoe-{size}", recipes / f"mobilemoe-{size}")
    shutil.copy(recipes / "tiny/config.json", recipes / "mobilemoe-s")
    rows = workspace / "rows"
    rows.mkdir()
    for path in recipes.glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe["data"] = localize(recipe["data"], rows, 40)
        if "tokenizer" in recipe:
            recipe["tokenizer"] = "out/demo/tokenizer"
        path.write_text(yaml.safe_dump(recipe))
    write_stand_ins(workspace / "data", "foundation")
    bench = bench_result(**{"out/demo/4-qat": MobileMoEConfig.from_pretrained(text_checkpoint)})
    (workspace / "bench.json").write_text(json.dumps(bench))
    (workspace / "heldout.py").write_text((ROOT / "examples/stdlib_data.py").read_text())
    return workspace


@pytest.fixture(scope="module")
def reports(site) -> dict:
    """The report of an evaluation as README runs it, only shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(site / "hf/datasets"))
        patch.chdir(site)
        arguments = ["--tasks", "winogrande", "--limit", "2", "--data-dir", "data", "--output", "out/first"]
        main(["eval", "--model", "out/demo/3-sft", *arguments])
    return json.loads((site / "out/first/report.json").read_text())


@pytest.fixture
def clone(site, reports, tmp_path, monkeypatch, request) -> Path:
    """A copy of `site` that a command may change, as the working directory; for slow commands with programs."""
    rule = request.getfixturevalue("rule")
    if rule.skip:
        pytest.skip(rule.skip)
    clone = shutil.copytree(site, tmp_path / "clone")
    for name in ("bf16", "int4", "pte"):
        report = reports | {"model": reports["model"] | {"name": f"out/{name}"}}
        (clone / "out/eval" / name).mkdir(parents=True)
        (clone / "out/eval" / name / "report.json").write_text(json.dumps(report))
    if not rule.fast:
        pte_directory = request.getfixturevalue("pte_directory")
        for place in ("out/pte", "out/pte-eval", "out/mobilemoe-s/pte"):
            if place not in rule.without:
                shutil.copytree(pte_directory, clone / place)
    monkeypatch.chdir(clone)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(clone / "hf/datasets"))
    return clone


def environment(clone: Path, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HOME": str(clone / "hf"), **more}


def check_run(command: list[str], env: dict[str, str]) -> None:
    result = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]


def test_every_command_has_a_rule():
    assert UNKNOWN == [], "Add a rule for each: see the top of this file"


def test_every_rule_has_a_command():
    assert [rule.pattern for rule in (*RULES, *BLOCKS) if rule.pattern not in USED] == [], "Remove these"


@pytest.mark.parametrize(("command", "rule"), parameters(COMMANDS, "command"))
def test_command(command: str, rule: Rule, clone: Path):
    print(command)
    started = time.time()
    program, *arguments = shlex.split(command)
    if rule.error:
        with pytest.raises(SystemExit, match=rule.error):
            main(arguments)
    elif rule.fast and program == "mobilemoe":
        main(arguments)
    else:
        check_run(["bash", "-ec", command], environment(clone))
    for pattern in rule.writes.split():
        # A copy keeps the time of its original.
        assert any(path.stat().st_mtime >= started for path in clone.glob(pattern)), f"no new {pattern}"


@pytest.mark.parametrize(("block", "rule"), parameters(PYTHON, "block"))
def test_python_block(block: str, rule: Rule, clone: Path):
    print(block)
    if rule.fast:
        exec(compile(block, "block", "exec"), {"__name__": "__main__"})
        return
    with HubServer() as hub:
        # All of it is read when `huggingface_hub` is imported.
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_writer",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        check_run([sys.executable, "-c", block], environment(clone, **settings))
        assert ("push_to_hub" in block) == bool(hub.repositories)


def test_documents_are_read_as_their_readers_read_them():
    text = """
Run `mobilemoe plan --memory-gb 1` or `make demo`, see `mobilemoe plan`.

```bash
python one.py \\
  --two 3   # a comment
# nothing
```

```
$ mobilemoe run --model DIR
its output
mobilemoe is no command here
```

    python -m indented

| a | b |
|---|---|
| in a table | `python recipes/sft.py` |

```python
print("block")
```
"""
    assert read_document(text) == (
        [
            "mobilemoe plan --memory-gb 1",
            "make demo",
            "python one.py --two 3",
            "mobilemoe run --model DIR",
            "python -m indented",
            "python recipes/sft.py",
        ],
        ['print("block")\n'],
    )
