"""Checkpoint -> directory with `model.pte`, tokenizer, `config.json` and `export.json`.

Shared by `mobilemoe export` and `optimum-cli export executorch`. The program follows the contract of ExecuTorch's
LLM runners: `forward(tokens, pos)` with tokens int64 `[1, S]` and the start position int64 `[1]`, and the constant
methods that they read. Out come FP32 logits of the last token: `[1, vocab]`, or with our operators `[1, S, vocab]` for
S up to 8 and `[1, 1, vocab]` above.
"""

import logging
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_mobilemoe.cache_mobilemoe import CACHE_BITS
from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels import BuildError, load_executorch
from modeling_mobilemoe.kernels.modules import DEFAULT_CACHE, MoEFFN
from modeling_mobilemoe.modeling_mobilemoe import compute_rope
from modeling_mobilemoe.quantization_mobilemoe import MobileMoEInt4Config, dequantize, quantize
from modeling_mobilemoe.saving_mobilemoe import remove_remnants, replace_when_complete

from ..artifacts import (
    EXPORT_FILE,
    PROGRAM_FILE,
    Export,
    check_writable,
    load_tokenizer,
    local_checkpoint,
    nearest_existing,
    weights_sha256,
)
from ..costs import kv_cache_bytes, parameter_counts, program_bytes
from ..integrity import describe_files
from ..machine import available_memory, package_versions, peak_memory
from ..runtime import PteModel, end_of_sequence_ids
from .lowering import EXPERTS_FILE, TRACED_TOKENS, VERSIONS, Stages, lower, metadata, program_operators
from .program import MOE_MODULES, DenseMoE, ExportModel, ProgramOptions, QuantizedMoEFFN


logger = logging.getLogger(__name__)


def load_exact(checkpoint: str | Path) -> PreTrainedModel:
    """A checkpoint in FP32, packed or not, to compare with."""
    with warnings.catch_warnings():
        # A packed model's, for those who want speed.
        warnings.filterwarnings("ignore", message="Packed INT4")
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def export_checkpoint(
    model: str | Path,
    output_dir: str | Path,
    max_seq_len: int | None = None,
    expert_bits: int | None = None,
    weights: str = "int4",
    embedding_bits: int = 4,
    kv_cache: str | None = None,
    all_logits: bool = False,
    experts_file: bool = False,
    moe_op: str | None = None,
    command: str | None = None,
) -> Path:
    """
    Exports a checkpoint to `output_dir/model.pte`, compares it with PyTorch, and describes it in `export.json`.

    Args:
        model (`str` or `Path`): directory or Hub id of a packed INT4 checkpoint, whose integers and scales go through
            as they are, or of a full-precision one, which is quantised by the paper's rule first.
        output_dir (`str` or `Path`): created by this call; must not exist.
        max_seq_len (`int`, *optional*): context of the program in tokens; the model's own when absent.
        expert_bits (`int`, *optional*): width of the experts. `llama::quantized_moe_ffn` groups along the input axis
            and the released grid along the output axis: 8 keeps those weights, 4 rounds them a second time. Experts
            along the input keep integers and scales in both. 4 when that loses nothing, else 8, when absent.
        weights (`str`, defaults to `"int4"`): `"fp32"` and `"bf16"` quantise nothing and compute every expert: slow.
        embedding_bits (`int`, defaults to 4): 8 stores the same integers wider.
        kv_cache (`str`, *optional*): `"fp32"`, `"bf16"` or `"int8"`. With `moe_op="mobilemoe"` `"int8"` is the
            default, which loses less than 0.0001 bits per byte of code on the demo's model; with `"llama"` `"fp32"`
            is, and there is no `"bf16"`.
        all_logits (`bool`, defaults to `False`): the program returns `[1, S, vocab]`.
        experts_file (`bool`, defaults to `False`): put the experts into `experts.ptd` beside `model.pte`.
        moe_op (`str`, *optional*): operator that computes router and experts. `"mobilemoe"` is
            `mobilemoe::decoder_layer` (kernels/README.md), which computes the whole layer, fast and on the released
            grid; a runtime needs it compiled in. `"llama"` is `llama::quantized_moe_ffn`, in every ExecuTorch runtime
            since 1.5. The first one where it compiles and neither experts along the input nor `expert_bits` ask for
            the other, when absent.
        command (`str`, *optional*): the command line that asked for this, for `export.json`.

    Raises:
        ValueError: for a request that cannot be met, memory or disk that will not do, or a program that does not
            compute the model. Nothing is written then.
    """
    output_dir = Path(output_dir)
    check_options(output_dir, expert_bits, weights, embedding_bits, kv_cache, experts_file, moe_op)
    checkpoint = local_checkpoint(model)
    config = check_config(checkpoint, max_seq_len)
    moe_module, crosses = choose_operator(config, weights, expert_bits, moe_op)
    kv_cache = choose_cache(kv_cache, moe_module)
    context = max_seq_len or config.max_position_embeddings
    width = expert_bits or (8 if crosses else 4)
    options = ProgramOptions(
        context, weights, width, embedding_bits=embedding_bits, kv_cache=kv_cache, all_logits=all_logits
    )
    remove_remnants(output_dir)
    check_resources(config, options, output_dir, moe_module)

    stages = Stages()
    module, reference, tokenizer, config, ends = load(checkpoint, config, options, moe_module, crosses, stages)
    described = describe_program(module, moe_module, crosses, ends, experts_file)
    program = lower(module, metadata(config, options, ends), experts_file, stages)
    del module
    described["operators"] = program_operators(program)

    with stop_signal_as_exit(), replace_when_complete(output_dir) as partial:
        with stages("write"):
            write_files(partial, program, tokenizer, config)
            del program
            report = write_report(partial, checkpoint, command=command, model=str(model), **described)
        with stages("compare"):
            report.parity = reference.report(PteModel(partial))
        report.seconds = stages.seconds | {"total": round(sum(stages.seconds.values()), 1)}
        report.peak_memory_bytes = peak_memory()
        report.save(partial / EXPORT_FILE)
    return output_dir


