"""What the exporters to other runtimes share: a checkpoint read weight by weight, a directory written whole."""

import json
import logging
import math
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_mobilemoe.checkpoint_mobilemoe import EXPERT_SUFFIX, check_checkpoint, check_index
from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import unpack_int4
from modeling_mobilemoe.quantization_mobilemoe import (
    PACKED_NAMES,
    MobileMoEInt4Config,
    check_tensor,
)
from modeling_mobilemoe.saving_mobilemoe import remove_remnants, replace_when_complete

from ..artifacts import (
    EXPORT_FILE,
    GenerationFile,
    LogitAgreement,
    RuntimeExport,
    is_pte,
    load_tokenizer,
    local_checkpoint,
    weights_sha256,
)
from ..machine import available_memory, package_versions, peak_memory
from .exporter import check_absent, check_config, check_place, load_exact, stop_signal_as_exit
from .parity import compare, encode_prompts, reference_logits
from .relayout import LAYER, Weight, relayout


logger = logging.getLogger(__name__)

# Of logits, median over positions. Runtimes that round activations to 8 bits leave 0.999 and more; one that computes
# another model leaves less than this.
MIN_COSINE = 0.99
# A weight is in memory at a time while the files are written; the comparison loads whole models, so it has a limit.
PARITY_MEMORY = 4e9
# Kinds of tensors, by how a name in the new layout begins within its layer.
GROUPS = {
    "self_attn.q_norm": "norms",
    "self_attn.k_norm": "norms",
    "self_attn.": "attention",
    "mlp.experts.": "experts",
    "mlp.shared_experts.": "shared expert",
    "mlp.gate.": "router",
    "model.embed_tokens.": "embedding",
}


