"""The roundings of a program inside the PyTorch model of its checkpoint, each alone or all together.

Our operators round inputs of linears to INT8 in groups; XNNPACK rounds them per token, and group scales to BF16.
Experts may cross to another grid. What a program with the same roundings still differs in is the program itself. On
our operators that is nothing: `kernels/reference.py` has their bits.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from modeling_mobilemoe.kernels import reference
from modeling_mobilemoe.modeling_mobilemoe import (
    MobileMoEAttention,
    MobileMoEExperts,
    MobileMoEMLP,
    MobileMoERMSNorm,
    MobileMoERouter,
)
from modeling_mobilemoe.packed_mobilemoe import Int4Embedding, Int4Experts, Int4Head, Int4Linear

from .packing import expand_rows, operator_rows
from .program import ProgramOptions, bf16_scale, int8_values


SOURCES = (
    "BF16 arithmetic",
    "expert grid",
    "BF16 scales",
    "INT8 activations",
    "INT8 expert activations",
    "BF16 KV cache",
    "INT8 KV cache",
)


class OperatorExperts(Int4Experts):
    """Experts with the weights that the MoE operator will hold."""

    def _expand(self, qweight: torch.Tensor, scale: torch.Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return expand_rows(*operator_rows(qweight[expert], scale[expert], self.group_dim, self.operator_bits)).T


# The model's modules as our operators compute them. Norms, attention, router and SwiGLU round nothing, but their sums
# have the operators' order. In PyTorch's order, S with random weights ended 17 dB from its program: the last bits of a
# sum move inputs to another INT8 step, and these move tokens to other experts.


class ReferenceLinear(Int4Linear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return reference.int4_linear(hidden_states, self.qweight, self.weight_scale)


class ReferenceHead(Int4Head):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (embedding,) = self._embedding
        return reference.int4_linear(hidden_states, embedding.qweight, embedding.weight_scale)


class ReferenceExperts(Int4Experts):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        packed = (self.gate_up_qweight, self.gate_up_scale, self.down_qweight, self.down_scale)
        return reference.moe_experts(hidden_states, top_k_index, top_k_weights, *packed)


class ReferenceRouter(MobileMoERouter):
    def forward(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return reference.route(hidden_states, self.weight, expert_bias, self.top_k, self.routed_scaling_factor)


class ReferenceMLP(MobileMoEMLP):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = reference.silu_multiply(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        return self.down_proj(gated)


class ReferenceNorm(MobileMoERMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ReferenceAttention(MobileMoEAttention):
    """Causal: batches may be padded at the right only. Keys and values are rounded to what `kv_cache` holds."""

    kv_cache = "fp32"

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        heads, eps = (*hidden_states.shape[:2], -1, self.head_dim), self.config.rms_norm_eps
        query, key = (
            reference.rotate_and_normalize(linear(hidden_states).view(heads), *position_embeddings, eps)
            for linear in (self.q_proj, self.k_proj)
        )
        value = self.v_proj(hidden_states).view(heads)
        if cache is not None:
            states = cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            key, value = (cached.transpose(1, 2) for cached in states)
        attended = reference.attention(query, key, value, key.shape[1] - query.shape[1], self.kv_cache)
        return self.o_proj(attended.flatten(2)), None


# Full-precision modules as programs in BF16 compute them: weights, inputs and results in BF16, sums in FP32.


def bf16_values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


class BFloat16Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return bf16_values(nn.functional.linear(bf16_values(input), bf16_values(self.weight)))


class BFloat16Embedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return bf16_values(super().forward(input))


class BFloat16Experts(MobileMoEExperts):
    """All experts as one linear each for gate, up and down: routing weights come before the last, and one rounding."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            inputs = bf16_values(hidden_states[token])
            gate, up = bf16_values(inputs @ bf16_values(self.gate_up_proj[expert])).chunk(2, dim=-1)
            gated = nn.functional.silu(gate) * up * top_k_weights[token, slot, None]
            total.index_add_(0, token, bf16_values(gated) @ bf16_values(self.down_proj[expert]))
        return bf16_values(total)


