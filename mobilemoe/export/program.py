"""The module that becomes a `.pte`: `forward(tokens, pos)` from the operators that ExecuTorch runtimes have.

With our operators a layer is one `mobilemoe::decoder_layer`, which reads weights where the program is mapped, and
the table is also the head. With the stock ones, router and routed experts are one `llama::quantized_moe_ffn`, linears
are XNNPACK's, with the INT4 integers of the checkpoint and INT8 activations. The KV cache lives inside. Shapes as in
modeling_mobilemoe.py, B is 1.
"""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_mobilemoe.int4_mobilemoe import Int4Format, unpack_int4
from modeling_mobilemoe.kernels.modules import (
    FEW_TOKENS,
    DecoderLayer,
    MoEFFN,
    PackedEmbedding,
    PackedLinear,
    RMSNorm,
)
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoEDecoderLayer,
    MobileMoEForCausalLM,
    apply_rotary_emb,
    compute_rope,
    rms_normalize,
)
from modeling_mobilemoe.packed_mobilemoe import Int4Embedding, Int4Linear

from .packing import pack_experts


@dataclass(frozen=True)
class ProgramOptions:
    """
    What a program is made of, beside the weights.

    Args:
        max_seq_len (`int`): context in tokens, the size of the KV cache.
        weights (`str`): `"int4"`, or `"fp32"` and `"bf16"` of a full-precision model.
        expert_bits (`int`): width of the experts, 4, or 8 in `llama::quantized_moe_ffn`.
        embedding_bits (`int`): width of the embedding table, 4 or 8; the integers are the same.
        kv_cache (`str`): `"fp32"`, `"bf16"` with our operators only, or `"int8"`.
        all_logits (`bool`): logits of every position, for evaluation. Otherwise of the last one, and with our
            operators of every position in calls of up to [`FEW_TOKENS`], to verify drafts.
    """

    max_seq_len: int
    weights: str = "int4"
    expert_bits: int = 8
    embedding_bits: int = 4
    kv_cache: str = "fp32"
    all_logits: bool = False


class QuantizedMoEFFN(nn.Module):
    """Router and routed experts as one `llama::quantized_moe_ffn`."""

    operator = "llama::quantized_moe_ffn"
    # Axis of its groups, see [`Int4Format`]: experts on the other one are rounded a second time.
    expert_axis = "input"

    def __init__(self, layer: MobileMoEDecoderLayer, options: ProgramOptions):
        super().__init__()
        feed_forward = layer.feed_forward
        self.top_k = feed_forward.router.top_k
        self.route_scale = float(feed_forward.router.routed_scaling_factor)
        self.num_bits = options.expert_bits
        self.intermediate_dim = feed_forward.experts.intermediate_dim
        gate_up, down, self.signal, self.noise = pack_experts(feed_forward.experts, options.expert_bits)
        self.register_buffer("gate_weight", feed_forward.router.weight.detach().float())
        self.register_buffer("expert_bias", feed_forward.expert_bias.float())
        self.register_buffer("packed_gate_up", gate_up)
        self.register_buffer("packed_down", down)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.llama.quantized_moe_ffn(
            hidden_states,
            self.gate_weight,
            self.expert_bias,
            self.packed_gate_up,
            self.packed_down,
            self.top_k,
            self.gate_weight.shape[0],
            self.intermediate_dim,
            self.gate_weight.shape[1],
            Int4Format.group_size,
            self.num_bits,
            "sigmoid",
            self.route_scale,
        )