def skeleton(config: MobileMoEConfig) -> torch.nn.Module:
    """The model on the meta device, with packed modules where the config asks for them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def plan(config: MobileMoEConfig) -> Iterator[tuple[str, Weight]]:
    """Names and shapes, on the meta device, of what [`Source.relayouted`] reads, in the same order."""
    for name, weight in weights_of(skeleton(config).state_dict(), config):
        yield from relayout({name: weight}, config).items()


def weights_of(
    tensors: dict[str, torch.Tensor], config: MobileMoEConfig, read: Callable[[str], torch.Tensor] | None = None
) -> Iterator[tuple[str, Weight]]:
    """The weights of a state dict in its order, integers unpacked; `read` gives the tensors where these are meta."""
    read = read or tensors.__getitem__
    scales = {packed: (name, scale) for name, (packed, scale) in PACKED_NAMES.items()}
    scale_names = {scale for _, scale in PACKED_NAMES.values()}
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if prefix == "lm_head" or last in scale_names:
            continue
        if last not in scales:
            yield name, Weight(read(name))
            continue
        plain, scale = scales[last]
        group_dim = -1
        if plain != "weight":
            group_dim = MobileMoEInt4Config(**config.quantization).int4_format.expert_dim
        yield f"{prefix}.{plain}", Weight(unpack_int4(read(name)), read(f"{prefix}.{scale}"), group_dim)


class Source:
    """
    A checkpoint that was checked as far as its headers tell.

    Args:
        model (`str` or `Path`): directory or Hub id, packed or full precision.
        output_dir (`str` or `Path`): what will be made of it; must not exist.

    Raises:
        ValueError: for an output that exists, a program, another architecture, or files that are damaged or do not
            fit the config.
    """

    def __init__(self, model: str | Path, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        check_absent(self.output_dir)
        if is_pte(model):
            raise ValueError(
                f"{model} is a program for ExecuTorch, whose weights are packed for its operators. "
                "Name the checkpoint that it was exported from."
            )
        self.model = str(model)
        self.path = local_checkpoint(model)
        self.config = check_config(self.path, None)
        self.is_int4 = self.config.quantization is not None
        check_index(self.path)
        index = self.path / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self.files = [str(self.path / name) for name in names]
        self._tensors = skeleton(self.config)
        check_checkpoint(self._tensors, self.files)
        self._tensors = self._tensors.state_dict()
        self._places = {}
        dtypes = set()
        for file in self.files:
            with safe_open(file, framework="pt") as reader:
                for stored_name in reader.keys():
                    name = re.sub(*EXPERT_SUFFIX, stored_name)
                    name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
                    self._places[name] = (file, stored_name)
                    if not name.endswith(("router.weight", "expert_bias")):
                        dtypes.add(reader.get_slice(stored_name).get_dtype())
        # Of the matrices; the router is FP32 everywhere.
        self.dtype = torch.bfloat16 if dtypes == {"BF16"} else torch.float32
        self.tokenizer = load_tokenizer(self.path)
        # The released value drops spaces before punctuation from what was generated.
        self.tokenizer.clean_up_tokenization_spaces = False
        self.prompts = encode_prompts(self.tokenizer, self.config.vocab_size, self.config.max_position_embeddings)

    @property
    def expert_axis(self) -> str | None:
        """Axis along which packed experts are grouped, `None` in full precision."""
        return MobileMoEInt4Config(**self.config.quantization).int4_format.expert_axis if self.is_int4 else None

    @property
    def num_bytes(self) -> int:
        """Of the weights as stored."""
        return sum(Path(file).stat().st_size for file in self.files)

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a sequence or a turn, whichever file names it."""
        ids = {self.tokenizer.eos_token_id, self.tokenizer.get_vocab().get("<|eot|>")}
        generation = self.path / "generation_config.json"
        stored = GenerationFile.load(generation).eos_token_id if generation.is_file() else None
        for value in (self.config.eos_token_id, stored):
            ids.update(value if isinstance(value, list) else [value])
        return sorted(ids - {None})

    @property
    def licence(self) -> dict[str, str]:
        """`license`, `license_name` and `license_link` as far as the checkpoint's model card has them."""
        card = self.path / "README.md"
        if not card.is_file():
            return {}
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        keys = ("license", "license_name", "license_link")
        return {key: data[key] for key in keys if isinstance(data.get(key), str)}

    def relayouted(self, description: str) -> Iterator[tuple[str, Weight]]:
        """
        The weights in the new layout, one after the other, with a progress bar.

        Raises:
            ValueError: for values that no training writes.
        """
        total = sum(1 for _ in weights_of(self._tensors, self.config))
        weights = weights_of(self._tensors, self.config, self._read)
        for name, weight in tqdm(weights, total=total, desc=description, unit="weight"):
            yield from relayout({name: weight}, self.config).items()

    def _read(self, name: str) -> torch.Tensor:
        file, stored_name = self._places[name]
        try:
            # Opened for each tensor: what is mapped counts as memory of this process until the file is closed.
            with safe_open(file, framework="pt") as reader:
                tensor = reader.get_tensor(stored_name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}. It is damaged: fetch or save it again.") from error
        check_tensor(name, tensor)
        return tensor

    def save_tokenizer(self, directory: Path) -> None:
        """The tokenizer and the ids that end a generation."""
        self.tokenizer.save_pretrained(directory)
        ends = GenerationConfig(bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.eos_ids)
        ends.save_pretrained(directory)

    @contextmanager
    def directory(self, size: int) -> Generator[Path, None, None]:
        """A temporary directory that becomes the output when the block ends well, and leaves nothing otherwise."""
        logger.info(f"{size / 1e6:,.0f} MB to write")
        remove_remnants(self.output_dir)
        check_place(self.output_dir, size)
        with stop_signal_as_exit(), replace_when_complete(self.output_dir) as partial:
            yield partial

    def save_report(
        self,
        directory: Path,
        to: str,
        rounding: "Rounding",
        packages: tuple[str, ...],
        compare_runtime: Callable[[], LogitAgreement | str],
        **settings: str | None,
    ) -> None:
        """Compares what was written with PyTorch, and describes it in `export.json`."""
        files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
        memory = peak_memory()
        outcome = compare_runtime()
        RuntimeExport(
            model=self.model,
            to=to,
            weights_sha256=weights_sha256(self.path),
            versions=package_versions(("mobilemoe", "torch", "transformers", "safetensors", *packages)),
            expert_axis=self.expert_axis,
            rounding=rounding.report(),
            eos_ids=self.eos_ids,
            license=self.licence.get("license"),
            files=files,
            peak_memory_bytes=memory,
            parity=None if isinstance(outcome, str) else outcome,
            not_compared=outcome if isinstance(outcome, str) else None,
            **settings,
        ).save(directory / EXPORT_FILE)

    def parity(self, size: int, load: Callable[[], Callable[[list[int]], torch.Tensor] | str]) -> LogitAgreement | str:
        """
        How far a runtime's logits are from PyTorch's on a few prompts; a reason where that cannot be said.

        Args:
            size (`int`): bytes that the runtime loads.
            load (`Callable`): loads them and returns a function from token ids to FP32 logits of every position,
                `(tokens, vocab)`, or why it cannot.

        Raises:
            ValueError: when they are not those of this model.
        """
        needed, free = 1e9 + 1.3 * max(size, self.num_bytes), available_memory()
        limit = PARITY_MEMORY if free is None else min(free, PARITY_MEMORY)
        if needed > limit:
            return f"not compared: takes about {needed / 1e9:.1f} GB of memory, the limit is {limit / 1e9:.1f} GB"
        # A packed model stays packed in FP32, a full-precision one is not widened.
        model = load_exact(self.path) if self.is_int4 else AutoModelForCausalLM.from_pretrained(self.path).eval()
        expected = reference_logits(model, self.prompts)
        del model
        # Only now, so that the two are not in memory together.
        logits = load()
        if isinstance(logits, str):
            return logits
        result = compare(expected, [logits(prompt) for prompt in self.prompts])
        # The negation also holds for a cosine that is no number.
        if not result.cosine_median >= MIN_COSINE:
            raise ValueError(
                f"The runtime's logits have a median cosine of {result.cosine_median} to PyTorch's, less than "
                f"{MIN_COSINE}: this version of it does not compute the model. Update it, or uninstall it here to "
                "export without a comparison."
            )
        return result


