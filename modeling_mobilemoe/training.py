"""What the training recipe of the paper needs and TRL lacks: routing, data mixtures, a toy tokenizer."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .configuration_mobilemoe import MobileMoEConfig
from .modeling_mobilemoe import MobileMoEFeedForward, MobileMoEForCausalLM, MobileMoERouter


CHAT_TEMPLATE = Path(__file__).parent.joinpath("chat_template.jinja").read_text()

# The pre-tokenizer of the released tokenizer.json: the Llama-3 split, then bytes.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Released special tokens by their distance from the first special id (128000 in the releases).
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    5: "<|header_start|>",
    6: "<|header_end|>",
    7: "<|eom|>",
    8: "<|eot|>",
}
NUM_TOY_SPECIAL_TOKENS = 16


@dataclass
class DataSource:
    """
    One part of a mixture.

    Args:
        path (`str`): Hub data set, or `json`, `text`, `parquet` with `data_files`.
        weight (`float`): share of the examples that come from here; the weights of a mixture sum to 1.
        data_files (`str`, *optional*): local files for a format path.
        name (`str`, *optional*): configuration of a Hub data set.
        split (`str`, defaults to `"train"`): its split.
    """

    path: str
    weight: float = 1.0
    data_files: str | None = None
    name: str | None = None
    split: str = "train"


@dataclass
class RecipeArguments:
    """
    What a recipe needs beside TRL's `SFTConfig`.

    Args:
        model (`str`): checkpoint directory or Hub id; random weights where there is only a `config.json`.
        tokenizer (`str`, *optional*): where the tokenizer is, when not with the model.
        data (`list[DataSource]`): the mixture.
        expert_bias_update_rate (`float`, defaults to 1e-3): step of the balancing bias; 0 turns balancing off.
        router_z_loss_coef (`float`, defaults to 1e-4): weight of the router z-loss; 0 turns it off.
        capacity_factor (`float`, *optional*): drop what an expert gets beyond this multiple of an even share, as the
            paper does in pre- and mid-training; nothing is dropped when absent.
    """

    model: str = field(metadata={"help": "Checkpoint directory or Hub id, or a directory with a config.json."})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "Mixture, set in the YAML file."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    expert_bias_update_rate: float = field(default=1e-3, metadata={"help": "Step of the balancing bias."})
    router_z_loss_coef: float = field(default=1e-4, metadata={"help": "Weight of the router z-loss."})
    capacity_factor: float | None = field(default=None, metadata={"help": "Tokens per expert over an even share."})

    def __post_init__(self) -> None:
        self.data = [source if isinstance(source, DataSource) else DataSource(**source) for source in self.data]


def load_model(path: str) -> MobileMoEForCausalLM:
    """A checkpoint in FP32 master weights, or, where there is only a `config.json`, a new model from it."""
    directory = Path(path)
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        return MobileMoEForCausalLM(MobileMoEConfig.from_pretrained(directory))
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_mixture(sources: list[DataSource], columns: list[str], seed: int, streaming: bool = False):
    """
    Loads data sets and interleaves them by weight, deterministically under a seed.

    Args:
        sources (`list[DataSource]`): at least one; the weights sum to 1.
        columns (`list[str]`): columns to keep; every source must have them.
        seed (`int`): of the interleaving.
        streaming (`bool`, defaults to `False`): read as training goes instead of preparing everything first.

    Raises:
        ValueError: for no source, weights that do not sum to 1, or a missing column.
    """
    from datasets import interleave_datasets, load_dataset

    if not sources:
        raise ValueError("The recipe names no data. Add a `data` list of {path, weight, ...} to the YAML file.")
    total = sum(source.weight for source in sources)
    if abs(total - 1) > 1e-6 or any(source.weight <= 0 for source in sources):
        weights = [source.weight for source in sources]
        raise ValueError(f"The data weights {weights} sum to {total:g}. Set positive weights that sum to 1.")
    parts = []
    for source in sources:
        part = load_dataset(
            source.path, source.name, data_files=source.data_files, split=source.split, streaming=streaming
        )
        names = part.column_names or list(next(iter(part)))
        missing = sorted(set(columns) - set(names))
        if missing:
            raise ValueError(
                f"Data source {source.data_files or source.path} has the columns {names} and lacks {missing}. "
                f"This recipe reads {columns}: rename the columns or take another source."
            )
        parts.append(part.select_columns(columns))
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in sources]
    return interleave_datasets(parts, weights, seed=seed, stopping_strategy="first_exhausted")


class _AddLossGradient(torch.autograd.Function):
    """Hands `value` on and gives `loss` the gradient that it would have as a term of the training loss."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_output, torch.ones((), dtype=torch.float32, device=grad_output.device)


