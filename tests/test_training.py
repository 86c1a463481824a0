"""What a recipe is made of: models, checkpoints to resume from, room for them, and files that cannot work."""

import importlib.util
import inspect
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils
from trl import SFTConfig

from mobilemoe.train import recipe as training
from mobilemoe.train.lora import add_lora
from mobilemoe.train.recipe import (
    RecipeArguments,
    check_disk_space,
    find_checkpoint,
    find_recipe,
    load_model,
    parse_arguments,
    set_up_routing,
)
from modeling_mobilemoe.int4_mobilemoe import Int4Format


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_load_model_starts_from_a_config_or_a_checkpoint(tmp_path, tiny_model, tiny_checkpoint):
    tiny_model.config.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).num_parameters() == tiny_model.num_parameters()
    loaded = load_model(str(tiny_checkpoint))
    assert loaded.dtype == torch.float32
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_balancing_is_on_where_nothing_is_said(tiny_model):
    assert set_up_routing(tiny_model, RecipeArguments(""), 1).update_rate == 1e-3
    assert set_up_routing(tiny_model, RecipeArguments("", expert_bias_update_rate=0.0), 1).update_rate == 0


# Names of shipped recipes


@pytest.mark.parametrize(
    ("option", "name", "path"),
    [
        ("config", "sft", "sft.yaml"),
        ("config", "tiny/sft", "tiny/sft.yaml"),
        ("model", "mobilemoe-s", "mobilemoe-s"),
        ("model", "tiny", "tiny"),
    ],
)
def test_shipped_recipes_have_names_and_existing_paths_win(option, name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = ROOT / "recipes"
    assert find_recipe(recipes, option, name) == str(recipes / path)
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    if option == "config":
        # A directory is no YAML file: an output directory may have a stage's name.
        own.mkdir()
        assert find_recipe(recipes, option, name) == str(recipes / path)
        own.rmdir()
        own.touch()
    else:
        own.mkdir()
    assert find_recipe(recipes, option, name) == name


@pytest.mark.parametrize(
    ("option", "name", "shipped"),
    [
        ("config", "sfft", "midtrain, pretrain, qat, sft, tiny/midtrain, tiny/pretrain, tiny/qat, tiny/sft"),
        ("config", "accelerate/ddp", "midtrain, "),
        ("model", "mobilemoe-x", "mobilemoe-l, mobilemoe-m, mobilemoe-s, tiny"),
    ],
)
def test_unknown_name_lists_the_shipped_ones(option, name, shipped):
    with pytest.raises(ValueError, match=f"{option}={name} is no existing path, .* or one of {shipped}"):
        find_recipe(ROOT / "recipes", option, name)


def test_model_with_a_slash_may_be_on_the_hub():
    assert find_recipe(ROOT / "recipes", "model", "facebook/MobileMoE-S-SFT") == "facebook/MobileMoE-S-SFT"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "--model and --output_dir"),
        ({"--model": "mobilemoe-s"}, "--output_dir"),
        ({"--output_dir": "out"}, "--model"),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "qat"])