def group_of(name: str) -> str:
    """The kind of a tensor in the new layout."""
    within = LAYER.fullmatch(name)[2]
    return next((group for start, group in GROUPS.items() if within.startswith(start)), "norms")


class Shards:
    """
    Writes tensors to safetensors files of at most 1 GB, as they come.

    Args:
        directory (`Path`): where to.
        metadata (`dict`): of every file.
    """

    max_bytes = 10**9

    def __init__(self, directory: Path, metadata: dict[str, str]):
        self.directory, self.metadata = directory, metadata
        self._tensors: dict[str, torch.Tensor] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._pending = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._tensors and self._pending + tensor.nbytes > self.max_bytes:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._pending += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, and gives the files their names, which say how many there are."""
        self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for index, (path, names) in enumerate(self._written, 1):
            path = path.rename(self.directory / f"model-{index:05d}-of-{len(self._written):05d}.safetensors")
            weight_map |= dict.fromkeys(names, path.name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        path = self.directory / f"{len(self._written)}.safetensors"
        try:
            save_file(self._tensors, path, self.metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}. Free space, or name another output.") from error
        self._written.append((path, list(self._tensors)))
        self._tensors, self._pending = {}, 0


class Rounding:
    """What writing did to the weights, by kind of tensor."""

    def __init__(self) -> None:
        self._powers: dict[str, list[float]] = {}

    def add(self, name: str, weight: Weight, written: torch.Tensor | None = None) -> None:
        """Compares a weight with what was read back of it; nothing was rounded when that is absent."""
        signal, noise = self._powers.setdefault(group_of(name), [0.0, 0.0])
        if written is not None:
            expected = weight.float()
            # In FP64: the sum over a hundred million squares would stop growing in FP32.
            signal += expected.square().sum(dtype=torch.float64).item()
            noise += (expected - written).square_().sum(dtype=torch.float64).item()
        self._powers[group_of(name)] = [signal, noise]

    def report(self) -> dict[str, str]:
        """By kind of tensor: "bit-exact", or the signal-to-noise ratio in dB."""
        return {
            group: "bit-exact" if noise == 0 else f"{10 * math.log10(signal / noise):.1f} dB"
            for group, (signal, noise) in self._powers.items()
        }