def router_z_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared log-sum-exp of the router logits `(tokens, E)` (ST-MoE, arXiv 2202.08906)."""
    return router_logits.logsumexp(dim=-1).square().mean()


def add_router_z_loss(model: PreTrainedModel, coefficient: float, gradient_accumulation_steps: int = 1) -> None:
    """
    Adds the z-loss of every router to what the model trains on, the paper's lambda_z.

    TRL computes its loss from hidden states and head, past the model's own forward, so a term added there would be
    lost. Hooks on the routers add its gradient instead, which is all that training needs of it.

    Args:
        model (`PreTrainedModel`): the model that trains.
        coefficient (`float`): weight of the term, per layer.
        gradient_accumulation_steps (`int`, defaults to 1): micro-batches that share an optimizer step.
    """

    def hook(router, args, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
        router_logits, top_k_weights, top_k_index = output
        if not (router.training and torch.is_grad_enabled()):
            return None
        loss = coefficient / gradient_accumulation_steps * router_z_loss(router_logits)
        return router_logits, _AddLossGradient.apply(top_k_weights, loss), top_k_index

    for module in model.modules():
        if isinstance(module, MobileMoERouter):
            module.register_forward_hook(hook)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Tokens that one expert takes of a batch: an even share times the factor, rounded up."""
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def capacity_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    capacity_factor: float,
) -> torch.Tensor:
    """
    Drop-and-pad dispatch: every expert gets one block of the same size; what does not fit is dropped, in token order.

    A static shape for the hardware, as in the paper's pre- and mid-training. Outside training nothing is dropped.
    Shapes as in the experts interface of transformers.
    """
    num_tokens, top_k = top_k_index.shape
    capacity = expert_capacity(num_tokens, top_k, experts.num_experts, capacity_factor)
    if not experts.training:
        capacity = num_tokens
    # An expert's assignments in token order: the rank of an assignment is the number of earlier ones to its expert.
    expert_ids = top_k_index.flatten()  # (tokens * top_k,)
    order = expert_ids.argsort(stable=True)
    counts = torch.bincount(expert_ids, minlength=experts.num_experts)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(order), device=order.device) - starts[expert_ids[order]]
    kept = order[slot < capacity]
    slot = slot[slot < capacity]
    token_ids = kept // top_k

    blocks = hidden_states.new_zeros(experts.num_experts, capacity, hidden_states.shape[-1])  # (E, C, H)
    blocks = blocks.index_put((expert_ids[kept], slot), hidden_states[token_ids])
    gate, up = torch.bmm(blocks, experts.gate_up_proj).chunk(2, dim=-1)  # (E, C, I)
    blocks = torch.bmm(experts.act_fn(gate) * up, experts.down_proj)  # (E, C, H)
    outputs = blocks[expert_ids[kept], slot] * top_k_weights.flatten()[kept, None]
    return torch.zeros_like(hidden_states).index_add(0, token_ids, outputs.to(hidden_states.dtype))


def set_capacity_factor(model: PreTrainedModel, capacity_factor: float) -> None:
    """
    Switches the experts of a model to drop-and-pad dispatch, registered as an experts implementation of transformers.

    Raises:
        ValueError: for a factor below 1, which would drop tokens of an evenly loaded batch.
    """
    if capacity_factor < 1:
        raise ValueError(
            f"capacity_factor={capacity_factor} is below 1, so even a perfectly balanced batch would lose tokens. "
            "Set 1 or more (the paper: 1.5), or leave it out to drop nothing."
        )
    name = f"capacity_{capacity_factor:g}"
    ALL_EXPERTS_FUNCTIONS.register(name, partial(capacity_experts_forward, capacity_factor=capacity_factor))
    model.set_experts_implementation(name)


