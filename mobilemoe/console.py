"""What the command line has beside its parsers: shell completion, and log lines on stderr."""

import argparse
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager


class PrintCompletion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        import shtab

        file, directory = shtab.FILE, shtab.DIRECTORY
        complete_paths(parser, {"FILE": file, "NAME_OR_FILE": file, "DIR": directory, "MODEL": directory})
        print(shtab.complete(parser, values))
        parser.exit()


def complete_paths(parser: argparse.ArgumentParser, by_metavar: Mapping[str, object]) -> None:
    """Tells the completion which arguments are paths: those with such a metavar, also in subcommands."""
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in by_metavar:
            # shtab reads it; argparse does not declare it.
            action.complete = by_metavar[action.metavar]  # ty: ignore[missing-attribute]
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                complete_paths(subparser, by_metavar)


@contextmanager
def log_to_stderr(command: str) -> Generator[None]:
    """Shows what the package logs; in a notebook its user decides."""
    logger, handler = logging.getLogger("mobilemoe"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[{command}] %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
