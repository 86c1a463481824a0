import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import RELEASED_BLOCK
from transformers import AutoConfig

from modeling_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM


# config.json of MobileMoE-S as released, field by field; pinned by integrallis/models, MobileMoeHuggingFaceConfigTest.
S_CONFIG = {
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 384,
    "intermediate_size_mlp": 1536,
    "num_hidden_layers": 20,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
    },
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1] * 20,
    "layer_types": ["full_attention"] * 20,
    "use_qk_norm": True,
    "attn_temperature_tuning": False,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
ROPE_SCALING = S_CONFIG["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 32,
    "long_factor": [4.0] * 32,
    "original_max_position_embeddings": 8192,
}
ROPE_FIELDS = [field for field in ROPE_SCALING if field != "rope_type"]
SIZES = {
    "S": {},
    "M": {
        "hidden_size": 1024,
        "intermediate_size": 512,
        "intermediate_size_mlp": 2048,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
    },
    "L": {
        "hidden_size": 1280,
        "intermediate_size": 640,
        "intermediate_size_mlp": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    },
}


def test_defaults_are_the_s_model():
    config = MobileMoEConfig()
    assert {key: config.to_dict()[key] for key in S_CONFIG} == S_CONFIG
    assert config.model_type == "mobilemoe"
    assert config.bos_token_id == 128000
    assert config.quantization is None


def test_defaults_stop_at_the_end_of_a_turn():
    # 128008 is <|eot|>: a model that stops only at <|end_of_text|> runs past its turn.
    assert MobileMoEConfig().eos_token_id == [128001, 128008]


def test_another_vocabulary_gets_no_released_end_token():
    assert MobileMoEConfig(vocab_size=512, bos_token_id=0).eos_token_id is None