class DenseMoE(nn.Module):
    """
    Full-precision experts, for evaluation: every token passes through every expert, most of them weighted by zero.

    All experts together are three linears; gathering the experts of each token instead would copy
    `tokens * top_k` matrices in a prefill. It computes E / top_k times what is needed.
    """

    operator = None
    expert_axis = None

    def __init__(self, layer: MobileMoEDecoderLayer, options: ProgramOptions):
        super().__init__()
        feed_forward = layer.feed_forward
        self.top_k = feed_forward.router.top_k
        self.route_scale = float(feed_forward.router.routed_scaling_factor)
        self.register_buffer("gate_weight", feed_forward.router.weight.detach().float())
        self.register_buffer("expert_bias", feed_forward.expert_bias.float())
        gate_up, down = feed_forward.experts.gate_up_proj.detach(), feed_forward.experts.down_proj.detach()
        gate, up = gate_up.chunk(2, dim=-1)  # (E, H, I)
        self.gate_proj = float_linear(gate.permute(0, 2, 1).flatten(0, 1), options.weights)  # (E * I, H)
        self.up_proj = float_linear(up.permute(0, 2, 1).flatten(0, 1), options.weights)
        self.down_proj = float_linear(down.flatten(0, 1).T, options.weights)  # (H, E * I)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(hidden_states, self.gate_weight).sigmoid()  # (tokens, E)
        top_k_index = torch.topk(scores + self.expert_bias, self.top_k).indices
        top_k_weights = scores.gather(1, top_k_index)
        top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20) * self.route_scale
        weights = torch.zeros_like(scores).scatter(1, top_k_index, top_k_weights)  # (tokens, E)
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)  # (tokens, E * I)
        gated = gated.unflatten(1, (scores.shape[1], -1)) * weights.unsqueeze(-1)
        return self.down_proj(gated.flatten(1))


# The namespace of an operator for packed experts, and the module around it.
MOE_MODULES: dict[str, type[nn.Module]] = {"mobilemoe": MoEFFN, "llama": QuantizedMoEFFN}


class ExportEmbedding(nn.Module):
    """Rows of the packed embedding through ExecuTorch's 4-bit or 8-bit embedding operator."""

    def __init__(self, embedding: Int4Embedding, num_bits: int):
        super().__init__()
        values = unpack_int4(embedding.qweight)
        if num_bits == 4:
            # That operator wants the even index in the high nibble and values stored plus 8.
            values = (values - Int4Format.qmin).view(torch.uint8)
            values = values[:, 0::2] << 4 | values[:, 1::2]
        self.num_bits = num_bits
        self.register_buffer("weight", values)
        self.register_buffer("scale", embedding.weight_scale.clone())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        operators = torch.ops.quantized_decomposed
        if self.num_bits == 8:
            return operators.embedding_byte.dtype(
                self.weight, self.scale, None, -128, 127, tokens, dtype=torch.float32
            )
        return operators.embedding_4bit.dtype(
            self.weight, self.scale, None, Int4Format.qmin, Int4Format.qmax, tokens, dtype=torch.float32
        )


def bf16_scale(scale: torch.Tensor) -> torch.Tensor:
    """Group scales as XNNPACK stores them. FP16 holds every FP16 number that was rounded to BF16's eight bits."""
    return scale.bfloat16().half()