def test_model_and_output_must_be_given(stage, given, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = (RecipeArguments, SFTConfig)
    arguments = ["--config", stage, "--use_cpu", "true", *(word for option in given.items() for word in option)]
    with mock.patch.dict(os.environ), pytest.raises(ValueError, match=f"^{missing} not set: .* Add them, for example"):
        parse_arguments(ROOT / "recipes", parts, arguments)
    assert list(tmp_path.iterdir()) == []


# Checkpoints


def save_checkpoint(output_dir, step, state=None):
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    complete = {"global_step": step, "stateful_callbacks": {"MixtureCallback": {"mixture": {"turn": step}}}}
    (path / "trainer_state.json").write_text(json.dumps(complete if state is None else state))
    return path


@pytest.mark.parametrize("resume", [None, False, "false", "False"])
def test_without_resume_there_is_no_checkpoint(tmp_path, resume):
    save_checkpoint(tmp_path, 2)
    assert find_checkpoint(str(tmp_path), resume) is None


@pytest.mark.parametrize("resume", [True, "true", "True"])
def test_last_complete_checkpoint_is_found(tmp_path, resume, caplog, monkeypatch):
    monkeypatch.setattr(training.logger, "propagate", True)
    monkeypatch.setattr(training.logger.parent, "propagate", True)
    save_checkpoint(tmp_path, 8)
    expected = save_checkpoint(tmp_path, 10)
    cut_off = save_checkpoint(tmp_path, 12)
    (cut_off / "trainer_state.json").write_text('{"global_step": 12, "stateful_callb')
    (tmp_path / "checkpoint-14").mkdir()
    save_checkpoint(tmp_path, 100, {"global_step": 100, "stateful_callbacks": {}})
    # Somebody's own name for a copy.
    shutil.copytree(expected, tmp_path / "checkpoint-best")
    assert find_checkpoint(str(tmp_path), resume) == expected
    for step in (12, 14, 100):
        assert f"{tmp_path / f'checkpoint-{step}'} is incomplete and skipped" in caplog.text
    assert "checkpoint-10 " not in caplog.text


def test_named_checkpoint_is_taken_or_refused(tmp_path):
    first = save_checkpoint(tmp_path, 2)
    save_checkpoint(tmp_path, 4)
    assert find_checkpoint(str(tmp_path / "elsewhere"), str(first)) == first
    (first / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 is no complete checkpoint.*set true for the last complete"):
        find_checkpoint(str(tmp_path), str(first))


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint. Leave it out to start from the beginning"):
        find_checkpoint(str(tmp_path), "true")


# A full disk


def test_disk_must_have_room_for_weights_and_optimizer(tmp_path, tiny_model, monkeypatch):
    weights = sum(parameter.nbytes for parameter in tiny_model.parameters())
    free = SimpleNamespace(free=3 * weights)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: free)
    check_disk_space(str(tmp_path), tiny_model)
    free.free -= 1
    with pytest.raises(OSError, match=r"needs about 0\.00 GB, and .* has 0\.00 GB left\. Free space and resume from"):
        check_disk_space(str(tmp_path), tiny_model)
    # What does not train has no optimizer state.
    tiny_model.get_input_embeddings().weight.requires_grad = False
    check_disk_space(str(tmp_path), tiny_model)
    # A checkpoint of adapters does not hold what they adapt.
    adapted = add_lora(tiny_model, "attention", rank=2)
    free.free = 3 * sum(parameter.nbytes for parameter in adapted.parameters() if parameter.requires_grad)
    check_disk_space(str(tmp_path), adapted)
    assert free.free < weights


# Recipes, run in this process


@pytest.fixture
def recipe(tmp_path, tokenizer, tiny_checkpoint):
    """A run of two steps as it would stand in a YAML file."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [{"text": f"def function_{i}():\n    return {i}\n"} for i in range(200)]
    tiny = yaml.safe_load((ROOT / "recipes/tiny/pretrain.yaml").read_text())
    return tiny | {
        "model": str(tiny_checkpoint),
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": [{"path": "json", "data_files": write_jsonl(tmp_path / "texts.jsonl", texts)}],
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "max_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def load_script(script):
    specification = importlib.util.spec_from_file_location(script, ROOT / f"recipes/{script}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(recipe, tmp_path, script="pretrain"):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main = load_script(script).main
    parts = [parameter.annotation for parameter in inspect.signature(main).parameters.values()]
    # Parsing leaves variables for accelerate in the environment.
    with mock.patch.dict(os.environ):
        main(*parse_arguments(ROOT / "recipes", parts, ["--config", str(path)]))


def test_trainer_gives_the_model_what_separates_documents(recipe, tmp_path, monkeypatch):
    """`position_ids` count only without a mask and without a cache (transformers' `create_causal_mask`)."""
    seen = []

    def watched(*args):
        model = load_model(*args)
        model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        assert model.config._attn_implementation == "sdpa"
        return model

    script = load_script("pretrain")
    script.load_model = watched
    monkeypatch.setitem(globals(), "load_script", lambda name: script)
    run(recipe, tmp_path)
    assert len(seen) == 2
    for kwargs in seen:
        assert kwargs.get("attention_mask") is None and kwargs["use_cache"] is False
        positions = kwargs["position_ids"]
        assert positions.shape == (8, 64)
        # Texts of about 25 tokens.
        assert ((positions == 0).sum(dim=1) > 1).all()


def test_resume_in_a_yaml_file_is_a_boolean(recipe, tmp_path):
    run(recipe | {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": False}, tmp_path)
    logs = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    run(recipe | {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True}, tmp_path)
    again = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [row["epoch"] for row in again[:2]] == [row["epoch"] for row in logs[:2]] == [0.5, 1]
    for row, expected in zip(again[:2], logs[:2], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


class Recorder(TrainerCallback):
    rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append(dict(logs))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_reporters_see_what_the_callbacks_add_to_the_logs(recipe, tmp_path, monkeypatch, disable_tqdm):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "rows", [])
    run(recipe | {"report_to": "recorder", "disable_tqdm": disable_tqdm}, tmp_path)
    assert [row["num_tokens"] for row in Recorder.rows[:2]] == [8 * 64, 2 * 8 * 64]
    assert all({"load_imbalance", "router_z_loss"} <= row.keys() for row in Recorder.rows[:2])
    assert "total_flos" in Recorder.rows[-1]


def test_full_disk_stops_a_run_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="A checkpoint needs about"):
        run(recipe | {"save_strategy": "steps"}, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_disk_that_fills_up_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    usage = iter([10**12, 10**12, 1000])
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(usage)))
    with pytest.raises(OSError, match="resume from the last checkpoint with --resume_from_checkpoint true"):
        run(recipe | {"save_strategy": "steps", "save_steps": 1}, tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert find_checkpoint(str(tmp_path / "out"), "true").name == "checkpoint-1"


CHAT_WITHOUT_ANSWER = [{"messages": [{"role": "user", "content": "Only a question?"}]}]

# What differs in the YAML file, and the parts of the message.
BAD_FILES = {
    "unknown key": ({"learning_rat": 1}, ["Unknown arguments from config file", "--learning_rat"]),
    "unknown key of the data": (
        {"data": [{"path": "json", "weigth": 1.0}]},
        ["Entry 0 of `data`", "'weigth'", "Its keys are path, weight"],
    ),
    "data without a path": ({"data": [{"weight": 1.0}]}, ["Entry 0 of `data`", "path is needed"]),
    "data that is a string": ({"data": ["texts.jsonl"]}, ["Entry 0 of `data` is texts.jsonl", "Its keys are path"]),
    "no data": ({"data": []}, ["names no data", "Add a `data` list"]),
    "weights": ({"weights": (0.5, 0.6)}, ["[0.5, 0.6] sum to 1.1", "Set positive weights that sum to 1"]),
    "missing column": ({"rows": [{"txt": "a"}]}, ["sets no `columns`", "['txt']", "Map the right ones"]),
    "chat without an answer": (
        {"rows": CHAT_WITHOUT_ANSWER},
        ["rows.jsonl, example 0", "no assistant turn", "Correct or remove it", "Only a question?"],
    ),
    "beyond the context": (
        {"max_length": 257},
        ["max_length=257", "context of 256 tokens", "Set a length from 2 to 256"],
    ),
    "length of one token": ({"max_length": 1}, ["max_length=1 does not fit", "Set a length from 2"]),
    "capacity factor": ({"capacity_factor": 0.9}, ["capacity_factor=0.9 is below 1", "Set 1 or more"]),
    "no end": ({"max_steps": None}, ["max_steps=-1", "starts its sources again", "Set it to tokens /"]),
    "readers": ({"num_data_readers": 0}, ["num_data_readers=0", "Set a multiple of 1"]),
    "more readers than examples": (
        {"num_data_readers": 201},
        ["has 200 examples", "num_data_readers=201", "Set it to 200"],
    ),
    "workers": (
        {"dataloader_num_workers": 1},
        ["dataloader_num_workers=1", "cannot record", "Leave it at 0"],
    ),
    "save strategy": ({"save_strategy": "epoch"}, ["save_strategy=epoch", "position in the mixture", "Set steps"]),
    "weights without the optimizer": ({"save_only_model": True}, ["save_only_model=true", "AdamW", "Leave it out"]),
    "nothing to resume": ({"resume_from_checkpoint": True}, ["holds no complete checkpoint", "Leave it out"]),
}


@pytest.mark.parametrize("script", ["pretrain", "sft"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_stops_before_any_step(recipe, tmp_path, script, name, monkeypatch):
    changes, parts = BAD_FILES[name]
    changes = dict(changes)
    if "rows" in changes:
        path = write_jsonl(tmp_path / "rows.jsonl", changes.pop("rows"))
        changes["data"] = [{"path": "json", "data_files": path}]
    if "weights" in changes:
        changes["data"] = [recipe["data"][0] | {"weight": weight} for weight in changes.pop("weights")]
    changed = {key: value for key, value in (recipe | changes).items() if value is not None}
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: steps.append(1))
    with pytest.raises(ValueError) as raised:
        run({"save_strategy": "steps", "save_steps": 1} | changed, tmp_path, script)
    assert [part for part in parts if part not in str(raised.value)] == [], raised.value
    assert steps == []
    assert list(tmp_path.glob("out/**/*.safetensors")) == list(tmp_path.glob("out/checkpoint-*")) == []


LORA_ERRORS = {
    "rank alone": ({"lora_rank": 4}, "without lora_scope, and would do nothing"),
    "balancing": ({"lora_scope": "all", "lora_rank": 4, "expert_bias_update_rate": 1e-3}, "Set 0 or leave it out"),
    "sharded": (
        {"lora_scope": "all", "lora_rank": 4},
        "lora_scope=all merges them in one process. Launch with",
    ),
}


@pytest.mark.parametrize("name", LORA_ERRORS)
def test_lora_that_cannot_work_stops_before_a_model_loads(recipe, tmp_path, name, monkeypatch):
    changes, message = LORA_ERRORS[name]
    if name == "sharded":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    del recipe["expert_bias_update_rate"]
    with pytest.raises(ValueError, match=message):
        run(recipe | changes | {"model": "no/model"}, tmp_path, "sft")


def test_scripts_without_lora_do_not_take_its_fields(recipe, tmp_path):
    with pytest.raises(ValueError, match="Unknown arguments from config file.*--lora_scope"):
        run(recipe | {"lora_scope": "all", "model": "no/model"}, tmp_path)


def test_new_run_does_not_mix_with_an_old_one(recipe, tmp_path):
    saving = recipe | {"save_strategy": "steps", "save_steps": 1}
    run(saving, tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of another run.*Set resume_from_checkpoint to true"):
        run(saving, tmp_path)
    # From the first checkpoint again: the second one is written anew, not into the old one.
    left = tmp_path / "out/checkpoint-2/left-over"
    left.touch()
    run(saving | {"resume_from_checkpoint": str(tmp_path / "out/checkpoint-1")}, tmp_path)
    assert find_checkpoint(str(tmp_path / "out"), "true").name == "checkpoint-2" and not left.exists()


# QAT through its script


@pytest.mark.parametrize("fsdp", ["launcher", "argument"])
def test_quantization_refuses_fsdp_before_a_model_loads(recipe, tmp_path, fsdp, monkeypatch):
    if fsdp == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        recipe["fsdp"] = True
    with pytest.raises(ValueError, match=r"FSDP shards .* QAT packs them whole .*one_gpu\.yaml or ddp\.yaml"):
        run(recipe | {"model": "no/model"}, tmp_path, "qat")


@pytest.mark.parametrize("step", [2, 3])
def test_quantization_after_the_last_step_is_refused_before_a_model_loads(recipe, tmp_path, step):
    with pytest.raises(ValueError, match=rf"quantize_from_step={step} with max_steps=2.*Set a step below max_steps"):
        run(recipe | {"quantize_from_step": step, "model": "no/model"}, tmp_path, "qat")


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.0), (1e-3, 1e-3)])
def test_quantization_balances_only_where_it_is_said(rate, expected):
    script, arguments = load_script("qat"), RecipeArguments("no/model", expert_bias_update_rate=rate)
    script.check_quantization(
        script.QATArguments(quantize_from_step=1), arguments, SimpleNamespace(max_steps=2, fsdp=None)
    )
    assert arguments.expert_bias_update_rate == expected


class StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("step", [0, 1])
def test_training_that_saw_no_int4_is_not_packed(recipe, tmp_path, step, monkeypatch):
    script = load_script("qat")
    script.train = lambda trainer: trainer.add_callback(StopAfterOneStep) or training.train(trainer)
    monkeypatch.setitem(globals(), "load_script", lambda name: script)
    recipe["quantize_from_step"] = step
    if step == 0:
        run(recipe, tmp_path, "qat")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization == Int4Format().block
        return
    with pytest.raises(ValueError, match="ended after 1 steps with quantize_from_step=1: no step saw INT4"):
        run(recipe, tmp_path, "qat")
    assert list((tmp_path / "out").glob("*.safetensors")) == []


@pytest.mark.parametrize("name", ["unknown key", "unknown key of the data"])
def test_wrong_keys_show_before_a_model_loads(recipe, tmp_path, name):
    changes, _ = BAD_FILES[name]
    with pytest.raises(ValueError):
        run(recipe | changes | {"model": "no/model", "tokenizer": "no/tokenizer"}, tmp_path)
