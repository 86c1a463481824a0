"""How far a `.pte` is from its PyTorch checkpoint on real text, and which rounding is to blame for what.

Our operators round inputs of linears to INT8 in groups; XNNPACK rounds them per token, and group scales to BF16.
Experts may cross to another grid. Each is put into the PyTorch model alone, then all together: what then still differs
is the program itself. On our operators nothing differs: `kernels/reference.py` has their bits.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mobilemoe.kernels import reference
from modeling_mobilemoe.modeling_mobilemoe import MobileMoEAttention, MobileMoEMLP, MobileMoERMSNorm, MobileMoERouter
from modeling_mobilemoe.packed_mobilemoe import Int4Embedding, Int4Experts, Int4Head, Int4Linear

from ..artifacts import LogitAgreement, Parity
from ..runtime import PteModel
from .packing import expand_rows, operator_rows
from .program import ExportModel, ProgramOptions, bf16_scale, int8_values


PROMPTS = (
    "The tallest mountain on Earth is Mount Everest, and the longest river is",
    "def factorial(n):\n    if n == 0:\n        return 1\n    return",
    "Question: A train travels 60 km in 45 minutes. What is its average speed?\nAnswer:",
    "Dear team,\n\nthank you for the report you sent on Monday. I have three questions:",
)
PROMPT_TOKENS, NEW_TOKENS = 24, 16
# Signal to noise that a correct program reaches, in dB. Only our operators have a limit on logits that holds for any
# weights: they have the bits of the reference. It leaves room for the last bit on another host.
EXACT_DB = 100.0
# XNNPACK and `llama::quantized_moe_ffn` state no order of their sums, and a deep model amplifies a last bit: an input
# moves by an INT8 step, a token to another expert. So every layer is compared alone, with the reference's input: the
# median token, and the best token of every expert that at least two tokens choose.
LAYER_DB, EXPERT_TOKENS = 60.0, 2
# The attention of `llama` over an INT8 cache also rounds queries and probabilities, and the reference does not.
INT8_CACHE_LAYER_DB = 30.0
# Their logits may be as far from the checkpoint's as the roundings alone put them, and this much.
MARGIN_DB = 3.0
# In full precision, the cosine of the median position.
MIN_COSINE = 0.999
REPORT_THIS = (
    "Nothing was written. Compare torch, torchao and executorch with the `export` extra, and report this with "
    "`pip freeze`."
)
SOURCES = (
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


ACTIVATIONS = {"INT8 activations": (ReferenceLinear, ReferenceHead), "INT8 expert activations": (ReferenceExperts,)}
CACHES = {"BF16 KV cache": "bf16", "INT8 KV cache": "int8"}
SAME_SUMS = (ReferenceRouter, ReferenceMLP, ReferenceNorm, ReferenceAttention)


class Int8Cache(DynamicCache):
    """Keys and values as the INT8 cache of ExecuTorch's operators returns them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return super().update(int8_values(key_states), int8_values(value_states), *args, **kwargs)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """
    Token ids of the prompts, at most 24 each.

    Raises:
        ValueError: when the tokenizer knows ids that the model does not.
    """
    prompts = [tokenizer(prompt).input_ids[: min(PROMPT_TOKENS, max_seq_len)] for prompt in PROMPTS]
    largest = max(max(prompt) for prompt in prompts)
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {largest}, the model has {vocab_size} tokens. "
            "Put the tokenizer.json that belongs to this checkpoint beside it."
        )
    return prompts


@contextmanager
def rounded_as(
    model: PreTrainedModel, sources: set[str], expert_bits: int, on_kernels: bool = False
) -> Iterator[PreTrainedModel]:
    """
    A packed model with these of the `SOURCES` in place.

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


class LayerRecord(NamedTuple):
    """What a layer of the reference did with the prompts."""

    # By prompt, `(2, tokens, hidden)`: input and output.
    states: list[torch.Tensor]
    # `(tokens of all prompts, top_k)`
    experts: torch.Tensor