class ExpertBiasCallback(TrainerCallback):
    """
    Loss-free load balancing: after every optimizer step the bias of an expert that got more than its share of tokens
    goes down by `update_rate`, that of one that got less goes up (paper section 2.3; arXiv 2408.15664).

    Counts are summed over micro-batches and over all processes. They are taken by hooks on the routers while the model
    trains, so the forward pass knows nothing of them. `history` holds one row per step, with a value per layer for the
    load of the busiest expert over the mean, the share of dropped assignments, the entropy of the routing scores (in
    nats, of at most ln E) and the z-loss; `load` holds the last step's counts.

    Args:
        model (`PreTrainedModel`): the model that trains.
        update_rate (`float`, defaults to 1e-3): the paper's lambda_lb; 0 only records.
        capacity_factor (`float`, *optional*): that of the dispatch, to count what it drops.
    """

    def __init__(self, model: PreTrainedModel, update_rate: float = 1e-3, capacity_factor: float | None = None):
        self.update_rate = update_rate
        self.capacity_factor = capacity_factor
        self.layers = [module for module in model.modules() if isinstance(module, MobileMoEFeedForward)]
        device = self.layers[0].expert_bias.device
        self.counts = torch.zeros(len(self.layers), len(self.layers[0].expert_bias), device=device)
        self.load = self.counts
        # Per layer: dropped assignments, sum of entropies, sum of z-losses, number of forward passes.
        self.sums = torch.zeros(len(self.layers), 4, device=device)
        self.history: list[dict] = []
        for index, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._count_hook(index))

    def _count_hook(self, index: int):
        @torch.no_grad()
        def hook(router, args, output) -> None:
            if not router.training:
                return
            router_logits, _, top_k_index = output
            num_experts = self.counts.shape[1]
            counts = torch.bincount(top_k_index.flatten(), minlength=num_experts)
            self.counts[index] += counts
            if self.capacity_factor is not None:
                capacity = expert_capacity(*top_k_index.shape, num_experts, self.capacity_factor)
                self.sums[index, 0] += (counts - capacity).clamp(min=0).sum()
            scores = router_logits.sigmoid()
            shares = scores / scores.sum(dim=-1, keepdim=True)
            self.sums[index, 1] -= torch.xlogy(shares, shares).sum(dim=-1).mean()
            self.sums[index, 2] += router_z_loss(router_logits)
            self.sums[index, 3] += 1

        return hook

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
            torch.distributed.all_reduce(self.sums)
        mean = self.counts.mean(dim=1, keepdim=True)  # (layers, 1)
        for layer, direction in zip(self.layers, torch.sign(mean - self.counts), strict=True):
            layer.expert_bias += self.update_rate * direction.to(layer.expert_bias.device)
        dropped, entropy, z_loss, passes = self.sums.unbind(1)
        row = {
            "imbalance": self.counts.amax(dim=1) / mean.squeeze(1),
            "dropped": dropped / self.counts.sum(dim=1),
            "entropy": entropy / passes,
            "z_loss": z_loss / passes,
        }
        self.history.append({"step": state.global_step + 1} | {name: value.tolist() for name, value in row.items()})
        self.load, self.counts = self.counts, torch.zeros_like(self.counts)
        self.sums = torch.zeros_like(self.sums)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.history and logs is not None:
            last = self.history[-1]
            logs["load_imbalance"] = round(max(last["imbalance"]), 3)
            logs["dropped_tokens"] = round(statistics.mean(last["dropped"]), 4)
            logs["router_entropy"] = round(statistics.mean(last["entropy"]), 4)
            logs["router_z_loss"] = round(statistics.mean(last["z_loss"]), 4)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            report = {"history": self.history, "load": self.load.tolist()}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(args.output_dir, "expert_load.json").write_text(json.dumps(report) + "\n")


def set_up_routing(
    model: PreTrainedModel, recipe: RecipeArguments, gradient_accumulation_steps: int
) -> ExpertBiasCallback:
    """Dispatch, z-loss and balancing as a recipe asks for them; the callback goes to the trainer."""
    if recipe.capacity_factor is not None:
        set_capacity_factor(model, recipe.capacity_factor)
    if recipe.router_z_loss_coef:
        add_router_z_loss(model, recipe.router_z_loss_coef, gradient_accumulation_steps)
    return ExpertBiasCallback(model, recipe.expert_bias_update_rate, recipe.capacity_factor)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a small tokenizer of the released shape: byte-level BPE, the Llama-3 split, no normalizer, BOS in front, and
    the released special tokens at the end of the vocabulary, at the released distances from each other.

    Args:
        texts (iterator of `str`): training text.
        vocab_size (`int`): all ids, the 16 special ones included.
    """
    first_special = vocab_size - NUM_TOY_SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet))
    if tokenizer.get_vocab_size() != first_special:
        raise ValueError(
            f"The text yields {tokenizer.get_vocab_size()} tokens, but vocab_size={vocab_size} needs {first_special}. "
            "Give more text or a smaller vocabulary."
        )
    special_tokens = [SPECIAL_TOKENS.get(i, f"<|reserved_special_token_{i}|>") for i in range(NUM_TOY_SPECIAL_TOKENS)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    bos = SPECIAL_TOKENS[0]
    prepend_bos = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, first_special)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), prepend_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[1],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
