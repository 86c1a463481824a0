"""What the command line has beside its parsers: shell completion, what is on stderr, and how a command ends."""

import argparse
import logging
import os
import select
import sys
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
    """Shows what the package logs, and not what libraries say of themselves; in a notebook its user decides."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[{command}] %(message)s"))
    # The architecture says on level INFO what a library has no use for.
    shown = {logging.getLogger("mobilemoe"): logging.INFO, logging.getLogger("modeling_mobilemoe"): logging.WARNING}
    before = {logger: (logger.level, logger.propagate) for logger in shown}
    for logger, level in shown.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        # Some libraries give the root logger a handler, which would say everything again.
        logger.propagate = False
    try:
        quiet_libraries()
        yield
    finally:
        for logger, (level, propagate) in before.items():
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def quiet_libraries() -> None:
    """Before they are imported: silences what some say about themselves, which no user of this package can change."""
    # torchao: that it does not load its CUDA extensions, which nothing here calls. PyTorch: how torchao is to call it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def ends_cleanly() -> Generator[None]:
    """
    Ends a command that is interrupted with one line, and one whose reader has gone, as `head` does, silently.

    The statuses are those of a process that the signals SIGINT and SIGPIPE end.
    """
    try:
        try:
            yield
        finally:
            # Now, or Python does it at its exit, where the error cannot be caught.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + 2)
    except BrokenPipeError as error:
        if not has_no_reader(sys.stdout.fileno()):
            # A pipe to another process.
            sys.exit(f"mobilemoe: {error}")
        # What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


def has_no_reader(file: int) -> bool:
    poll = select.poll()
    # No events: errors are always told.
    poll.register(file, 0)
    return bool(poll.poll(0))