@contextmanager
def layers_recorded(model: PreTrainedModel, prompts: list[list[int]]) -> Iterator[list[LayerRecord]]:
    """Records every layer, in their order, while the block runs the prompts as one batch."""
    layers: list[LayerRecord] = []
    chosen: list[torch.Tensor] = []

    def router_hook(_, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        chosen.append(outputs[2].view(len(prompts), -1, outputs[2].shape[-1]))

    def layer_hook(_, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        lengths = [len(prompt) for prompt in prompts]
        pairs = zip(inputs[0], output, lengths, strict=True)
        states = [torch.stack((before, after))[:, :length] for before, after, length in pairs]
        experts = torch.cat([rows[:length] for rows, length in zip(chosen[-1], lengths, strict=True)])
        layers.append(LayerRecord(states, experts))

    with ExitStack() as undo:
        for layer in model.model.layers:
            undo.callback(layer.feed_forward.router.register_forward_hook(router_hook).remove)
            undo.callback(layer.register_forward_hook(layer_hook).remove)
        yield layers


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel, prompts: list[list[int]], cache: type[DynamicCache] | None = None
) -> list[torch.Tensor]:
    """FP32 logits of every position of every prompt, each `(tokens, vocab)`."""
    # In one batch, for which every expert is expanded once; under a causal mask nothing sees the padding behind it.
    batch = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    filled = cache(config=model.config) if cache else None
    logits = model(batch, cache=filled, use_cache=cache is not None).logits.float()
    return [rows[: len(prompt)] for rows, prompt in zip(logits, prompts, strict=True)]


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompt: list[int], num_tokens: int, eos_ids: list[int]) -> list[int]:
    cache, tokens, produced = DynamicCache(config=model.config), prompt, []
    while len(produced) < num_tokens:
        logits = model(torch.tensor([tokens]), cache=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[0, -1].argmax().item()
        if token in eos_ids:
            break
        produced.append(token)
        tokens = [token]
    return produced


def compare(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> LogitAgreement:
    cosine, equal, signal, noise, kl = [], [], 0.0, 0.0, 0.0
    # One prompt at a time: in FP64 all of them would take as much memory as the program.
    for rows, others in zip(expected, actual, strict=True):
        # FP64, or equal logits would have a cosine beside 1.
        rows, others = rows.double(), others.double()
        cosine.append(torch.cosine_similarity(rows, others))
        equal.append(rows.argmax(-1) == others.argmax(-1))
        signal += rows.square().sum()
        noise += (rows - others).square().sum()
        kl += nn.functional.kl_div(others.log_softmax(-1), rows.log_softmax(-1), reduction="sum", log_target=True)
    cosine = torch.cat(cosine)
    return LogitAgreement(
        cosine_median=round(cosine.median().item(), 7),
        cosine_mean=round(cosine.mean().item(), 7),
        cosine_min=round(cosine.min().item(), 7),
        sqnr_db=round((10 * torch.log10(signal / noise.clamp(min=1e-30))).item(), 2),
        kl_nats=round((kl / len(cosine)).item(), 7),
        top1_agreement=round(torch.cat(equal).float().mean().item(), 4),
    )


class Reference:
    """
    What PyTorch computes for the prompts, before the export takes the model's weights over.

    Raises:
        ValueError: when that is not a number.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], eos_ids: list[int], max_seq_len: int):
        self.prompts = prompts
        self.checkpoint = reference_logits(model, prompts)
        if not all(rows.isfinite().all() for rows in self.checkpoint):
            raise ValueError(
                "The checkpoint gives logits that are not numbers: its weights are damaged, or its training diverged. "
                "Fetch it again, or take an earlier one."
            )
        self.same_rounding = self.checkpoint
        # Whether the program is to have the bits of `same_rounding`.
        self.exact = False
        self.layers: list[LayerRecord] = []
        self.greedy = [
            greedy_tokens(model, prompt, min(NEW_TOKENS, max_seq_len - len(prompt)), eos_ids) for prompt in prompts
        ]
        self.sources: dict[str, LogitAgreement] = {}

    def add_int4_rounding(self, model: PreTrainedModel) -> None:
        """For a full-precision checkpoint, after `quantize`: from here on the packed model is the measure."""
        self.sources["INT4 weights"] = compare(self.checkpoint, reference_logits(model, self.prompts))

    def add_sources(
        self, model: PreTrainedModel, options: ProgramOptions, crosses: bool, on_kernels: bool = False
    ) -> None:
        """Each rounding of the program alone against the packed model, then all together."""
        packed = self.checkpoint
        if self.sources:
            packed = reference_logits(model, self.prompts)
        absent = {
            "expert grid": not crosses,
            "BF16 scales": on_kernels,
            "INT8 expert activations": not on_kernels,
            "BF16 KV cache": options.kv_cache != "bf16",
            "INT8 KV cache": options.kv_cache != "int8",
        }
        present = [source for source in SOURCES if not absent.get(source)]

        def logits_with(sources: set[str]) -> list[torch.Tensor]:
            cache = Int8Cache if "INT8 KV cache" in sources and not on_kernels else None
            with rounded_as(model, sources, options.expert_bits, on_kernels):
                return reference_logits(model, self.prompts, cache)

        for source in present:
            self.sources[source] = compare(packed, logits_with({source}))
        with layers_recorded(model, self.prompts) as self.layers:
            self.same_rounding = logits_with(set(present))
        self.exact = on_kernels

    @torch.no_grad()
    def check_layers(self, program: ExportModel) -> None:
        """
        Compares every layer of a program that is not exact, before it is lowered, with the reference's.

        Raises:
            ValueError: naming the first layer that does not compute what the model's does.
        """
        if self.exact:
            return
        limit = INT8_CACHE_LAYER_DB if program.options.kv_cache == "int8" else LAYER_DB
        for index, (layer, record) in enumerate(zip(program.layers, self.layers, strict=bool(self.layers))):
            ratios = []
            for before, after in record.states:
                length = len(before)
                cos, sin = program.cos[None, :length], program.sin[None, :length]
                # Without the residual, beside which an error would look small.
                expected, actual = after - before, layer(before[None], cos, sin, 0)[0] - before
                noise = (actual - expected).square().sum(dim=-1).clamp(min=1e-30)
                ratios.append(10 * torch.log10(expected.square().sum(dim=-1) / noise))
            for name, buffer in layer.attention.named_buffers(recurse=False):
                # The cache is lowered as it is, and a program begins with an empty one.
                buffer.fill_(1 if name.endswith("_scale") else 0)
            ratios = torch.cat(ratios)
            found = {"the median token": ratios.median()}
            for expert in record.experts.unique().tolist():
                of_expert = ratios[(record.experts == expert).any(dim=-1)]
                if len(of_expert) >= EXPERT_TOKENS:
                    found[f"the best token of expert {expert}"] = of_expert.max()
            for name, ratio in found.items():
                if not ratio >= limit:
                    raise ValueError(
                        f"The exported program does not compute this model: {name} in layer {index} has a signal to "
                        f"noise of {ratio:.1f} dB, less than {limit:.0f}. {REPORT_THIS}"
                    )

    def report(self, program: PteModel) -> Parity:
        """
        Raises:
            ValueError: when the program does not compute the model.
        """
        logits = [
            torch.stack([program.forward([token], position) for position, token in enumerate(prompt)])
            for prompt in self.prompts
        ]
        # Of the prefill, all positions where the program has them, else the last one.
        whole = [
            program.all_logits(prompt) if program.has_all_logits else program.forward(prompt, 0)[None]
            for prompt in self.prompts
        ]
        agreed = total = 0
        for prompt, expected in zip(self.prompts, self.greedy, strict=True):
            produced = list(program.generate(prompt, len(expected)))
            total += len(expected)
            for ours, theirs in zip(produced, expected, strict=False):
                if ours != theirs:
                    break
                agreed += 1
        report = Parity(
            positions=sum(len(prompt) for prompt in self.prompts),
            pte_to_checkpoint=compare(self.checkpoint, logits),
            pte_to_pytorch_with_the_same_roundings=compare(self.same_rounding, logits),
            prefill_to_token_by_token=compare(
                [stepped[-len(rows) :] for stepped, rows in zip(logits, whole, strict=True)], whole
            ),
            sources=self.sources,
            greedy_tokens_equal=agreed,
            greedy_tokens=total,
        )
        self.judge(report)
        return report

    def judge(self, report: Parity) -> None:
        """
        Raises:
            ValueError: when the program does not compute the model.
        """
        needed = EXACT_DB
        if not self.exact:
            needed = compare(self.checkpoint, self.same_rounding).sqnr_db - MARGIN_DB
        for name in ("pte_to_pytorch_with_the_same_roundings", "prefill_to_token_by_token"):
            agreement: LogitAgreement = report.__dict__[name]
            if self.same_rounding is self.checkpoint:
                said, limit = agreement.cosine_median, MIN_COSINE
                quantity = "median cosine"
            else:
                said, limit, quantity = agreement.sqnr_db, needed, "signal to noise in dB"
            if not said >= limit:
                raise ValueError(
                    f"The exported program does not compute this model: the {quantity} of {name} is {said}, less than "
                    f"{limit:.5g}. {REPORT_THIS}"
                )
