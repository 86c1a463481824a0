"""
transformers' own tests of a model, on ours.

They are in its repository and its source distribution, not in its wheel. `TRANSFORMERS_TESTS` names their folder, of
the installed version, as after

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    TRANSFORMERS_TESTS=transformers/tests make test-slow

or, without the tests of `generate` and of exporters, which the source distribution leaves out,

    pip download --no-binary transformers --no-deps transformers==5.24.0 && tar xf transformers-5.24.0.tar.gz
"""

import importlib
import importlib.util
import inspect
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, MobileMoEModel
from modeling_mobilemoe.modeling_mobilemoe import EXPERTS_FUNCTIONS


TESTS = os.environ.get("TRANSFORMERS_TESTS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TESTS is None, reason="needs transformers' tests: set TRANSFORMERS_TESTS to their folder"),
]

# What these tests ask for and the package refuses on purpose.
REFUSALS = {
    "test_load_save_without_tied_weights": "the head is tied in every release; tie_word_embeddings=False is an error",
    "test_model_weights_reload_no_missing_tied_weights": "a checkpoint that lacks tensors is an error, not a warning",
}
# Mixins whose files the source distribution lacks.
OPTIONAL = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}


def load_suite(folder: Path) -> dict[str, type]:
    """The mixins by name, with an empty class in place of each that is not there."""
    package = types.ModuleType("transformers_suite")
    package.__path__ = [str(folder)]
    sys.modules["transformers_suite"] = package
    for name, mixin in OPTIONAL.items():
        if not (folder / f"{name.replace('.', '/')}.py").is_file():
            parent, stand_in = f"transformers_suite.{name.split('.')[0]}", types.ModuleType(name)
            setattr(stand_in, mixin, type(mixin, (), {}))
            sys.modules.setdefault(parent, types.ModuleType(parent))
            sys.modules[f"transformers_suite.{name}"] = stand_in
    modules = ("test_modeling_common", "test_training_mixin", *OPTIONAL)
    members = {}
    for module in modules:
        members |= vars(importlib.import_module(f"transformers_suite.{module}"))
    return {name: members[name] for name in ("ModelTesterMixin", "TrainingTesterMixin", "GenerationTesterMixin")}


class Tester:
    """The small model and batch that the mixins ask for."""

    base_model_class = MobileMoEModel
    causal_lm_class = MobileMoEForCausalLM
    is_training = True
    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 3, 8, 2, 32, 4
    vocab_size, num_experts, expert_intermediate_size, shared_intermediate_size = 99, 8, 32, 64

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> MobileMoEConfig:
        return MobileMoEConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.expert_intermediate_size,
            intermediate_size_mlp=self.shared_intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=self.num_experts,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MobileMoEConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


if TESTS is not None:
    MIXINS = load_suite(Path(TESTS).resolve())

    class SuiteTest(*MIXINS.values(), unittest.TestCase):
        all_model_classes = (MobileMoEModel, MobileMoEForCausalLM)
        # Experts that no token of a small batch reaches have no gradient.
        test_all_params_have_gradient = False

        @property
        def model_tester(self) -> Tester:
            return Tester(self)

        def setUp(self) -> None:
            # The mixins look up by name what a class is: whether it takes labels, which one has no head.
            for mapping, model_class in (
                (MODEL_MAPPING_NAMES, MobileMoEModel),
                (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MobileMoEForCausalLM),
            ):
                names = mock.patch.dict(mapping, mobilemoe=model_class.__name__)
                names.start()
                self.addCleanup(names.stop)
            if "eager_matches_batched_and_grouped" in self.id():
                # They count calls of transformers' own functions, which ours, with BF16 under autocast, stands before.
                functions = mock.patch.dict(EXPERTS_FUNCTIONS._local_mapping, clear=True)
                functions.start()
                self.addCleanup(functions.stop)

    for test in REFUSALS:
        # A refusal that is none any more fails, and is then taken off the list.
        setattr(SuiteTest, test, pytest.mark.xfail(strict=True, reason=REFUSALS[test])(getattr(SuiteTest, test)))


def test_the_suite_is_whole():
    """Skips visibly where only the source distribution is there."""
    missing = [name for name in OPTIONAL if not (Path(TESTS) / f"{name.replace('.', '/')}.py").is_file()]
    assert sum(name.startswith("test_") for name, _ in inspect.getmembers(SuiteTest)) > 100
    if missing:
        pytest.skip(f"{TESTS} lacks {', '.join(missing)}: take the repository of transformers for these tests")
