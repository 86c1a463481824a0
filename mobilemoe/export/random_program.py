"""Programs and models of a shape with random INT4 weights, for benchmarks and tests."""

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from modeling_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from modeling_mobilemoe.int4_mobilemoe import Int4Format
from modeling_mobilemoe.kernels.modules import DEFAULT_CACHE
from modeling_mobilemoe.quantization_mobilemoe import INT4_BLOCK, MobileMoEInt4Config, MobileMoEInt4Quantizer

from ..artifacts import EXPORT_FILE, PROGRAM_FILE, Export
from ..integrity import describe_files
from ..machine import package_versions
from ..shapes import program_config


def random_packed_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A BF16 model with random INT4 weights. It is created in packed form, never in full precision."""
    block = MobileMoEInt4Config(**INT4_BLOCK)
    quantizer = MobileMoEInt4Quantizer(block)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer._process_model_before_weight_loading(model)
    if isinstance(config, MobileMoEConfig):
        config.quantization, config.quantization_config = dict(INT4_BLOCK), block
    model.to_empty(device="cpu")
    # The frequencies are not in the state dict: compute them again after `to_empty`.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            # Two integers in a byte, in two's complement. A mean of 0 needs 0 in place of -8, or all tokens would get
            # nearly the same hidden states, and the same four experts.
            tensor.random_(generator=generator)
            tensor[tensor & 0x0F == 0x08] &= 0xF0
            tensor[tensor & 0xF0 == 0x80] &= 0x0F
        elif name.endswith("scale"):
            # The scales of weights with the initial standard deviation of 0.02.
            tensor.uniform_(0.003, 0.006, generator=generator)
            if name.endswith("o_proj.weight_scale"):
                # Random attention averages tokens, and at full size would make them alike too.
                tensor.div_(3)
            if name.endswith("down_scale"):
                # At full size an expert that rounding exchanges for another one would change the output entirely.
                tensor.div_(4)
            if name.endswith(("gate_up_scale", "down_scale")):
                # Equal for 32 inputs, so that formats with groups along the input can hold the same numbers.
                group = Int4Format.group_size
                tensor.copy_(tensor[:, ::group].repeat_interleave(group, 1)[:, : tensor.shape[1]])
        elif name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("expert_bias"):
            tensor.zero_()
        else:
            tensor.normal_(std=0.02, generator=generator)
    model.hf_quantizer, model.is_quantized = quantizer, True
    return model.eval()


def write_random_program(
    config: PretrainedConfig, directory: str | Path, max_seq_len: int, kv_cache: str = DEFAULT_CACHE
) -> None:
    """
    Writes a directory with `model.pte` that [`PteModel`] can read. It has no tokenizer.

    Raises:
        BuildError: when the operators do not compile on this machine.
    """
    from modeling_mobilemoe.kernels import load_executorch
    from modeling_mobilemoe.kernels.modules import MoEFFN

    from .lowering import VERSIONS, Stages, lower, metadata, program_operators
    from .program import ExportModel, ProgramOptions

    load_executorch()
    is_dense = not isinstance(config, MobileMoEConfig)
    config = program_config(config)
    options = ProgramOptions(max_seq_len=max_seq_len, expert_bits=4, kv_cache=kv_cache)
    exportable = ExportModel(random_packed_model(config), options, None if is_dense else MoEFFN)
    program = lower(exportable, metadata(config, options, []), False, Stages())
    directory = Path(directory)
    directory.mkdir(parents=True)
    with open(directory / PROGRAM_FILE, "wb") as file:
        program.write_to_file(file)
    config.save_pretrained(directory)
    Export(
        model="random weights",
        weights_sha256={},
        versions=package_versions(VERSIONS),
        moe_op=None if is_dense else MoEFFN.operator,
        expert_axis=None if is_dense else MoEFFN.expert_axis,
        experts_rounded_twice=False,
        expert_rounding_sqnr_db=None,
        **asdict(options),
        eos_ids=[],
        experts_file=None,
        operators=program_operators(program),
        **describe_files(directory, None),
    ).save(directory / EXPORT_FILE)