def export_linear(linear: nn.Linear | Int4Embedding, weights: str = "int4") -> nn.Module:
    """A linear that XNNPACK takes: the INT4 integers as they are and INT8 activations per token; or a float one."""
    if not isinstance(linear, Int4Linear | Int4Embedding):
        return float_linear(linear.weight.detach(), weights)
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    quantized = unpack_int4(linear.qweight)
    weight = IntxUnpackedToInt8Tensor(
        qdata=quantized,
        scale=bf16_scale(linear.weight_scale).float(),
        zero_point=torch.zeros(linear.weight_scale.shape, dtype=torch.int8),
        target_dtype=torch.int4,
        block_size=(1, Int4Format.group_size),
        dtype=torch.float32,
        activation_quantization=IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    return _linear(weight, *quantized.shape)


def float_linear(weight: torch.Tensor, weights: str) -> nn.Module:
    """In `weights`, which is `"fp32"` or `"bf16"`."""
    if weights == "bf16":
        return BFloat16Linear(weight.bfloat16().contiguous())
    return _linear(weight.float().contiguous(), *weight.shape)


class BFloat16Linear(nn.Module):
    """As PyTorch computes a BF16 checkpoint: inputs and results in BF16, sums in FP32."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states.bfloat16(), self.weight).float()


def _linear(weight: torch.Tensor, out_features: int, in_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class DelegatedAttentionInputs(nn.Module):
    """Queries, keys and values `(B, T, heads, D)` of linears and elementwise work for XNNPACK."""

    def __init__(self, attention: nn.Module, options: ProgramOptions):
        super().__init__()
        self.head_dim = attention.head_dim
        self.eps = attention.config.rms_norm_eps
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, export_linear(attention.get_submodule(name), options.weights))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = (*x.shape[:2], -1, self.head_dim)
        query = rms_normalize(apply_rotary_emb(self.q_proj(x).view(heads), cos, sin), self.eps)
        key = rms_normalize(apply_rotary_emb(self.k_proj(x).view(heads), cos, sin), self.eps)
        return query, key, self.v_proj(x).view(heads)


class DelegatedAttention(nn.Module):
    def __init__(self, layer: MobileMoEDecoderLayer, options: ProgramOptions):
        super().__init__()
        attention = layer.self_attn
        self.head_dim = attention.head_dim
        self.int8_cache = options.kv_cache == "int8"
        self.inputs = DelegatedAttentionInputs(attention, options)
        self.o_proj = export_linear(attention.o_proj, options.weights)
        per_token = (1, options.max_seq_len, attention.config.num_key_value_heads)
        for name in ("k_cache", "v_cache"):
            dtype = torch.int8 if self.int8_cache else torch.float32
            self.register_buffer(name, torch.zeros((*per_token, self.head_dim), dtype=dtype))
            if self.int8_cache:
                self.register_buffer(f"{name}_scale", torch.ones((*per_token, 1)))
                self.register_buffer(f"{name}_zero_point", torch.zeros((*per_token, 1), dtype=torch.int8))

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        attend = self.attend_int8 if self.int8_cache else self.attend
        attended = attend(*self.inputs(hidden_states, cos, sin), start)
        return self.o_proj(attended.reshape(batch, length, -1))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int) -> torch.Tensor:
        torch.ops.llama.update_cache(key, self.k_cache, start)
        torch.ops.llama.update_cache(value, self.v_cache, start)
        return torch.ops.llama.custom_sdpa(query, self.k_cache, self.v_cache, start, None, 0.0, True)

    def attend_int8(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int) -> torch.Tensor:
        """Keys, values and queries in INT8 with a scale and a zero point per token and head."""
        for states, name in ((key, "k_cache"), (value, "v_cache")):
            parts = int8_per_token(states)
            for suffix, part in zip(("", "_scale", "_zero_point"), parts, strict=True):
                torch.ops.llama.update_cache(part, self.get_buffer(name + suffix), start)
        query, query_scale, query_zero_point = int8_per_token(query)
        return torch.ops.llama.custom_quantized_sdpa(
            query,
            self.k_cache,
            self.v_cache,
            start,
            None,
            0.0,
            True,
            None,
            query_zero_point,
            query_scale,
            self.k_cache_zero_point,
            self.k_cache_scale,
            self.v_cache_zero_point,
            self.v_cache_scale,
        )


def int8_per_token(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """INT8 of shape `(B, T, heads, D)`, FP32 scales and INT8 zero points of shape `(B, T, heads, 1)`."""
    operators = torch.ops.quantized_decomposed
    scale, zero_point = operators.choose_qparams_per_token_asymmetric.default(states, torch.int8)
    quantized = operators.quantize_per_token(states, scale, zero_point, -128, 127, torch.int8)
    return quantized, scale.float(), zero_point.to(torch.int8)


def int8_values(states: torch.Tensor) -> torch.Tensor:
    """What XNNPACK's dynamic INT8 per token keeps of the inputs of a linear, `(..., n)`."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    rounding = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))
    return rounding(states.float()).to(states.dtype)


class DelegatedLayer(nn.Module):
    """A layer of XNNPACK's linears and ExecuTorch's operators."""

    def __init__(self, layer: MobileMoEDecoderLayer, options: ProgramOptions, moe_module: type[nn.Module]):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention = DelegatedAttention(layer, options)
        self.moe = moe_module(layer, options)
        self.shared_expert = layer.feed_forward.shared_expert
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = export_linear(self.shared_expert.get_submodule(name), options.weights)
            self.shared_expert.set_submodule(name, linear)

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        hidden_states = hidden_states + self.attend(hidden_states, cos, sin, start)
        return hidden_states + self.feed_forward(hidden_states)

    def attend(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        return self.attention(self.input_layernorm(hidden_states), cos, sin, start)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.post_attention_layernorm(hidden_states)
        routed = self.moe(normed.flatten(0, 1)).view_as(normed)
        # The sums of the model, in its order: another one would differ in the last bits.
        return routed + self.shared_expert(normed)


def export_layer(
    layer: MobileMoEDecoderLayer, options: ProgramOptions, moe_module: type[nn.Module] | None
) -> DecoderLayer | DelegatedLayer:
    """A layer of our operators, without routed experts when `moe_module` is `None`, or of ExecuTorch's."""
    if moe_module not in (None, MoEFFN):
        return DelegatedLayer(layer, options, moe_module)
    return DecoderLayer(layer, options.max_seq_len, options.kv_cache, MoEFFN(layer) if moe_module else None)


class ExportModel(nn.Module):
    """
    The whole program. It takes the model's modules over: the model cannot be used afterwards.

    Args:
        model (`MobileMoEForCausalLM`): packed INT4, or full precision, which stays so.
        options (`ProgramOptions`): the rest.
        moe_module (`type[nn.Module]`, *optional*): router and routed experts of a layer, one of `MOE_MODULES`, or
            [`DenseMoE`] for full precision. Without it the layers have none: a dense model on our operators.
    """

    def __init__(self, model: MobileMoEForCausalLM, options: ProgramOptions, moe_module: type[nn.Module] | None):
        super().__init__()
        embedding = model.get_input_embeddings()
        self.options = options
        packed = isinstance(embedding, Int4Embedding)
        self.on_kernels = moe_module in (None, MoEFFN)
        # Table and head are one tensor.
        table = PackedEmbedding(embedding) if self.on_kernels else None
        if table is not None and options.embedding_bits == 4:
            self.embed_tokens = table
        elif packed:
            self.embed_tokens = ExportEmbedding(embedding, options.embedding_bits)
        else:
            # In place, as the head is the same tensor.
            self.embed_tokens = embedding.bfloat16() if options.weights == "bf16" else embedding
        layers = model.model.layers
        self.layers = nn.ModuleList()
        for i in tqdm(range(len(layers)), desc="pack", unit="layer"):
            self.layers.append(export_layer(layers[i], options, moe_module))
            # Or a model would be in memory twice.
            layers[i] = nn.Identity()
        if table is not None:
            self.norm, self.lm_head = RMSNorm(model.model.norm), PackedLinear(table)
        else:
            self.norm = model.model.norm
            self.lm_head = export_linear(embedding if packed else model.lm_head, options.weights)
        inv_freq, _ = compute_rope(model.config)
        angles = torch.arange(options.max_seq_len)[:, None] * inv_freq
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        start = pos[0].item()
        torch._check(start >= 0)
        length = tokens.shape[1]
        torch._check(start + length <= self.options.max_seq_len)
        cos = self.cos.narrow(0, start, length).unsqueeze(0)  # (1, T, D / 2)
        sin = self.sin.narrow(0, start, length).unsqueeze(0)
        hidden_states = self.embed_tokens(tokens).float()
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, start)
        if self.on_kernels and not self.options.all_logits:
            # Computed in a tensor: `torch.export` would specialise an expression of `length`.
            lengths = torch.full((1,), length)
            kept = lengths.where(lengths <= FEW_TOKENS, 1)[0].item()
            torch._check(kept >= 1)
            torch._check(kept <= FEW_TOKENS)
            torch._check(kept <= length)
            hidden_states = hidden_states.narrow(1, length - kept, kept)
        elif not self.options.all_logits:
            hidden_states = hidden_states[:, -1]
        return self.lm_head(self.norm(hidden_states))
