"""How checkpoints are loaded and saved: they are checked before loading, and replaced only when a save is complete."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from .quantization_mobilemoe import check_values
from .saving_mobilemoe import COMMITTED_INDEX, INDEX_FILE, committed_save, replace_when_complete


# Some exports of full-precision checkpoints name the expert tensors as if they were modules.
EXPERT_SUFFIX = (r"experts\.(gate_up_proj|down_proj)\.weight$", r"experts.\1")
# By the last word of a tensor's name.
PACKED_DTYPES = {"qweight": ("U8",), "scale": ("F16",)}
FLOAT_DTYPES = ("F32", "BF16", "F16")
# The released tokenizer, and its <|eot|>: without it a model generates past the end of its turn.
RELEASED_VOCAB_SIZE, END_OF_TURN = 128256, 128008


# What `super()` of the mixin is in a model.
Base = PreTrainedModel if TYPE_CHECKING else object


class CheckpointMixin(Base):
    """
    How MobileMoE models load and save. Mixed in before `PreTrainedModel`, whose methods do the work.

    - Only safetensors are read. A file, tensor or key that does not fit the config is an error that names it.
    - Expert tensors that are stored as if they were modules are renamed, and saved under the released names.
    - Generation ends at every end token that the config or the generation config names.
    - A save that fails leaves the directory as it was.
    - A model that FSDP2 has sharded saves an ordinary checkpoint.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # FSDP2 replaces a model's class by a subclass that is made inside torch, and transformers saves the file and
        # name of a model's class as the checkpoint's code and `auto_map`. So the subclass gets those of the original.
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_init.py#L404
        if cls.__module__.startswith("torch."):
            original = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = original.__module__, original.__name__

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Private, but the only method that gets both the files and the model on the meta device before loading.
        # https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/modeling_utils.py#L4489
        # `expected_keys` are those of an adapter, which is no whole checkpoint.
        if checkpoint_files is not None and expected_keys is None:
            check_checkpoint(model, checkpoint_files, load_config.ignore_mismatched_sizes)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """
        As in transformers, with the checks of [`CheckpointMixin`].

        Raises:
            ValueError: for a damaged file, a missing, unknown or misshaped tensor, values that are not finite, or an
                option that asks for a pickle or for random weights.
            OSError: when there is no such checkpoint.
        """
        if pretrained_model_name_or_path is not None:
            directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            check_index(directory, kwargs.get("variant"))
            committed = committed_save(directory)
            if committed is not None and (committed / "generation_config.json").is_file():
                kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(committed))
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "use_safetensors=False asks for a pickle, which can run code when it is read, so it is refused. "
                "Leave it out, and convert a checkpoint that is no safetensors file."
            )
        # By default, transformers would open a pickle that has no safetensors file beside it.
        kwargs["use_safetensors"] = True
        # The weights of a packed model are buffers.
        kwargs.setdefault("offload_buffers", True)
        kwargs["key_mapping"] = dict([EXPERT_SUFFIX]) | (kwargs.get("key_mapping") or {})
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} cannot be read as safetensors: {error}. "
                "They are truncated or damaged: fetch or save them again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.quantization is None:
            # The quantizer has checked a packed model.
            check_values(model)
        if model.can_generate():
            model.generation_config.eos_token_id = _end_token_ids(model)
        return loaded

    # Options by name only: two of them are changed here.
    def save_pretrained(  # ty: ignore[incompatible-method-override]
        self, save_directory: str | os.PathLike, **kwargs
    ) -> None:
        """
        As in transformers, but a save that fails leaves the directory as it was, without partial files.

        Raises:
            OSError: when the files cannot be written.
        """
        # Otherwise alternative names of expert tensors that were loaded would be saved again.
        kwargs.setdefault("save_original_format", False)
        push_to_hub, state_dict = kwargs.pop("push_to_hub", False), kwargs.pop("state_dict", None)

        def save(directory: Path, push_to_hub: bool) -> None:
            # FSDP2 gathers the tied head and the embedding separately. They no longer share memory, by which
            # transformers recognises tied weights. A new dictionary, because saving empties it.
            tensors = state_dict and {name: state_dict[name] for name in state_dict if name != "lm_head.weight"}
            super(CheckpointMixin, self).save_pretrained(
                directory, state_dict=tensors, push_to_hub=push_to_hub, **kwargs
            )

        try:
            with replace_when_complete(save_directory) as partial:
                save(partial, push_to_hub=False)
            if push_to_hub:
                # Uploaded from elsewhere, under the name of the directory: what fails then costs no file here.
                with tempfile.TemporaryDirectory() as scratch:
                    save(Path(scratch, Path(save_directory).absolute().name), push_to_hub=True)
        except SafetensorError as error:
            raise OSError(
                f"The checkpoint could not be written to {save_directory}: {error}. Free space, or save elsewhere."
            ) from error


def _end_token_ids(model: PreTrainedModel) -> list[int] | None:
    ends = {END_OF_TURN} if model.config.vocab_size == RELEASED_VOCAB_SIZE else set()
    for ids in (model.config.eos_token_id, model.generation_config.eos_token_id):
        ends.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return sorted(ends) or None


