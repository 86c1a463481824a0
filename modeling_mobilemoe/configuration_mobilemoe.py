"""MobileMoE configuration: the released keys, verbatim, with the S model as default (arXiv 2605.27358)."""

import dataclasses
import difflib
import math
import sys
from typing import Any, TypeGuard

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .quantization_mobilemoe import register_int4_quantizer


logger = logging.get_logger(__name__)

# The only routing, attention and position scheme of the nine releases. A config that asks for another one must fail:
# the forward pass would silently compute something else.
ARCHITECTURE_CONSTANTS = {
    "hidden_act": "silu",
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attn_temperature_tuning": False,
    "norm_topk_prob": True,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
# The fields of `rope_scaling` by its `rope_type`, those that it needs and those that it may have: the rules of
# transformers, `modeling_rope_utils.py`.
ROPE_FIELDS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
# Keys that transformers itself passes to a configuration and that are no fields of ours.
TRANSFORMERS_KEYS = {
    "_attn_implementation",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_weights",
}


def _is_positive(value: Any) -> TypeGuard[int | float]:
    # NaN is not above 0.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@strict
class MobileMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a MobileMoE model. The defaults are MobileMoE-S: 1,263,374,256 parameters, 272.4M of them active.

    Args:
        vocab_size (`int`, defaults to 128256): rows of the tied embedding.
        hidden_size (`int`, defaults to 768): width of the residual stream.
        intermediate_size (`int`, defaults to 384): width of one routed expert.
        intermediate_size_mlp (`int`, defaults to 1536): width of the shared expert.
        num_hidden_layers (`int`, defaults to 20): every layer is a mixture-of-experts layer.
        num_attention_heads (`int`, defaults to 12): query heads.
        num_key_value_heads (`int`, defaults to 4): key and value heads (grouped-query attention).
        head_dim (`int`, defaults to 64): width of one head, even.
        max_position_embeddings (`int`, defaults to 8192): context length in tokens.
        rms_norm_eps (`float`, defaults to 1e-5): epsilon of every RMS norm, the weightless head norm included.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        use_cache (`bool`, defaults to `True`): return key and value states for decoding.
        rope_theta (`float`, defaults to 500000.0): base of the rotary frequencies.
        rope_scaling (`dict`, *optional*): `rope_type` and its fields, a rule of transformers: "llama3" with the
            released values when absent. "yarn", "dynamic", "linear" or "longrope" extend the context.
        num_local_experts (`int`, defaults to 60): routed experts per layer.
        num_experts_per_tok (`int`, defaults to 4): routed experts per token.
        routed_scaling_factor (`float`, defaults to 2.5): what the routing weights of a token sum to.
        no_rope_layers (`list[int]`, *optional*): one entry per layer, 1 = the layer uses RoPE. All ones.
        layer_types (`list[str]`, *optional*): one entry per layer, all "full_attention".
        output_router_logits (`bool`, defaults to `False`): return the router logits of every layer.
        quantization (`dict`, *optional*): the released INT4 block, see `quantization_mobilemoe.py`.

    The remaining keys (`hidden_act`, `use_qk_norm`, ...) are read as released and accept the released value only.

    Raises:
        ValueError: for sizes that cannot work together, a value that the architecture does not implement, a missing
            `rope_scaling` field, or an unknown key. Unknown keys in a `config.json` are ignored with a warning.
    """

    model_type = "mobilemoe"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.feed_forward.shared_expert.gate_proj": "colwise",
        "layers.*.feed_forward.shared_expert.up_proj": "colwise",
        "layers.*.feed_forward.shared_expert.down_proj": "rowwise",
        # The styles are named for `[out, in]` and these are `[E, in, out]`, as in Llama 4: "packed_rowwise" gives each
        # rank the same part of the gate and of the up half of the last dimension, "colwise" that part of the one
        # before it. The router and the norms are whole on every rank.
        "layers.*.feed_forward.experts.gate_up_proj": "packed_rowwise",
        "layers.*.feed_forward.experts.down_proj": "colwise",
        "layers.*.feed_forward.experts": "moe_tp_experts",
    }
    # Annotated in transformers as the plan of a pipeline.
    base_model_ep_plan = {  # ty: ignore[invalid-assignment]
        "layers.*.feed_forward.experts.gate_up_proj": "grouped_gemm",
        "layers.*.feed_forward.experts.down_proj": "grouped_gemm",
        "layers.*.feed_forward.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 768
    intermediate_size: int = 384
    intermediate_size_mlp: int = 1536
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    rope_theta: float | int = 500000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = False
    no_rope_layers: list[int] | None = None
    layer_types: list[str] | None = None
    interleave_moe_layer_step: int = 1
    num_local_experts: int = 60
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    output_router_logits: bool = False
    quantization: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - self._known_keys())
        if unknown:
            hints = difflib.get_close_matches(unknown[0], [field.name for field in dataclasses.fields(self)], n=1)
            raise ValueError(
                f"MobileMoEConfig got the unknown key {unknown[0]!r}. It would have no effect. "
                + (f"Did you mean {hints[0]!r}?" if hints else "Remove it.")
            )
        if self.rope_scaling is None:
            # As released: with both band edges equal there is no smooth band (facts of the S, M and L configs).
            self.rope_scaling = {
                "rope_type": "llama3",
                "factor": 16,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
            }
        elif "rope_theta" in self.rope_scaling:
            # As `to_diff_dict` writes it, and as everywhere in transformers 5.
            self.rope_scaling = dict(self.rope_scaling)
            self.rope_theta = self.rope_scaling.pop("rope_theta")
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.eos_token_id is None and self.vocab_size == 128256:
            # <|end_of_text|> and <|eot|>: a model that stops only at the former runs past its turn.
            self.eos_token_id = [128001, 128008]
        names = {} if self.id2label is None else self.id2label
        if not (isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
            raise ValueError(f"id2label={names!r} gives no names. Set a dictionary of texts, or leave it out.")
        super().__post_init__(**kwargs)
        # Remote code that our checkpoints carry, so that they also load where this package is not installed.
        self.auto_map = {
            "AutoConfig": "configuration_mobilemoe.MobileMoEConfig",
            "AutoModel": "modeling_mobilemoe.MobileMoEModel",
            "AutoModelForCausalLM": "modeling_mobilemoe.MobileMoEForCausalLM",
        }
        if self.quantization is not None:
            # The releases call the block `quantization`; transformers looks for `quantization_config`.
            self.quantization_config = {**self.quantization, "quant_method": self.model_type}
            # What the format stores and the kernels compute in. Training in FP32 may have written otherwise.
            self.dtype = torch.bfloat16
        self._check_architecture()

    def _check_architecture(self) -> None:
        # Not named `validate_architecture`: `@strict` would call it and wrap its errors in one that is no ValueError.
        for name, value in ARCHITECTURE_CONSTANTS.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not implemented: every MobileMoE release has {value!r}. "
                    f"Set {name} to {value!r}."
                )
        for name in (
            "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings num_local_experts num_experts_per_tok"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} cannot be a size. Set {name} to 1 or more.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value} is not finite. Set a number.")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} cannot work. Set a positive number.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is no share of the attention weights. Set 0, as "
                "released, or a number below 1."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_key_value_heads="
                f"{self.num_key_value_heads}, so query heads cannot share key heads evenly. Set a multiple."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but RoPE rotates pairs of channels. Set head_dim to an even number."
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}: "
                "a token cannot be routed to more experts than there are. Lower num_experts_per_tok."
            )
        for name, implemented in (("no_rope_layers", 1), ("layer_types", "full_attention")):
            values = getattr(self, name)
            if len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(values)} entries for num_hidden_layers={self.num_hidden_layers}. "
                    f"Give one entry per layer, or leave {name} out."
                )
            if any(value != implemented for value in values):
                raise ValueError(
                    f"{name}={values} is not implemented: every layer of every release has {implemented!r}. "
                    f"Set all entries to {implemented!r}."
                )
        self.check_rope_scaling()

    def check_rope_scaling(self) -> None:
        """
        Raises:
            ValueError: for a `rope_scaling` of an unknown type, or whose fields are missing, unknown or cannot work.
        """
        scaling = self.rope_scaling or {}
        rope_type = scaling.get("rope_type")
        if not isinstance(rope_type, str) or rope_type not in ROPE_FIELDS:
            raise ValueError(
                f"rope_scaling has rope_type={rope_type!r}, which is not implemented. Set one of "
                f"{', '.join(ROPE_FIELDS)}."
            )
        required, optional = ROPE_FIELDS[rope_type]
        unknown = sorted(set(scaling) - {"rope_type", *required, *optional})
        if unknown:
            raise ValueError(
                f"rope_scaling has the field {unknown[0]!r}, which rope_type={rope_type!r} does not read. Remove it."
            )
        for name in required + optional:
            if name in required or scaling.get(name) is not None:
                self._check_rope_field(rope_type, name, scaling.get(name))
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            # The defaults of YaRN.
            if (scaling.get(high) or 32) < (scaling.get(low) or 1):
                raise ValueError(
                    f"rope_scaling has {high}={scaling.get(high)} below {low}={scaling.get(low)}, so the bands "
                    f"overlap. Set it to at least {low}."
                )
        if rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(
                f"head_dim={self.head_dim} is too small for rope_type='dynamic'. Set head_dim to 4 or more."
            )

    def _check_rope_field(self, rope_type: str, name: str, value: object) -> None:
        if name == "truncate":
            legal, needed = isinstance(value, bool), "true or false"
        elif name in ("short_factor", "long_factor"):
            legal = isinstance(value, list) and len(value) == self.head_dim // 2 and all(map(_is_positive, value))
            needed = f"a list of head_dim / 2 = {self.head_dim // 2} positive numbers"
        elif name == "original_max_position_embeddings":
            legal, needed = _is_positive(value) and value > 1, "a number of tokens above 1"
        elif name == "partial_rotary_factor":
            legal, needed = _is_positive(value) and value <= 1, "a number above 0 and up to 1"
        else:
            legal, needed = _is_positive(value), "a positive number"
        if not legal:
            fields = ", ".join(ROPE_FIELDS[rope_type][0]) or name
            raise ValueError(
                f"rope_scaling[{name!r}] is {value!r}, and rope_type={rope_type!r} needs {needed}. "
                f"Give all of {fields}."
            )

    @property
    def num_total_parameters(self) -> int:
        """All parameters, the tied embedding once, with norms and expert biases: 1,263,374,256 for S."""
        norms_and_biases = (2 * self.num_hidden_layers + 1) * self.hidden_size
        norms_and_biases += self.num_hidden_layers * self.num_local_experts
        return self._num_matrix_parameters(self.num_local_experts) + norms_and_biases

    @property
    def num_active_parameters(self) -> int:
        """Weights of the matrices that one token passes through, the tied embedding once: 272,437,248 for S."""
        return self._num_matrix_parameters(self.num_experts_per_tok)

    def _num_matrix_parameters(self, num_routed_experts: int) -> int:
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        experts = 3 * (num_routed_experts * self.intermediate_size + self.intermediate_size_mlp)
        per_layer = attention + experts + self.num_local_experts
        return (self.vocab_size + self.num_hidden_layers * per_layer) * self.hidden_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MobileMoEConfig":
        """As in transformers, but keys that a file has and we do not know are ignored, with a warning."""
        unknown = sorted(set(config_dict) - cls._known_keys())
        if unknown:
            logger.warning_once(f"Unknown keys in the MobileMoE configuration are ignored: {', '.join(unknown)}")
        try:
            return super().from_dict(
                {key: value for key, value in config_dict.items() if key not in unknown}, **kwargs
            )
        except StrictDataclassFieldValidationError as error:
            # Its own message spans lines, and it is no ValueError.
            raise ValueError(
                f"A configuration value has the wrong type: {' '.join(str(error).split())}. Correct config.json."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return self._with_released_keys(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        serialized = self._with_released_keys(super().to_diff_dict())
        # What config.json holds. With `rope_theta` beside `rope_scaling`, as released, AutoTokenizer fails where this
        # class is unknown, that is without remote code and an import. Inside is where transformers 5 keeps it.
        # https://github.com/jundot/omlx/issues/2129, docs/upstream/README.md
        serialized["rope_scaling"] = {**serialized["rope_scaling"], "rope_theta": serialized.pop("rope_theta")}
        return serialized

    def _with_released_keys(self, serialized: dict[str, Any]) -> dict[str, Any]:
        # `quantization` is the released name; another method's `quantization_config` stays.
        serialized.pop("quantization" if self.quantization is None else "quantization_config", None)
        if self.quantization is not None:
            serialized["dtype"] = "bfloat16"
        return serialized

    @classmethod
    def _known_keys(cls) -> set[str]:
        return TRANSFORMERS_KEYS | {field.name for field in dataclasses.fields(cls)}


# Here and not with the model: lm-eval looks the format up when it has loaded the configuration.
register_int4_quantizer()

# `transformers serve` looks for the class that `architectures` names in transformers only. It has read the
# configuration by then, and no more, so the Auto class, which finds ours, stands there under that name.
# https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/cli/serving/model_manager.py#L319
server = sys.modules.get("transformers.cli.serving.model_manager")
if server is not None:
    server.transformers.MobileMoEForCausalLM = AutoModelForCausalLM

__all__ = ["MobileMoEConfig"]
