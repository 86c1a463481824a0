"""The recipe files of S, M and L: they parse, say what they claim, and name columns that their data sets have."""

import copy
import itertools
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import load_dataset
from stand_ins import STAND_INS, chat, localize
from transformers import AutoConfig
from trl import SFTConfig

from mobilemoe.train import data
from mobilemoe.train.data import DataSource, Mixture, collate
from mobilemoe.train.recipe import CHAT_TEMPLATE, RecipeArguments, parse_arguments
from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
STAGES = ["pretrain", "midtrain", "sft", "qat"]
SIZES = ["s", "m", "l"]
# Parameters by the published configurations; the literals of test_configuration_mobilemoe.py.
NUM_TOTAL_PARAMETERS = {"s": 1_263_374_256, "m": 2_818_390_552, "l": 5_325_704_320}
# Tokens, sequence length and peak learning rate as the secondary sources give them.
SCHEDULES = {
    "pretrain": (6e12, 2048, 4e-4, "cosine"),
    "midtrain": (500e9, 8192, 4e-5, "linear"),
    "sft": (126e9, 8192, 4e-6, "cosine"),
    "qat": (21e9, 8192, 4e-6, "cosine"),
}
FINE_TUNING_SHARES = {
    "math": 0.304,
    "general chat": 0.254,
    "code": 0.221,
    "safety": 0.094,
    "science and knowledge": 0.077,
    "tool use": 0.039,
    "reasoning": 0.011,
}
# As the secondary sources give them; "science and instructions", for the 16 % that they leave unnamed, is our name.
SHARES = {
    "pretrain": {"web": 0.62, "math": 0.116, "code": 0.10, "knowledge": 0.10, "science": 0.064},
    "midtrain": {"web": 0.09, "knowledge": 0.32, "code": 0.22, "math": 0.21, "science and instructions": 0.16},
    "sft": FINE_TUNING_SHARES,
    "qat": FINE_TUNING_SHARES,
}
KINDS = [{"text"}, {"messages"}, {"prompt", "completion"}]
FILES = [f"{stage}.yaml" for stage in STAGES]
TINY_FILES = [f"tiny/{stage}.yaml" for stage in STAGES]


def read(file: str) -> dict:
    return yaml.safe_load((RECIPES / file).read_text())


def parse(*arguments: str) -> tuple[RecipeArguments, SFTConfig]:
    # BF16 without a GPU needs `use_cpu`, and parsing leaves variables for accelerate in the environment.
    with mock.patch.dict(os.environ):
        return parse_arguments(RECIPES, (RecipeArguments, SFTConfig), [*arguments, "--use_cpu", "true"])


def parse_file(file: str, size: str = "s") -> tuple[RecipeArguments, SFTConfig]:
    """The tiny files name a model and a directory; for the others a command line does."""
    place = [] if file.startswith("tiny") else ["--model", f"mobilemoe-{size}", "--output_dir", "out"]
    return parse("--config", str(RECIPES / file), *place)


def stage_commands() -> list[str]:
    """Those of the four stages, in README's first block."""
    block = re.search(r"```bash\n(.*?)```", (RECIPES / "README.md").read_text(), flags=re.DOTALL)[1]
    return [re.sub(r" +#.*", "", line) for line in block.replace("\\\n", "").splitlines()]


@pytest.mark.parametrize("file", FILES + TINY_FILES)
def test_files_parse_and_weights_sum_to_one(file: str):
    recipe, _ = parse_file(file)
    assert len(recipe.data) == len(read(file)["data"])
    assert sum(source.weight for source in recipe.data) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_effective_numbers_are_those_of_the_sources(size: str, stage: str):
    recipe, args = parse_file(f"{stage}.yaml", size)
    num_tokens, length, learning_rate, schedule = SCHEDULES[stage]
    assert (args.max_length, args.learning_rate, args.lr_scheduler_type) == (length, learning_rate, schedule)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.95, 1e-15)
    assert (args.weight_decay, args.max_grad_norm) == (0.1, 1.0)
    assert args.bf16 and args.torch_compile and args.report_to == []
    assert recipe.router_z_loss_coef == 1e-4
    # 1e-3 where absent (test_training.py).
    assert recipe.expert_bias_update_rate == (0 if stage == "qat" else None)
    assert recipe.capacity_factor == (1.5 if stage in ("pretrain", "midtrain") else None)
    # The comment's arithmetic, with the processes of ddp.yaml and fsdp2.yaml.
    num_sequences = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert args.max_steps * num_sequences * length == pytest.approx(num_tokens, rel=1e-4)
    text = (RECIPES / f"{stage}.yaml").read_text()
    assert f"= {num_sequences * length:,} tokens a step" in text
    assert f"= {args.max_steps:,} steps" in text


