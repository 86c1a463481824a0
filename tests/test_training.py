"""What a recipe is made of: models, checkpoints to resume from, room for them, and files that cannot work."""

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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils
from trl import SFTConfig

from mobilemoe.train import checkpoints, routing, stages
from mobilemoe.train.checkpoints import check_disk_space, find_checkpoint
from mobilemoe.train.lora import add_lora
from mobilemoe.train.recipe import RecipeArguments, find_recipe, load_model, parse_arguments, set_up_routing
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
        ("config", "sfft", "midtrain, pretrain, qat, sft, tiny/distill, tiny/dpo, tiny/grpo, tiny/midtrain, "),
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
    monkeypatch.setattr(checkpoints.logger, "propagate", True)
    monkeypatch.setattr(checkpoints.logger.parent, "propagate", True)
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
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: free)
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


STAGES = {"pretrain": stages.pretrain, "sft": stages.fine_tune, "qat": stages.quantize_aware}


def run(recipe, tmp_path, script="pretrain"):
    if script == "qat":
        # The recipe is one of pre-training, which drops tokens.
        recipe = {"activation_grid": "per_token"} | recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parameters = inspect.signature(STAGES[script]).parameters.values()
    parts = [each.annotation for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    # Parsing leaves variables for accelerate in the environment.
    with mock.patch.dict(os.environ):
        STAGES[script](*parse_arguments(ROOT / "recipes", parts, ["--config", str(path)]))


def test_trainer_gives_the_model_what_separates_documents(recipe, tmp_path, monkeypatch):
    """`position_ids` count only without a mask and without a cache (transformers' `create_causal_mask`)."""
    seen = []

    def watched(*args):
        model = load_model(*args)
        model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        assert model.config._attn_implementation == "sdpa"
        return model

    monkeypatch.setattr(stages, "load_model", watched)
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
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="A checkpoint needs about"):
        run(recipe | {"save_strategy": "steps"}, tmp_path)
    # Which only says whose directory it is.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_disk_that_fills_up_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    usage = iter([10**12, 10**12, 1000])
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(usage)))
    with pytest.raises(OSError, match="resume from the last checkpoint with --resume_from_checkpoint true"):
        run(recipe | {"save_strategy": "steps", "save_steps": 1}, tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert find_checkpoint(str(tmp_path / "out"), "true").name == "checkpoint-1"


CHAT_WITHOUT_ANSWER = [{"messages": [{"role": "user", "content": "Only a question?"}]}]

# What differs in the YAML file, and the parts of the message.
BAD_FILES = {
    "unknown key": ({"learning_rat": 1}, ["recipe.yaml: the key learning_rat", "Did you mean learning_rate?"]),
    "wrong type": ({"learning_rate": [1]}, ["recipe.yaml: learning_rate is [1], expected float"]),
    "number in words": ({"max_steps": "ten"}, ["recipe.yaml: max_steps is 'ten', expected int"]),
    "fraction of a step": ({"max_steps": 2.0}, ["recipe.yaml: max_steps is 2.0, expected a whole number"]),
    "data that is no list": ({"data": "json"}, ["recipe.yaml: data is 'json', expected list"]),
    "weight in quotes": (
        {"data": [{"path": "json", "weight": "1e-3"}]},
        ["weight is '1e-3', expected float. YAML reads 1e-4 as text: write 1.0e-4"],
    ),
    "packing of TRL": ({"packing": True}, ["packing=True would be ignored", "always packed", "Leave it out"]),
    "completion only": ({"completion_only_loss": False}, ["completion_only_loss=False would be ignored"]),
    "evaluation without data": ({"eval_strategy": "steps"}, ["eval_strategy is set without eval_data"]),
    "epochs of a mixture": ({"logging_strategy": "epoch"}, ["logging_strategy=epoch with max_steps=2", "no epochs"]),
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
    "no end": ({"max_steps": None}, ["max_steps=-1", "starts its sources again", "Set max_steps to tokens /"]),
    "two ends": ({"num_train_epochs": 2}, ["max_steps=2 and num_train_epochs=2 both say", "Set one of them"]),
    "readers": ({"num_data_readers": 0}, ["num_data_readers=0", "Set a multiple of 1"]),
    "more readers than examples": (
        {"num_data_readers": 201},
        ["has 200 examples", "num_data_readers=201", "Set it to 200"],
    ),
    "workers": (
        {"dataloader_num_workers": 1},
        ["dataloader_num_workers=1", "cannot record", "Leave it at 0"],
    ),
    "save strategy": ({"save_strategy": "epoch"}, ["save_strategy=epoch with max_steps=2", "Set steps, or"]),
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


# NaN passes every comparison with a bound, and a run of it would save NaN.
BAD_NUMBERS = [
    *({"router_z_loss_coef": value} for value in (float("nan"), float("inf"), -1.0, 1e9)),
    *({"expert_bias_update_rate": value} for value in (float("nan"), float("inf"), -1.0, 1e9)),
    *({"weight": value} for value in (float("nan"), float("inf"), -1.0, 0.0, 2.0)),
    *({"capacity_factor": value} for value in (float("nan"), float("inf"))),
    *({"learning_rate": value} for value in (float("nan"), float("inf"), -1.0)),
    {"max_grad_norm": float("nan")},
    {"seed": -1},
    {"per_device_train_batch_size": 0},
    {"gradient_accumulation_steps": 0},
    {"num_train_epochs": -1.0, "max_steps": None},
]


@pytest.mark.parametrize("numbers", BAD_NUMBERS, ids=str)
def test_numbers_that_cannot_work_are_refused_before_a_model_loads(recipe, tmp_path, numbers):
    changed = recipe | {"model": "no/model"} | numbers
    if "weight" in numbers:
        changed["data"] = [recipe["data"][0] | {"weight": changed.pop("weight")}]
    changed = {key: value for key, value in changed.items() if value is not None}
    (name, value), *_ = numbers.items()
    with pytest.raises(ValueError, match=rf"{name}={value} cannot work\. Set a finite number|{name}"):
        run(changed, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e9"])
def test_numbers_of_the_command_line_are_checked(value):
    with pytest.raises(ValueError, match="router_z_loss_coef=.* cannot work. Set a finite number from 0 to 1"):
        parse_arguments(
            ROOT / "recipes", (RecipeArguments, SFTConfig), ["--config", "tiny/sft", "--router_z_loss_coef", value]
        )


def test_word_for_a_number_on_the_command_line_is_one_line(capsys):
    with pytest.raises(ValueError, match="argument --max_steps.*: invalid int value: 'ten'"):
        parse_arguments(ROOT / "recipes", (RecipeArguments, SFTConfig), ["--config", "tiny/sft", "--max_steps", "ten"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "bad.yaml is no YAML file: .*line 2"),
        ("- 1", "bad.yaml holds list"),
        ("", "bad.yaml holds NoneType"),
    ],
)
def test_yaml_file_that_is_none(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(ROOT / "recipes", (RecipeArguments, SFTConfig), ["--config", str(tmp_path / "bad.yaml")])


LORA_ERRORS = {
    "rank alone": ({"lora_rank": 4}, "without lora_scope, and would do nothing"),
    "balancing": ({"lora_scope": "all", "lora_rank": 4, "expert_bias_update_rate": 1e-3}, "Set 0 or leave it out"),
}


@pytest.mark.parametrize("name", LORA_ERRORS)
def test_lora_that_cannot_work_stops_before_a_model_loads(recipe, tmp_path, name):
    changes, message = LORA_ERRORS[name]
    del recipe["expert_bias_update_rate"]
    with pytest.raises(ValueError, match=message):
        run(recipe | changes | {"model": "no/model"}, tmp_path, "sft")


def test_scripts_without_lora_do_not_take_its_fields(recipe, tmp_path):
    with pytest.raises(ValueError, match="recipe.yaml: the key lora_scope is no field of this recipe"):
        run(recipe | {"lora_scope": "all", "model": "no/model"}, tmp_path)


def test_new_run_does_not_mix_with_an_old_one(recipe, tmp_path):
    saving = recipe | {"save_strategy": "steps", "save_steps": 1}
    # What a run that was killed in its first checkpoint leaves.
    cut_off = tmp_path / "out/checkpoint-1/left-over"
    cut_off.parent.mkdir(parents=True)
    cut_off.touch()
    run(saving, tmp_path)
    assert not cut_off.exists()
    with pytest.raises(ValueError, match="holds checkpoints of another run.*Set resume_from_checkpoint to true"):
        run(saving, tmp_path)
    # From the first checkpoint again: the second one is written anew, not into the old one.
    left = tmp_path / "out/checkpoint-2/left-over"
    left.touch()
    run(saving | {"resume_from_checkpoint": str(tmp_path / "out/checkpoint-1")}, tmp_path)
    assert find_checkpoint(str(tmp_path / "out"), "true").name == "checkpoint-2" and not left.exists()


# Directories that hold something else


def fingerprint(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


LORA = {"lora_scope": "dense", "lora_rank": 2, "expert_bias_update_rate": None}
OTHER_RUNS = {
    "adapter over a full model": ("sft", {}, "sft", LORA, "a checkpoint, from fine-tuning of"),
    "full model over an adapter": (
        "sft",
        LORA,
        "sft",
        {},
        r"a LoRA adapter with its merged model, from LoRA \(dense\)",
    ),
    "fine-tuning over a packed model": ("qat", {}, "sft", {}, "a checkpoint, from QAT of"),
    "QAT over a fine-tuned model": ("sft", {}, "qat", {}, "and QAT of .* would write over it"),
    "pre-training over QAT": ("qat", {}, "pretrain", {}, "from QAT of"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_stage_does_not_write_over_another_one(recipe, tmp_path, name):
    first, first_changes, second, changes, message = OTHER_RUNS[name]
    without = [
        {key: value for key, value in (recipe | each).items() if value is not None}
        for each in (first_changes, changes)
    ]
    run(without[0] | {"max_steps": 1}, tmp_path, first)
    before = fingerprint(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{message}.*Set another --output_dir, or --overwrite_output_dir true"):
        run(without[1] | {"max_steps": 1}, tmp_path, second)
    assert fingerprint(tmp_path / "out") == before
    # The same again is no other kind.
    run(without[0] | {"max_steps": 1}, tmp_path, first)
    run(without[1] | {"max_steps": 1, "overwrite_output_dir": True}, tmp_path, second)
    assert fingerprint(tmp_path / "out") != before


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("model.pte", "an exported program"),
        ("a.gguf", "a GGUF model"),
        ("notes.txt", "other files, such as notes.txt"),
    ],
)
def test_directory_of_something_else_is_not_written_to(recipe, tmp_path, file, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).touch()
    with pytest.raises(ValueError, match=f"holds {kind}"):
        run(recipe | {"model": "no/model"}, tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]


def test_model_is_not_written_over_by_its_own_training(recipe, tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="is the directory of the model that is trained"):
        run(recipe | {"model": str(tmp_path / "out"), "overwrite_output_dir": True}, tmp_path)


def test_same_stage_of_another_model_is_another_run(recipe, tmp_path, tiny_checkpoint):
    run(recipe | {"max_steps": 1}, tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    with pytest.raises(
        ValueError, match="holds a checkpoint, from pre-training of .*tiny, and pre-training of .*copy"
    ):
        run(recipe | {"max_steps": 1, "model": str(tmp_path / "copy")}, tmp_path)


# A loss that is no number


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_loss_that_is_not_finite_stops_before_the_step(recipe, tmp_path, monkeypatch, strategy):
    """The weights of the first step of an undisturbed run are kept, whether it saved or not."""
    run(
        recipe | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "good")},
        tmp_path,
    )
    z_loss = routing.router_z_loss
    calls = []

    def spoiled(router_logits):
        calls.append(1)
        # Two layers, and each pass is counted once more by the statistics.
        return z_loss(router_logits) * (float("nan") if len(calls) > 8 else 1)

    monkeypatch.setattr(routing, "router_z_loss", spoiled)
    changes = {"max_steps": 4, "save_strategy": strategy, "save_steps": 1, "router_z_loss_coef": 1e-4}
    with pytest.raises(
        ValueError, match=r"stopped before step 3, .* norm of the gradient is nan.*checkpoint-2: start a new"
    ):
        run(recipe | changes, tmp_path)
    kept = load_file(tmp_path / "out/checkpoint-2/model.safetensors")
    expected = load_file(tmp_path / "good/checkpoint-2/model.safetensors")
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []
    assert find_checkpoint(str(tmp_path / "out"), "true").name == "checkpoint-2"
    assert not (tmp_path / "out/model.safetensors").exists()


# QAT through its script


def test_quantization_refuses_to_drop_tokens_on_the_grid_of_the_operators(recipe, tmp_path):
    with pytest.raises(
        ValueError, match=r"capacity_factor=1.5 with activation_grid=mobilemoe: .*Leave capacity_factor"
    ):
        run(recipe | {"model": "no/model", "activation_grid": None}, tmp_path, "qat")


@pytest.mark.parametrize("step", [2, 3])
def test_quantization_after_the_last_step_is_refused_before_a_model_loads(recipe, tmp_path, step):
    with pytest.raises(ValueError, match=rf"quantize_from_step={step} with max_steps=2.*Set a step below max_steps"):
        run(recipe | {"quantize_from_step": step, "model": "no/model"}, tmp_path, "qat")


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.0), (1e-3, 1e-3)])
def test_quantization_balances_only_where_it_is_said(rate, expected):
    arguments = RecipeArguments("no/model", expert_bias_update_rate=rate)
    stages.check_quantization(
        stages.QATArguments(quantize_from_step=1), arguments, SimpleNamespace(max_steps=2, fsdp=None)
    )
    assert arguments.expert_bias_update_rate == expected


class StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("step", [0, 1])
def test_training_that_saw_no_int4_is_not_packed(recipe, tmp_path, step, monkeypatch):
    train = stages.train
    monkeypatch.setattr(stages, "train", lambda trainer: trainer.add_callback(StopAfterOneStep) or train(trainer))
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