def check_options(
    output_dir: Path,
    expert_bits: int | None,
    weights: str,
    embedding_bits: int,
    kv_cache: str | None,
    experts_file: bool,
    moe_op: str | None,
) -> None:
    """What can be known without the checkpoint."""
    check_absent(output_dir)
    for name, value, legal in (
        ("expert_bits", expert_bits, (None, 4, 8)),
        ("embedding_bits", embedding_bits, (4, 8)),
        ("weights", weights, ("int4", "fp32", "bf16")),
        ("kv_cache", kv_cache, (None, *CACHE_BITS)),
        ("moe_op", moe_op, (None, *MOE_MODULES)),
    ):
        if value not in legal:
            raise ValueError(
                f"{name}={value!r} has no kernel here. Set {' or '.join(str(choice) for choice in legal if choice)}."
            )
    if weights != "int4" and (expert_bits or experts_file or embedding_bits == 8 or moe_op):
        raise ValueError(
            f"weights={weights!r} is for evaluation and has no packed experts or embedding, so neither their widths, "
            "operator nor file. Leave those options out, or set weights='int4'."
        )


def choose_operator(
    config: MobileMoEConfig, weights: str, expert_bits: int | None, moe_op: str | None
) -> tuple[type[torch.nn.Module], bool]:
    """The module of the experts, and whether they cross to groups along the other axis, which rounds them again."""
    if weights != "int4":
        return DenseMoE, False
    packed = config.quantization is not None
    stored_axis = MobileMoEInt4Config(**config.quantization).int4_format.expert_axis if packed else None
    moe_op, reason = (moe_op, "as asked for") if moe_op else default_moe_op(stored_axis, expert_bits)
    moe_module = MOE_MODULES[moe_op]
    if moe_module is MoEFFN:
        check_kernels(stored_axis, expert_bits)
    logger.info(f"operator of the experts: {moe_module.operator}, {reason}")
    return moe_module, packed and stored_axis != moe_module.expert_axis


def choose_cache(kv_cache: str | None, moe_module: type[torch.nn.Module]) -> str:
    if kv_cache == "bf16" and moe_module is not MoEFFN:
        raise ValueError(
            "kv_cache='bf16' needs the operators of this package, and this program has ExecuTorch's. "
            "Set kv_cache='int8' or 'fp32', or moe_op='mobilemoe'."
        )
    return kv_cache or (DEFAULT_CACHE if moe_module is MoEFFN else "fp32")


