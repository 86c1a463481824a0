"""How far a `.pte` is from its PyTorch checkpoint on real text, and which rounding is to blame for what.

Each rounding of the program is put into the PyTorch model alone, then all together (roundings.py): what then still
differs is the program itself. On our operators that is nothing. The stock ones leave a last bit open, which a deep
model amplifies, so before it is lowered every part of the program is compared alone, with the reference's input.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..artifacts import LogitAgreement, Parity
from ..runtime import PteModel
from .program import DelegatedLayer, ExportModel, ProgramOptions
from .roundings import Int8Cache, rounded_as, sources_of


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
# moves by an INT8 step, a token to another expert. So every part is compared alone, with the reference's input.
# The median token has at most a few inputs that moved by a step, and few tokens moved to another expert.
PART_DB, MOVED_DB, MOVED_TOKENS = 60.0, 30.0, 0.05
# Their logits are judged by the cosine of the median position: one token that moved to another expert may be all the
# noise of a small model. Where the roundings alone put it lower, it may be this many times as far from 1 as they do,
# because in a deep model two correct programs differ as much as each does from the checkpoint.
MIN_COSINE, TIMES_THE_ROUNDINGS = 0.999, 4.0
REPORT_THIS = (
    "Nothing was written. Compare torch, torchao and executorch with the `export` extra, and report this with "
    "`pip freeze`."
)


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


class LayerRecord(NamedTuple):
    """What a layer of the reference did with the prompts."""

    # By prompt, `(3, tokens, hidden)`: before attention, after it, after the layer.
    states: list[torch.Tensor]
    # `(tokens of all prompts, top_k)`
    experts: torch.Tensor


def bias_for(group: int, top_k: int, num_experts: int) -> torch.Tensor:
    """An expert bias with which any token takes these `top_k` experts."""
    bias = torch.zeros(num_experts)
    bias[torch.arange(group * top_k, (group + 1) * top_k) % num_experts] = 10
    return bias


@contextmanager
def layers_recorded(model: PreTrainedModel, prompts: list[list[int]]) -> Iterator[list[LayerRecord]]:
    """Records every layer, in their order, while the block runs the prompts as one batch."""
    layers: list[LayerRecord] = []
    attended: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    lengths = [len(prompt) for prompt in prompts]

    def norm_hook(_, inputs: tuple[torch.Tensor, ...]) -> None:
        attended.append(inputs[0])

    def router_hook(_, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        chosen.append(outputs[2].view(len(prompts), -1, outputs[2].shape[-1]))

    def layer_hook(_, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        states = torch.stack((inputs[0], attended[-1], output))  # (3, prompts, tokens, hidden)
        experts = torch.cat([rows[:length] for rows, length in zip(chosen[-1], lengths, strict=True)])
        layers.append(LayerRecord([states[:, i, :length] for i, length in enumerate(lengths)], experts))

    with ExitStack() as undo:
        for layer in model.model.layers:
            undo.callback(layer.post_attention_layernorm.register_forward_pre_hook(norm_hook).remove)
            undo.callback(layer.feed_forward.router.register_forward_hook(router_hook).remove)
            undo.callback(layer.register_forward_hook(layer_hook).remove)
        yield layers


@torch.no_grad()
def every_expert(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    What the routed experts of a layer compute, with a token for every `top_k` of them.

    Returns:
        Inputs and outputs of the experts, `(2, E / top_k, hidden)`.
    """
    router = layer.feed_forward.router
    num_experts, top_k = len(router.weight), router.top_k
    num_groups = -(-num_experts // top_k)
    inputs = layer.post_attention_layernorm(hidden_states[torch.arange(num_groups) % len(hidden_states)])
    routed = [router(token[None], bias_for(group, top_k, num_experts)) for group, token in enumerate(inputs)]
    _, weights, index = (torch.cat(rows) for rows in zip(*routed, strict=True))
    return torch.stack((inputs, layer.feed_forward.experts(inputs, index, weights)))


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
        # By layer, see [`every_expert`].
        self.every_expert: list[torch.Tensor] = []
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
        """Each rounding of the program alone against the model with its weights, then all together."""
        unrounded = self.checkpoint
        if self.sources:
            unrounded = reference_logits(model, self.prompts)
        present = sources_of(options, crosses, on_kernels)

        def logits_with(sources: set[str]) -> list[torch.Tensor]:
            cache = Int8Cache if "INT8 KV cache" in sources and not on_kernels else None
            with rounded_as(model, sources, options.expert_bits, on_kernels):
                return reference_logits(model, self.prompts, cache)

        for source in present:
            self.sources[source] = compare(unrounded, logits_with({source}))
        with layers_recorded(model, self.prompts) as self.layers:
            self.same_rounding = logits_with(set(present))
        self.exact = on_kernels
        if not self.exact:
            with rounded_as(model, set(present), options.expert_bits):
                pairs = zip(model.model.layers, self.layers, strict=True)
                self.every_expert = [
                    every_expert(layer, torch.cat(record.states, dim=1)[1]) for layer, record in pairs
                ]

    @torch.no_grad()
    def check_parts(self, program: ExportModel) -> None:
        """
        Compares every part of a program that is not exact, before it is lowered, with the reference's.

        Raises:
            ValueError: naming the first part that does not compute what the model's does.
        """
        if self.exact:
            return
        first, last = self.layers[0], self.layers[-1]
        rows = torch.cat([program.embed_tokens(torch.tensor(prompt)).float() for prompt in self.prompts])
        self._check_part("embedding", torch.cat([states[0] for states in first.states]), rows, moved_tokens=0)
        for index, (layer, record) in enumerate(zip(program.layers, self.layers, strict=True)):
            self._check_layer(index, layer, record, program)
            self._check_experts(index, layer.moe)
        logits = program.lm_head(program.norm(torch.cat([states[2] for states in last.states])))
        self._check_part("head", torch.cat(self.same_rounding), logits)

    def _check_layer(self, index: int, layer: DelegatedLayer, record: LayerRecord, program: ExportModel) -> None:
        before, middle, after = torch.cat(record.states, dim=1)
        attended = []
        for states, _, _ in record.states:
            # In two calls, the second of which reads what the first left in the cache.
            for part in torch.arange(len(states)).split(-(-len(states) // 2)):
                cos, sin = program.cos[None, part], program.sin[None, part]
                attended.append(layer.attend(states[None, part], cos, sin, int(part[0]))[0])
        for name, buffer in layer.attention.named_buffers(recurse=False):
            # The cache is lowered as it is, and a program begins with an empty one.
            buffer.fill_(1 if name.endswith("_scale") else 0)
        # Without the residual, beside which an error would look small.
        self._check_part(f"attention of layer {index}", middle - before, torch.cat(attended))
        self._check_part(f"feed-forward of layer {index}", after - middle, layer.feed_forward(middle[None])[0])

    def _check_experts(self, index: int, moe: nn.Module) -> None:
        bias = moe.expert_bias
        for group, (inputs, expected) in enumerate(zip(*self.every_expert[index], strict=True)):
            moe.expert_bias = bias_for(group, moe.top_k, len(bias))
            self._check_part(f"experts from {group * moe.top_k} of layer {index}", expected[None], moe(inputs[None]))
        moe.expert_bias = bias

    def _check_part(
        self,
        name: str,
        expected: torch.Tensor,
        actual: torch.Tensor,
        moved_tokens: float = MOVED_TOKENS,
    ) -> None:
        noise = (actual - expected).square().sum(dim=-1).clamp(min=1e-30)
        ratios = 10 * torch.log10(expected.square().sum(dim=-1) / noise)
        moved = (ratios < MOVED_DB).float().mean()
        if not (ratios.median() >= PART_DB and moved <= moved_tokens):
            raise ValueError(
                f"The exported program does not compute this model: of the {name}, the median token has a signal to "
                f"noise of {ratios.median():.1f} dB, at least {PART_DB:.0f} is needed, and {moved:.0%} of the tokens "
                f"have less than {MOVED_DB:.0f}, at most {moved_tokens:.0%} may. {REPORT_THIS}"
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
        quantity, limit = "signal to noise in dB", EXACT_DB
        if not self.exact:
            rounded = compare(self.checkpoint, self.same_rounding).cosine_median
            quantity, limit = "median cosine", min(MIN_COSINE, 1 - TIMES_THE_ROUNDINGS * (1 - rounded))
        for name in ("pte_to_pytorch_with_the_same_roundings", "prefill_to_token_by_token"):
            agreement: LogitAgreement = report.__dict__[name]
            measured = agreement.sqnr_db if self.exact else agreement.cosine_median
            if not measured >= limit:
                raise ValueError(
                    f"The exported program does not compute this model: the {quantity} of {name} is {measured}, less "
                    f"than {limit:.5g}. {REPORT_THIS}"
                )
