"""`mobilemoe train`: trains on a user's own examples, writes the model card, and exports."""

import argparse
import importlib.util
import logging
import shlex
import sys
from pathlib import Path


# The formats to export to, each with the package that it needs.
EXPORTS = {"pte": "executorch", "gguf": "gguf", "mlx": "mlx_lm"}


def add_train(commands) -> None:
    train = commands.add_parser("train", help="fine-tune a model on your own conversations or texts")
    train.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=".jsonl, .json, .csv, .parquet or Hub id, with messages, conversations, prompt and completion, or text",
    )
    train.add_argument("--model", required=True, metavar="MODEL", help="checkpoint directory or Hub id")
    train.add_argument("--output", required=True, metavar="DIR", help="directory of the new model")
    train.add_argument(
        "--lora",
        choices=("attention", "dense", "experts", "all"),
        help="train adapters on these weights (default: train all weights)",
    )
    train.add_argument("--epochs", type=float, default=3.0, help="how often to read every example (default: 3)")
    train.add_argument("--learning-rate", type=float, help="peak (default: chosen by the size of the model)")
    train.add_argument("--qat", action="store_true", help="then train for INT4, which ends in a packed model")
    train.add_argument("--export", nargs="+", default=[], choices=EXPORTS, help="then export into directories of DIR")
    train.add_argument("--license", help="of the new model, for its card (default: unknown, or that of Meta's models)")
    train.set_defaults(function=run_train, extra="train")


def run_train(arguments: argparse.Namespace) -> None:
    for kind in arguments.export:
        # Now, and not after the training.
        if importlib.util.find_spec(EXPORTS[kind]) is None:
            raise ModuleNotFoundError(name=EXPORTS[kind])

    import datasets
    from transformers.utils.logging import disable_progress_bar

    from .card.card import META_LICENSE, META_MODELS, check_license, write_card
    from .train.command import recipe_file, train_on_examples

    model, output = arguments.model, Path(arguments.output)
    from_meta = model.startswith(META_MODELS)
    licence = arguments.license or (META_LICENSE if from_meta else "unknown")
    check_license([model] if from_meta else [], licence)
    # A line per evaluation says how far it is, so neither bars nor the tables of the stages.
    datasets.disable_progress_bars()
    disable_progress_bar()
    logger = logging.getLogger("mobilemoe.train")
    logger.setLevel(logging.WARNING)
    try:
        has_model = train_on_examples(
            data=arguments.data,
            model=model,
            output=output,
            lora=arguments.lora,
            epochs=arguments.epochs,
            rate=arguments.learning_rate,
            qat=arguments.qat,
            exports=arguments.export,
        )
        if not has_model:
            print(f"{output / 'adapter'} holds the adapter; docs/train.md says how to use it.")
            return
        base_model = [] if Path(model).is_dir() else [model]
        recipe = recipe_file(output, arguments.qat)
        write_card(str(output), output / "README.md", (), None, base_model, recipe, overwrite=True, license=licence)
        for kind in arguments.export:
            export(output, kind, arguments.command_line)
    except KeyboardInterrupt:
        sys.exit("mobilemoe train: interrupted. The same command resumes from the last checkpoint, if there is one.")
    finally:
        logger.setLevel(logging.NOTSET)
    shown = output / "pte" if "pte" in arguments.export else output
    print(f"\n{output / 'loss.png'} shows the losses, {output / 'README.md'} is the model card. Next:\n")
    print(f"    mobilemoe run --model {shlex.quote(str(shown))} --chat --prompt 'Your question'")


def export(model: Path, kind: str, command: str) -> None:
    """Exports into a directory of the model, unless the same weights have been exported there."""
    from .artifacts import EXPORT_FILE, Export, RuntimeExport, weights_sha256
    from .display import show
    from .export.report import export_report

    Report, output = Export if kind == "pte" else RuntimeExport, model / kind
    file = output / EXPORT_FILE
    if file.is_file() and Report.load(file).weights_sha256 == weights_sha256(model):
        print(f"{output} holds the export of these weights.")
        return
    print(f"\nExporting to {output}", flush=True)
    if kind == "gguf":
        from .export.gguf import export_gguf as export_to
    elif kind == "mlx":
        from .export.mlx import export_mlx as export_to
    else:
        from .export.exporter import export_checkpoint as export_to
    export_to(str(model), str(output), command=command)
    show(*export_report(Report.load(file)))