@pytest.mark.parametrize(
    ("size", "total", "active", "card_active"),
    [
        ("S", 1_263_374_256, 272_437_248, 272.4e6),
        ("M", 2_818_390_552, 528_244_736, 528.2e6),
        ("L", 5_325_704_320, 921_600_000, 921.6e6),
    ],
)
def test_parameter_counts_are_the_published_ones(size: str, total: int, active: int, card_active: float):
    config = MobileMoEConfig(**SIZES[size])
    with torch.device("meta"):
        model = MobileMoEForCausalLM(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    counted += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    assert counted == total
    assert config.num_total_parameters == total
    assert config.num_active_parameters == active
    # The model cards round to 0.1M.
    assert active == pytest.approx(card_active, abs=0.05e6)


def rope_scaling_without(field: str) -> dict:
    return {key: value for key, value in ROPE_SCALING.items() if key != field}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok"),
        ({"head_dim": 63}, "head_dim"),
        *(
            ({key: 0}, f"{key}=0")
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "intermediate_size_mlp",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "num_local_experts",
                "num_experts_per_tok",
            )
        ),
        ({"hidden_sizes": 768}, "'hidden_sizes'.*Did you mean 'hidden_size'"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_scaling": rope_scaling_without("rope_type")}, "rope_type=None"),
        ({"rope_scaling": ROPE_SCALING | {"rope_type": "axial"}}, "rope_type='axial'"),
        ({"rope_scaling": ROPE_SCALING | {"rope_type": ["llama3"]}}, r"rope_type=\['llama3'\]"),
        ({"rope_scaling": ROPE_SCALING | {"rope_type": "yarn"}}, "'high_freq_factor', which rope_type='yarn'"),
        ({"rope_scaling": ROPE_SCALING | {"factor": math.nan}}, r"\['factor'\] is nan"),
        *(
            ({key: value}, f"{key}={value} is not finite")
            for key in (
                "rope_theta",
                "rms_norm_eps",
                "routed_scaling_factor",
                "attention_dropout",
                "initializer_range",
            )
            for value in (math.nan, math.inf)
        ),
        ({"initializer_range": -0.1}, "initializer_range=-0.1"),
        *(({"attention_dropout": value}, f"attention_dropout={value} is no share") for value in (-1, 1, 1.5)),
        ({"rope_scaling": {"rope_type": "linear"}}, r"\['factor'\] is None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 0}}, r"\['factor'\] is 0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2}, "head_dim=2 is too small"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_fast=1 below beta_slow=2"),
        ({"rope_scaling": YARN | {"truncate": 1}}, r"\['truncate'\] is 1"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, r"\['attention_factor'\] is -1.0"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1}}, "a number of tokens above 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 31}}, "head_dim / 2 = 32 positive numbers"),
        ({"rope_scaling": LONGROPE | {"short_factor": [0.0] * 32}}, "head_dim / 2 = 32 positive numbers"),
        ({"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 1.5}}, "above 0 and up to 1"),
        *(({"rope_scaling": rope_scaling_without(field)}, rf"\['{field}'\] is None") for field in ROPE_FIELDS),
        *(({"rope_scaling": ROPE_SCALING | {field: 0}}, rf"\['{field}'\] is 0") for field in ROPE_FIELDS),
        ({"rope_scaling": ROPE_SCALING | {"factor": "16"}}, r"\['factor'\] is '16'"),
        ({"rope_scaling": ROPE_SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor=1.0 below"),
        ({"no_rope_layers": [1] * 19 + [0]}, "no_rope_layers"),
        ({"no_rope_layers": [1] * 19}, "no_rope_layers"),
        ({"layer_types": ["full_attention"] * 19 + ["sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 21}, "layer_types"),
        ({"interleave_moe_layer_step": 2}, "interleave_moe_layer_step"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_values_name_their_key(overrides: dict, named: str):
    with pytest.raises(ValueError, match=named):
        MobileMoEConfig(**overrides)


def write_config(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_released_file_is_read(tmp_path: Path):
    # As the QAT releases have it, without the three keys that a loader must not require.
    optional = ("layer_types", "attention_dropout", "attn_temperature_tuning")
    released = {key: value for key, value in S_CONFIG.items() if key not in optional} | {
        "architectures": ["MobileMoEForCausalLM"],
        "model_type": "mobilemoe",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.6",
        "eos_token_id": [128001, 128008],
        # Neither size is the default, so that what was read is told apart from what was filled in.
        "hidden_size": 1024,
        "routed_scaling_factor": 2.0,
        "quantization": RELEASED_BLOCK,
    }
    config = AutoConfig.from_pretrained(write_config(tmp_path, released))
    assert type(config) is MobileMoEConfig
    assert (config.hidden_size, config.routed_scaling_factor) == (1024, 2.0)
    assert config.dtype == torch.bfloat16
    assert config.layer_types == ["full_attention"] * 20
    assert (config.attention_dropout, config.attn_temperature_tuning) == (0.0, False)
    assert config.quantization == RELEASED_BLOCK


def test_unknown_keys_in_a_file_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    # Keys of the Llama 4 family that the released files may carry.
    unknown = {"moe_layers": list(range(20)), "floor_scale": 8192, "attn_scale": 0.1}
    config = AutoConfig.from_pretrained(write_config(tmp_path, S_CONFIG | {"model_type": "mobilemoe"} | unknown))
    assert not set(unknown) & set(config.to_dict())
    assert {key: config.to_dict()[key] for key in S_CONFIG} == S_CONFIG
    (message,) = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert all(key in message for key in unknown)


def test_bad_value_in_a_file_names_its_key(tmp_path: Path):
    path = write_config(tmp_path, S_CONFIG | {"model_type": "mobilemoe", "use_qk_norm": False})
    with pytest.raises(ValueError, match="use_qk_norm"):
        AutoConfig.from_pretrained(path)


@pytest.mark.parametrize("quantization", [None, RELEASED_BLOCK], ids=["full-precision", "int4"])
def test_save_and_load_are_equal(tiny_config: MobileMoEConfig, quantization: dict | None, tmp_path: Path):
    config = MobileMoEConfig(**tiny_config.to_dict() | {"quantization": quantization})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    # What transformers notes about the file is not part of the configuration.
    about_the_file = {"_name_or_path": str(tmp_path), "transformers_version": transformers.__version__}
    assert loaded.to_dict() == config.to_dict() | about_the_file
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.get("quantization") == quantization
    assert "quantization_config" not in saved


def test_saved_file_has_the_released_keys(tmp_path: Path):
    MobileMoEConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    # But for one that moves to where transformers 5 keeps it: beside `rope_scaling`, AutoTokenizer fails on it.
    assert "rope_theta" not in saved
    saved["rope_theta"] = saved["rope_scaling"].pop("rope_theta")
    assert {key: saved.get(key) for key in S_CONFIG} == S_CONFIG
    # Also where it is not the default.
    MobileMoEConfig(rope_theta=10000.0).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.rope_theta, loaded.rope_scaling) == (10000.0, ROPE_SCALING)
