"""What the training recipe of the paper needs and TRL lacks: expert-bias balancing, data mixtures, a toy tokenizer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from .configuration_mobilemoe import MobileMoEConfig
from .modeling_mobilemoe import MobileMoEFeedForward, MobileMoEForCausalLM


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
    """

    model: str = field(metadata={"help": "Checkpoint directory or Hub id, or a directory with a config.json."})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "Mixture, set in the YAML file."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    expert_bias_update_rate: float = field(default=1e-3, metadata={"help": "Step of the balancing bias."})

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


class ExpertBiasCallback(TrainerCallback):
    """
    Loss-free load balancing: after every optimizer step the bias of an expert that got more than its share of tokens
    goes down by `update_rate`, that of one that got less goes up (paper section 2.3; arXiv 2408.15664).

    Counts are summed over micro-batches and over all processes. They are taken by hooks on the routers while the model
    trains, so the forward pass knows nothing of them. `history` holds one row per step, `counts` the last step's load.

    Args:
        model (`PreTrainedModel`): the model that trains.
        update_rate (`float`, defaults to 1e-3): the paper's lambda_lb; 0 only records the load.
    """

    def __init__(self, model: PreTrainedModel, update_rate: float = 1e-3):
        self.update_rate = update_rate
        self.layers = [module for module in model.modules() if isinstance(module, MobileMoEFeedForward)]
        device = self.layers[0].expert_bias.device
        self.counts = torch.zeros(len(self.layers), len(self.layers[0].expert_bias), device=device)
        self.load = self.counts
        self.history: list[dict] = []
        for index, layer in enumerate(self.layers):
            layer.router.register_forward_hook(self._count_hook(index))

    def _count_hook(self, index: int):
        def hook(router, args, output) -> None:
            if router.training:
                top_k_index = output[2]
                self.counts[index] += torch.bincount(top_k_index.flatten(), minlength=self.counts.shape[1])

        return hook

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        mean = self.counts.mean(dim=1, keepdim=True)  # (layers, 1)
        for layer, direction in zip(self.layers, torch.sign(mean - self.counts), strict=True):
            layer.expert_bias += self.update_rate * direction.to(layer.expert_bias.device)
        imbalance = (self.counts.amax(dim=1) / mean.squeeze(1)).tolist()
        self.history.append({"step": state.global_step + 1, "imbalance": imbalance})
        self.load, self.counts = self.counts, torch.zeros_like(self.counts)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.history and logs is not None:
            logs["load_imbalance"] = round(max(self.history[-1]["imbalance"]), 3)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            report = {"history": self.history, "load": self.load.tolist()}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(args.output_dir, "expert_load.json").write_text(json.dumps(report) + "\n")


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