def check_index(directory: str | os.PathLike, variant: str | None = None) -> None:
    """
    Checks the list of shards of a local checkpoint. The list of a Hub repository is not checked here.

    Raises:
        ValueError: when the list is not what transformers reads, or names files outside the checkpoint.
    """
    directory = Path(directory)
    name = INDEX_FILE if variant is None else INDEX_FILE.replace("model", f"model.{variant}")
    # Where a killed save has put it, see saving_mobilemoe.py.
    committed = committed_save(directory)
    if committed is not None and (committed / COMMITTED_INDEX).is_file():
        name = f"{committed.name}/{COMMITTED_INDEX}"
    file = directory / name
    if not file.is_file():
        return
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. Fetch it again or save the checkpoint again.") from error
    if not isinstance(index, dict) or not all(isinstance(index.get(key), dict) for key in ("weight_map", "metadata")):
        raise ValueError(
            f"{file} lacks its `weight_map` or `metadata`, so the shards are unknown. Fetch it or save it again."
        )
    for tensor, shard in index["weight_map"].items():
        if not isinstance(shard, str) or not shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{file} has {tensor} in {shard!r}, and a shard is a file of the checkpoint's own directory. "
                "Fetch it or save it again."
            )


class StoredTensor(NamedTuple):
    """A tensor in the header of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as reader:
            return reader.get_tensor(self.name)


def _stored_tensors(files: list[str]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their name in the base model."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file} is not a safetensors file. Reading it would run pickle, so it is refused. "
                "Convert it to safetensors."
            )
        try:
            with safe_open(file, framework="pt") as reader:
                for stored_name in reader.keys():
                    tensor = reader.get_slice(stored_name)
                    name = re.sub(*EXPERT_SUFFIX, stored_name).removeprefix("model.")
                    if name in stored:
                        raise ValueError(f"{file} holds {stored_name} a second time. Save the checkpoint again.")
                    stored[name] = StoredTensor(stored_name, tensor.get_dtype(), tuple(tensor.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors: {error}. "
                "It is missing, truncated or damaged: fetch or save it again."
            ) from error
    return stored


def check_checkpoint(model: PreTrainedModel, files: list[str], ignore_mismatched_sizes: bool = False) -> None:
    """
    Compares the headers of safetensors files with the model that is about to load them.

    Args:
        model (`PreTrainedModel`): on the meta device, with packed modules in place where the config asks for them.
        files (`list[str]`): all shards of the checkpoint.
        ignore_mismatched_sizes (`bool`, defaults to `False`): the caller's option, which tensors of another shape
            refuse.

    Raises:
        ValueError: naming the file, tensor or shape that does not fit. transformers only warns, and initialises
            missing tensors with random numbers.
    """
    # Names without the prefix: a base model reads the checkpoint of a full one, and the other way round.
    expected = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    has_head = expected.pop("lm_head.weight", None) is not None
    stored = _stored_tensors(files)
    _check_names(model, expected, stored)
    for name, tensor in expected.items():
        _check_tensor(name, tuple(tensor.shape), stored[name], ignore_mismatched_sizes)
    if "lm_head.weight" in stored and has_head:
        _check_tied_head(stored["lm_head.weight"], stored["embed_tokens.weight"])


def _check_names(model: PreTrainedModel, expected: dict[str, torch.Tensor], stored: dict[str, StoredTensor]) -> None:
    packed = model.config.quantization is not None
    # A packed model ties its head to the embedding, so a stored head would be ignored without notice.
    optional = set() if packed else {"lm_head.weight"}
    # A pipeline stage has an identity in place of each module of the other stages.
    elsewhere = [f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.Identity)]
    elsewhere = tuple(name.removeprefix("model.") for name in elsewhere)
    unknown = sorted(name for name in stored.keys() - expected.keys() - optional if not name.startswith(elsewhere))
    hint = ""
    if not packed and any(name.endswith("qweight") for name in stored):
        hint = " (an INT4 checkpoint needs its `quantization` block in config.json)"
    for kind, names in (
        ("lacks", sorted(expected.keys() - stored.keys())),
        ("holds the unknown", unknown),
    ):
        if names:
            raise ValueError(
                f"The checkpoint {kind} tensor {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
                f"{hint}. It does not belong to this config.json, or was not saved whole."
            )


def _check_tensor(name: str, shape: tuple[int, ...], stored: StoredTensor, ignore_mismatched_sizes: bool) -> None:
    if stored.shape != shape and ignore_mismatched_sizes:
        raise ValueError(
            f"ignore_mismatched_sizes=True would put random numbers in place of {stored.name}, which has shape "
            f"{stored.shape} in {stored.file} where config.json makes it {shape}. No MobileMoE checkpoint is read in "
            "part: leave the option out, and for another vocabulary call resize_token_embeddings on the loaded model."
        )
    if stored.shape != shape:
        raise ValueError(
            f"{stored.file} has {stored.name} with shape {stored.shape}, config.json makes it {shape}. "
            "Take the config.json that belongs to these weights."
        )
    legal = PACKED_DTYPES.get(name.rsplit("_", 1)[-1].rsplit(".", 1)[-1], FLOAT_DTYPES)
    if stored.dtype not in legal:
        raise ValueError(
            f"{stored.file} has {stored.name} as {stored.dtype}, this format stores it as {' or '.join(legal)}. "
            "Convert it, or save the checkpoint again."
        )


def _check_tied_head(head: StoredTensor, embedding: StoredTensor) -> None:
    if not torch.equal(head.read(), embedding.read()):
        raise ValueError(
            "The checkpoint holds lm_head.weight and it differs from the embedding, but MobileMoE ties the two. "
            "One of them was changed: remove lm_head.weight to use the embedding."
        )