def load(
    checkpoint: Path,
    config: MobileMoEConfig,
    options: ProgramOptions,
    moe_module: type[torch.nn.Module],
    crosses: bool,
    stages: "Stages",
) -> tuple:
    """The model to export, what it is compared with, the tokenizer, the config of the program, the ends of a text."""
    with stages("import"):
        # First, so that a missing extra is known before minutes are spent.
        import executorch.exir  # noqa: F401

        # Their operators, to run the parts of a program before it is lowered.
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        import torchao.quantization  # noqa: F401

        from .parity import Reference, encode_prompts
    packed = config.quantization is not None
    with stages("load"):
        tokenizer = load_tokenizer(checkpoint)
        prompts = encode_prompts(tokenizer, config.vocab_size, options.max_seq_len)
        source = load_exact(checkpoint)
        eos_ids = end_of_sequence_ids(source, tokenizer)
        if packed and options.weights != "int4":
            dequantize(source)
    with stages("reference"):
        reference = Reference(source, prompts, eos_ids, options.max_seq_len)
        if options.weights == "int4" and not packed:
            quantize(source, Int4Format(moe_module.expert_axis))
            reference.add_int4_rounding(source)
        reference.add_sources(source, options, crosses, on_kernels=moe_module is MoEFFN)
    with stages("pack"):
        exportable = ExportModel(source, options, moe_module)
        reference.check_parts(exportable)
        if source.config.bos_token_id is None:
            # Every runner asks the program for it.
            source.config.bos_token_id = tokenizer.bos_token_id
    return exportable, reference, tokenizer, source.config, eos_ids


def describe_program(
    exportable: ExportModel,
    moe_module: type[torch.nn.Module],
    crosses: bool,
    eos_ids: list[int],
    experts_file: bool,
) -> dict:
    """What `export.json` holds of the program before it is lowered."""
    options = exportable.options
    return {
        "versions": package_versions(VERSIONS),
        "moe_op": moe_module.operator,
        "expert_axis": moe_module.expert_axis,
        "experts_rounded_twice": crosses,
        "expert_rounding_sqnr_db": expert_rounding_sqnr(exportable) if crosses else None,
        **asdict(options),
        **({"expert_bits": None, "embedding_bits": None} if options.weights != "int4" else {}),
        "eos_ids": eos_ids,
        "experts_file": f"{EXPERTS_FILE}.ptd" if experts_file else None,
    }


def write_files(directory: Path, program, tokenizer, config: MobileMoEConfig) -> None:
    """All but `export.json`."""
    with open(directory / PROGRAM_FILE, "wb") as file:
        program.write_to_file(file)
    program.write_tensor_data_to_file(directory)
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)


def write_report(directory: Path, checkpoint: Path, **described) -> Export:
    """`export.json`: needed to load the program, and written again once it has run."""
    files = describe_files(directory, described["experts_file"])
    report = Export(**described, **files, weights_sha256=weights_sha256(checkpoint))
    report.save(directory / EXPORT_FILE)
    return report


