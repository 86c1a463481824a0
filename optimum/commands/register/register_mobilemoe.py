"""
Makes `optimum-cli export executorch` export MobileMoE checkpoints; every other model takes the stock path untouched.

`optimum-cli` imports every file of this namespace package before it parses its arguments. A second command of the same
name would be refused by argparse, so the stock one is asked first which model it is about to export. There is no
`__init__.py` here or above: the package is shared with optimum and optimum-executorch.
"""

from importlib.util import find_spec


def install() -> None:
    from optimum.commands.export.executorch import ExecuTorchExportCommand

    stock_run = ExecuTorchExportCommand.run

    def run(self: ExecuTorchExportCommand) -> None:
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(self.args.model)
        except OSError:
            # No such model: the stock command says so in its own words.
            config = {}
        if config.get("model_type") != "mobilemoe":
            stock_run(self)
            return
        from mobilemoe.cli import main

        main(["export", *export_arguments(self.args)])

    ExecuTorchExportCommand.run = run


def export_arguments(arguments) -> list[str]:
    """
    The arguments of `mobilemoe export` for those of the stock command.

    Raises:
        SystemExit: for a flag that this model cannot honour, with the reason.
    """
    # Flag, what it may be here, and why nothing else; None is "not given".
    int4 = "the INT4 grid of this format has groups of 32 and INT8 activations"
    encoder = "this model has no encoder"
    rules = {
        "task": (("text-generation",), "this is a language model"),
        "recipe": (("xnnpack",), "the program is made of XNNPACK linears and CPU operators"),
        "disable_dynamic_shapes": ((None, False), "a prompt would be read token by token"),
        "qlinear": ((None, "8da4w"), int4),
        "qlinear_group_size": ((None, 32), int4),
        "qlinear_packing_format": ((None,), "it is for CUDA, and this program is for CPUs"),
        "qembedding": ((None, "4w", "8w"), int4),
        "qembedding_group_size": ((None, 32), int4),
        "dtype": ((None, "float32"), "the operators compute in FP32; weights are INT4 whatever this flag says"),
        "device": ((None, "cpu"), "the export and the program run on CPUs"),
        "qlinear_encoder": ((None,), encoder),
        "qlinear_encoder_group_size": ((None,), encoder),
        "qlinear_encoder_packing_format": ((None,), encoder),
        "qembedding_encoder": ((None,), encoder),
        "qembedding_encoder_group_size": ((None,), encoder),
    }
    given = vars(arguments)
    for flag, (legal, reason) in rules.items():
        if given[flag] not in legal:
            choices = [str(value) for value in legal if value]
            instead = f"Set it to {' or '.join(choices)}" if choices else "Leave it out"
            raise SystemExit(f"--{flag} {given[flag]} cannot be honoured for MobileMoE: {reason}. {instead}.")
    if arguments.output_dir is None:
        raise SystemExit("--output_dir is missing: there is nowhere to write to. Name a directory to create.")
    # --use_custom_sdpa and --use_custom_kv_cache ask for what this program always has. The stock operator, because
    # optimum-executorch, which will run the program, does not register ours.
    translated = ["--model", arguments.model, "--output", str(arguments.output_dir), "--moe-op", "llama"]
    if arguments.max_seq_len is not None:
        translated += ["--max-seq-len", str(arguments.max_seq_len)]
    if arguments.qembedding == "8w":
        translated += ["--embedding-bits", "8"]
    return translated


# optimum without optimum-executorch has no such command.
if find_spec("optimum.commands.export.executorch"):
    install()
