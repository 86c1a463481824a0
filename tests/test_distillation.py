"""The divergence from a teacher: against PyTorch's on whole logits, and through the trainer of QAT."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from mobilemoe.train import distillation, stages
from mobilemoe.train.data import DataSource, Source, collate, padding_id
from mobilemoe.train.epochs import packed_sequences, read_documents
from mobilemoe.train.qat import Int4FakeQuantizer, prepare
from mobilemoe.train.recipe import RecipeArguments, parse_arguments
from modeling_mobilemoe import dequantize


def whole_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of logits `(N, V)`, by token."""
    one, other = (logits.float() / temperature for logits in (student, teacher))
    per_token = kl_div(one.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return per_token * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_divergence_and_gradients_equal_those_of_whole_logits(rows, temperature, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    states, wanted, head, other = (
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((9, 8), (9, 8), (20, 8), (20, 8))
    )
    expected = whole_divergence(states @ head.T, (wanted @ other.T).detach(), temperature).sum()
    gradients = torch.autograd.grad(expected, (states, head))
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", rows * 20)
    found = distillation.divergence(states, wanted.detach(), head, other.detach(), temperature)
    torch.testing.assert_close(found, expected)
    for gradient, same in zip(torch.autograd.grad(found, (states, head)), gradients, strict=True):
        torch.testing.assert_close(gradient, same)


@pytest.fixture
def recipe(base_checkpoint, tmp_path):
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f"It is {2 * i + 1}."} for i in range(24)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = yaml.safe_load((ROOT / "recipes/tiny/qat.yaml").read_text())
    return tiny | {
        "model": str(base_checkpoint),
        "data": [{"path": "json", "data_files": str(tmp_path / "answers.jsonl")}],
        "output_dir": str(tmp_path / "out"),
        "distill": 1.0,
        "max_length": 128,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def run(recipe: dict, tmp_path) -> list[float]:
    """Trains and returns the logged losses."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    parts = (RecipeArguments, stages.QATArguments, SFTConfig)
    stages.quantize_aware(*parse_arguments(ROOT / "recipes", parts, ["--config", str(file)]))
    history = json.loads((Path(recipe["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def batch(recipe: dict) -> dict[str, torch.Tensor]:
    """All answers, packed in another order than in training."""
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    tokenizer.chat_template = stages.CHAT_TEMPLATE
    documents = read_documents([Source(DataSource(**recipe["data"][0]), tokenizer, 128, 0)])
    return collate(packed_sequences(documents, 128, padding_id(tokenizer)))


@torch.no_grad()
def mean_divergence(student, teacher, batch: dict[str, torch.Tensor]) -> float:
    is_learnt = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    one, other = (model(**inputs, use_cache=False).logits[:, :-1][is_learnt] for model in (student, teacher))
    return whole_divergence(one, other).mean().item()


def test_qat_ends_nearer_to_the_model_it_began_from(recipe, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    rounded = prepare(copy.deepcopy(teacher))
    answers = batch(recipe)
    before = mean_divergence(rounded, teacher, answers)
    losses = run(recipe | {"max_steps": 30, "learning_rate": 1e-3}, tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    student = prepare(dequantize(packed))
    for module in student.modules():
        if isinstance(module, Int4FakeQuantizer):
            # The weights are rounded already.
            module.enabled = False
    after = mean_divergence(student, teacher, answers)
    # The first loss is that of rounding alone.
    assert losses[0] == pytest.approx(before, rel=0.3)
    assert after < before / 2


@pytest.mark.parametrize("sequences", [1, 2])
def test_loss_does_not_depend_on_accumulation(recipe, tmp_path, sequences):
    whole = run(recipe | {"max_steps": 1}, tmp_path)
    parts = {"per_device_train_batch_size": sequences, "gradient_accumulation_steps": 4 // sequences}
    again = run(recipe | parts | {"max_steps": 1, "output_dir": str(tmp_path / "again")}, tmp_path)
    assert again == pytest.approx(whole, rel=1e-4)


def test_weight_mixes_both_losses(recipe, tmp_path):
    losses = {
        weight: run(recipe | {"distill": weight, "max_steps": 1, "overwrite_output_dir": True}, tmp_path)[0]
        for weight in (0.0, 0.25, 1.0)
    }
    assert losses[1.0] < losses[0.0] / 2
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill": float("nan")}, "distill=nan cannot work. Set a finite number from 0 to 1"),
        ({"distill": 1.5}, "distill=1.5 cannot work"),
        ({"distill_temperature": 0.0}, "distill_temperature=0.0 cannot work"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_a_model_loads(recipe, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(recipe | {"model": "no/model"} | change, tmp_path)