BF16_ARITHMETIC = (BFloat16Linear, BFloat16Embedding, BFloat16Experts)
ACTIVATIONS = {"INT8 activations": (ReferenceLinear, ReferenceHead), "INT8 expert activations": (ReferenceExperts,)}
CACHES = {"BF16 KV cache": "bf16", "INT8 KV cache": "int8"}
SAME_SUMS = (ReferenceRouter, ReferenceMLP, ReferenceNorm, ReferenceAttention)


class Int8Cache(DynamicCache):
    """Keys and values as the INT8 cache of ExecuTorch's operators returns them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return super().update(int8_values(key_states), int8_values(value_states), *args, **kwargs)


def sources_of(options: ProgramOptions, crosses: bool, on_kernels: bool) -> list[str]:
    """Those of the `SOURCES` that a program has, beside INT4 weights; none in FP32."""
    if options.weights != "int4":
        return ["BF16 arithmetic"] if options.weights == "bf16" else []
    present = {
        "expert grid": crosses,
        "BF16 scales": not on_kernels,
        "INT8 activations": True,
        "INT8 expert activations": on_kernels,
        "BF16 KV cache": options.kv_cache == "bf16",
        "INT8 KV cache": options.kv_cache == "int8",
    }
    return [source for source, there in present.items() if there]


@contextmanager
def rounded_as(
    model: PreTrainedModel, sources: set[str], expert_bits: int, on_kernels: bool = False
) -> Iterator[PreTrainedModel]:
    """
    A model with these of the `SOURCES` in place: packed, but for "BF16 arithmetic".

    `on_kernels` has the activations of our operators, and all sums in their order; else they are XNNPACK's.
    """
    with ExitStack() as undo:
        if on_kernels:
            for module in put_in_place(model, SAME_SUMS, undo):
                if isinstance(module, ReferenceAttention):
                    module.kv_cache = next((kind for source, kind in CACHES.items() if source in sources), "fp32")
            for source in sources & ACTIVATIONS.keys():
                put_in_place(model, ACTIVATIONS[source], undo)
        elif "INT8 activations" in sources:
            for module in model.modules():
                if isinstance(module, Int4Linear | Int4Head):
                    hook = module.register_forward_pre_hook(lambda _, inputs: (int8_values(inputs[0]),))
                    undo.callback(hook.remove)
        if "INT8 KV cache" in sources and not on_kernels:
            # Beside what [`Int8Cache`] rounds: the operator takes queries in INT8 too.
            for layer in model.model.layers:
                hook = layer.self_attn.inputs.register_forward_hook(
                    lambda _, inputs, states: (int8_values(states[0]), *states[1:])
                )
                undo.callback(hook.remove)
        if "BF16 arithmetic" in sources:
            put_in_place(model, BF16_ARITHMETIC, undo)
        if "BF16 scales" in sources:
            round_scales(model, undo)
        if "expert grid" in sources:
            for experts in put_in_place(model, (OperatorExperts,), undo):
                experts.operator_bits = expert_bits
        yield model


def put_in_place(model: PreTrainedModel, references: tuple[type[nn.Module], ...], undo: ExitStack) -> list[nn.Module]:
    """Puts a module of one of these classes in place of every module of their base class; both share all tensors."""
    by_class = {kind.__base__: kind for kind in references}
    placed = []
    for name, module in list(model.named_modules()):
        if type(module) in by_class:
            kind = by_class[type(module)]
            # As `copy.copy`, but of another class.
            reference_module = kind.__new__(kind)
            reference_module.__setstate__(module.__getstate__())
            model.set_submodule(name, reference_module)
            undo.callback(model.set_submodule, name, module)
            placed.append(reference_module)
    return placed


def round_scales(model: PreTrainedModel, undo: ExitStack) -> None:
    """Group scales of linears and of the head to BF16."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            undo.callback(setattr, module, "weight_scale", module.weight_scale)
            module.weight_scale = bf16_scale(module.weight_scale)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The table keeps its scales, only the head's are rounded.
    table = Int4Embedding(0, 0, torch.float32)
    table.num_embeddings, table.qweight = embedding.num_embeddings, embedding.qweight
    table.weight_scale = bf16_scale(embedding.weight_scale)
    undo.callback(setattr, head, "_embedding", head._embedding)
    head._embedding = (table,)
