"""The program: its own options, errors and exit codes. The commands are in the other modules."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from middo_jax.cli.options import JOB, print_error

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Closed-loop data optimisation for LLM fine-tuning. Settings come last, as a.b=value.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from middo_jax.version import __version__

        print(f"middo-jax {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0, in a job of several processes.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many processes the job has.")] = None,
    process: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
) -> None:
    """Options of the program itself. A job is also found in its cluster's environment (docs/pods.md)."""
    JOB.update(coordinator=coordinator, processes=processes, process=process)


class _Warnings(logging.Handler):
    """Prints `warning: TEXT` on stderr; for other packages `WARNING:NAME:TEXT`, with the logger's name."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._of_others = logging.Formatter(logging.BASIC_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if the record has one."""
        if not record.name.startswith("middo_jax."):
            return self._of_others.format(record)
        return f"{record.levelname.lower()}: {super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the record. `sys.stderr` is looked up each time, since progress bars replace it."""
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Adds the handler to the root logger: with none there, a library may add one, which prints all twice."""
    handler = _Warnings()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def main() -> None:
    """Runs the program. Errors that are meant for the user are printed without a traceback."""
    # transformers and TFDS print messages when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from middo_jax.parallel.preemption import EXIT_PREEMPTED, preempted
    from middo_jax.rundir import RunError

    signal.signal(signal.SIGTERM, preempted)
    try:
        with _warnings_shown():
            app()
    except SystemExit as end:
        if end.code == 130:  # typer turns a Ctrl-C into this code and prints nothing
            print("interrupted; run the same command again to continue", file=sys.stderr)
        elif end.code == EXIT_PREEMPTED:
            print(
                "stopped by SIGTERM, what was finished is saved; run the same command again to continue",
                file=sys.stderr,
            )
        raise
    except (RunError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("MIDDO_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(1)