def check_config(checkpoint: Path, max_seq_len: int | None) -> MobileMoEConfig:
    """What can be known before a weight is read."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} has no config.json. Name the directory of a MobileMoE checkpoint.")
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, MobileMoEConfig):
        raise ValueError(
            f"{checkpoint} is a {config.model_type} model and this exporter writes MobileMoE programs. "
            "Use `optimum-cli export executorch` for it."
        )
    if not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(f"{checkpoint} has no tokenizer.json, which every runner needs. Put the model's beside it.")
    context = config.max_position_embeddings
    if max_seq_len is not None and not TRACED_TOKENS <= max_seq_len <= context:
        raise ValueError(
            f"max_seq_len={max_seq_len} is outside the model's context of {context} tokens, or too short to trace. "
            f"Set {TRACED_TOKENS} to {context}."
        )
    check_rope(config)
    return config


def check_rope(config: MobileMoEConfig) -> None:
    """
    Raises:
        ValueError: for rotary frequencies that depend on the length, or scores that are scaled.
    """
    rope_type = config.rope_scaling["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_scaling has rope_type={rope_type!r}, whose frequencies change with the length of a text, and an "
            "exported model has one table of them. Set a rope_type of fixed frequencies, such as 'yarn' or 'linear'."
        )
    _, attention_factor = compute_rope(config)
    if attention_factor != 1:
        raise ValueError(
            f"rope_scaling has an attention factor of {attention_factor:.4g}, and the kernels of exported models do "
            "not scale scores by it. Set attention_factor to 1.0 in rope_scaling, with which quality may differ."
        )


def default_moe_op(stored_axis: str | None, expert_bits: int | None) -> tuple[str, str]:
    """Key of `MOE_MODULES` for experts stored along this axis, `None` in full precision; and why."""
    if stored_axis == "input":
        return "llama", "because the experts are grouped along their input, which ours do not read"
    if expert_bits is not None:
        return "llama", f"because of expert_bits={expert_bits}"
    try:
        load_executorch()
    except BuildError as error:
        logger.warning(f"{MoEFFN.operator} is not available, the experts go to {QuantizedMoEFFN.operator}: {error}")
        return "llama", "many times slower, because ours does not compile here"
    return "mobilemoe", "which compiles here"


def check_kernels(stored_axis: str | None, expert_bits: int | None) -> None:
    """
    Raises:
        ValueError: when `mobilemoe::decoder_layer` cannot take these experts, or does not compile here.
    """
    if stored_axis == "input" or expert_bits == 8:
        what = "experts along their input" if stored_axis == "input" else "expert_bits=8"
        raise ValueError(
            f"moe_op='mobilemoe' multiplies INT4 experts along their output, not {what}. Set moe_op='llama'."
        )
    try:
        load_executorch()
    except BuildError as error:
        raise ValueError(f"moe_op='mobilemoe' is not available: {error} Or set moe_op='llama'.") from error


def check_resources(
    config: MobileMoEConfig,
    options: ProgramOptions,
    output_dir: Path,
    moe_module: type[torch.nn.Module],
) -> None:
    """
    States what the export needs and refuses what cannot end well.

    Raises:
        OSError: when the output cannot be made there.
        ValueError: when the disk or the memory is too small.
    """
    moe_op = moe_module.operator
    size = program_bytes(
        config, options.max_seq_len, options.weights, options.expert_bits, options.embedding_bits, moe_op
    )
    size = sum(size.values())
    cache = kv_cache_bytes(config, options.max_seq_len, CACHE_BITS[options.kv_cache])
    logits = 4 * options.max_seq_len * config.vocab_size * options.all_logits
    # A packed checkpoint stays in its file, a full-precision one is FP32 in memory until it is quantised.
    loaded = 0
    if config.quantization is None or options.weights != "int4":
        loaded = 4 * sum(parameter_counts(config).values())
    # Fitted to S and M (README, Export): imports, weights in several copies, and what the program plans to work in,
    # which grows with the context as its cache does.
    memory = int(0.7e9 + max(2.8 * size, 1.1 * loaded) + 4 * cache + 2 * logits)
    logger.info(f"{size / 1e6:,.0f} MB to write, about {memory / 1e9:.1f} GB of memory needed")
    check_place(output_dir, size)
    free_memory = available_memory()
    if free_memory is not None and free_memory < memory:
        raise ValueError(
            f"The export takes about {memory / 1e9:.1f} GB of memory and {free_memory / 1e9:.1f} GB are available. "
            "Use a larger machine, fewer expert_bits, or a smaller max_seq_len."
        )


def check_absent(output_dir: Path) -> None:
    """
    Raises:
        ValueError: when there is something in the place of the output.
    """
    if output_dir.exists():
        raise ValueError(f"The output {output_dir} exists and would be overwritten. Remove it or name another one.")


def check_place(output_dir: Path, size: int) -> None:
    """
    Raises:
        OSError: when the output cannot be made there.
        ValueError: when the disk is too small for so many bytes.
    """
    check_writable(output_dir)
    parent = nearest_existing(output_dir)
    free = shutil.disk_usage(parent).free
    if free < 1.02 * size:
        raise ValueError(
            f"The output takes {size / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free. "
            "Free space, or name an output on another disk."
        )


def expert_rounding_sqnr(model: ExportModel) -> float:
    signal_power, noise_power = (
        sum(layer.moe.signal for layer in model.layers),
        sum(layer.moe.noise for layer in model.layers),
    )
    return round(10 * torch.tensor(signal_power / noise_power).log10().item(), 1)


@contextmanager
def stop_signal_as_exit() -> Iterator[None]:
    """SIGTERM ends a process without running `finally`; within this block it runs them, as Ctrl-C does."""

    def stop(number: int, frame) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