@pytest.mark.parametrize("size", SIZES)
def test_stages_are_chained(size: str):
    commands = [shlex.split(line.replace("mobilemoe-s", f"mobilemoe-{size}"))[2:] for line in stage_commands()]
    assert [command[:2] for command in commands] == [["--config", f"recipes/{stage}.yaml"] for stage in STAGES]
    recipes = [parse(*command) for command in commands]
    assert recipes[0][0].model == f"recipes/mobilemoe-{size}"
    for (_, before), (recipe, _) in zip(recipes, recipes[1:], strict=False):
        assert recipe.model == before.output_dir


def test_quantization_trains_on_the_fine_tuning_mixture():
    assert read("qat.yaml")["data"] == read("sft.yaml")["data"]


@pytest.mark.parametrize("file", FILES)
def test_only_what_differs_is_listed(file: str):
    config = read(file)
    # Two empty configurations: what a field is after `__post_init__` is its default.
    with mock.patch.dict(os.environ):
        defaults = [RecipeArguments(model=""), SFTConfig(output_dir="out", use_cpu=True)]
    for key, value in config.items():
        (default,) = [vars(part)[key] for part in defaults if key in vars(part)]
        assert value != default, f"{key}: {value} is the default"


@pytest.mark.parametrize("stage", STAGES)
def test_categories_have_their_published_shares(stage: str):
    text = (RECIPES / f"{stage}.yaml").read_text()
    shares, sums, category = {}, {}, None
    for line in text.splitlines():
        if header := re.fullmatch(r"  # ([a-z ]+): ([\d.]+)  # (secondary source|ours: .*)", line):
            category = header[1]
            shares[category] = float(header[2])
        elif weight := re.fullmatch(r"    weight: ([\d.]+)", line):
            sums[category] = sums.get(category, 0) + float(weight[1])
    assert shares == SHARES[stage]
    assert sums == pytest.approx(SHARES[stage], abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_model_has_the_published_parameters(size: str):
    config = AutoConfig.from_pretrained(RECIPES / f"mobilemoe-{size}")
    assert type(config) is MobileMoEConfig
    with torch.device("meta"):
        model = MobileMoEForCausalLM(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    counted += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    assert counted == NUM_TOTAL_PARAMETERS[size]


@pytest.mark.parametrize("stage", STAGES)
def test_columns_are_in_the_data(stage: str, tmp_path: Path):
    sources = read(f"{stage}.yaml")["data"]
    for source, local in zip(sources, localize(sources, tmp_path), strict=True):
        assert set(local) <= {"path", "data_files", "weight", "columns", "streaming"}
        names = set(load_dataset("json", data_files=local["data_files"], split="train", streaming=True).column_names)
        if columns := source.get("columns"):
            assert set(columns) in KINDS, source
            assert set(columns.values()) <= names, source
        else:
            # Exactly one kind is there under its own name, or the mapping would have to choose.
            assert len([kind for kind in KINDS if kind <= names]) == 1, source


def local_sources(file: str, directory: Path) -> list[dict]:
    """The data of a recipe on stand-ins; that of the tiny ones in the demo's columns."""
    sources = read(file)["data"]
    if not file.startswith("tiny"):
        return localize(sources, directory)
    pairs = [
        {"prompt": turns[:1], "completion": turns[1:]} for turns in (chat(f"{i}?", f"It is {i}.") for i in range(40))
    ]
    texts = [{"text": f"def function_{i}():\n    return {i}\n"} for i in range(40)]
    for name, rows in (("chat", pairs), ("code", texts), ("docstrings", texts)):
        (directory / f"{name}.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [source | {"data_files": str(directory / Path(source["data_files"]).name)} for source in sources]


# The quantization reads what the fine-tuning reads: a test above.
@pytest.mark.parametrize("file", FILES[:3] + TINY_FILES)
def test_first_batches_have_something_to_learn_from_every_source(file: str, tokenizer, tmp_path: Path, monkeypatch):
    """As the recipe reads them, but for the tokenizer and, so that few rows suffice, shorter sequences and blocks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "BLOCK_SEQUENCES", 8)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    recipe, args = parse_file(file)
    sources = [DataSource(**source) for source in local_sources(file, tmp_path)]
    assert [source.streaming for source in sources] == [source.streaming for source in recipe.data]
    # One reader of those that share the data: every block has all sources.
    num_readers = recipe.num_data_readers
    mixture = Mixture(sources, tokenizer, 512, args.seed, num_readers, num_processes=num_readers)
    batch = collate(list(itertools.islice(mixture.sequences([0]), 4)))
    assert batch["input_ids"].shape == (4, 512)
    assert ((batch["labels"] != -100).sum(dim=1) > 50).all()
    # A document without a token that the loss counts is never made.
    counts = zip(sources, mixture.readers[0].counts, strict=True)
    assert [str(source) for source, count in counts if count["tokens"] == 0] == []


def test_every_stand_in_is_used():
    named = {source["path"] for stage in STAGES for source in read(f"{stage}.yaml")["data"]}
    assert named == set(STAND_INS)


def test_every_recipe_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert ROOT / settings["package-dir"]["mobilemoe.recipes"] == RECIPES
    assert "mobilemoe.recipes" in settings["packages"]
    # An editable install finds a mapped package by this file only.
    assert (RECIPES / "__init__.py").is_file()
    shipped = {path for pattern in settings["package-data"]["mobilemoe.recipes"] for path in RECIPES.glob(pattern)}
    assert {path for suffix in ("yaml", "json") for path in RECIPES.rglob(f"*.{suffix}")} <= shipped


def test_every_data_set_is_in_the_table():
    table = (RECIPES / "README.md").read_text()
    assert [path for path in STAND_INS if f"`{path}`" not in table] == []


def test_readme_commands_name_existing_files():
    text = (RECIPES / "README.md").read_text()
    commands = re.findall(r"^(?:python|accelerate launch) .*", text.replace("\\\n", ""), flags=re.MULTILINE)
    assert len(commands) >= len(STAGES)
    for command in commands:
        command = command.partition("#")[0]
        assert all((ROOT / path).exists() for path in re.findall(r"\brecipes/\S+", command)), command


@pytest.mark.parametrize("size", SIZES)
def test_readme_says_what_a_size_needs(size: str):
    text = (RECIPES / "README.md").read_text()
    row = re.search(rf"^\| {size.upper()} \| `recipes/mobilemoe-{size}` \| (.*) \|$", text, flags=re.MULTILINE)[1]
    config = MobileMoEConfig.from_pretrained(RECIPES / f"mobilemoe-{size}")
    total = config.num_total_parameters
    assert row.split(" | ") == [
        f"{total / 1e9:.2f}B",
        f"{config.num_active_parameters / 1e6:.1f}M",
        f"{16 * total / 1e9:.0f} GB",
        f"{12 * total / 1e9:.0f} GB",
    ]


@pytest.mark.parametrize(
    ("file", "num_processes", "distributed_type"),
    [("one_gpu", 1, "NO"), ("ddp", 8, "MULTI_GPU"), ("fsdp2", 8, "FSDP")],
)
def test_accelerate_reads_its_files(file: str, num_processes: int, distributed_type: str):
    path = str(RECIPES / f"accelerate/{file}.yaml")
    # Unknown keys are an error here.
    config = load_config_from_file(path)
    assert (config.num_processes, config.distributed_type, config.mixed_precision) == (
        num_processes,
        distributed_type,
        "bf16",
    )
    # What `accelerate launch` makes of the file.
    args = launch_command_parser().parse_args(["--config_file", path, "recipes/pretrain.py"])
    args, _, _ = _validate_launch_command(args)
    assert (args.num_processes, args.mixed_precision) == (num_processes, "bf16")
    assert args.use_fsdp == (file == "fsdp2")
    if file == "fsdp2":
        assert args.fsdp_version == 2
        wrapped = MobileMoEForCausalLM._no_split_modules[0]  # the other is of packed models
        assert args.fsdp_transformer_layer_cls_to_wrap == wrapped


def test_every_key_of_the_fsdp_block_is_an_option_of_accelerate():
    config = yaml.safe_load((RECIPES / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config) <= set(options)
