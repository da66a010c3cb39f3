"""The program: its own options, errors and exit codes. The commands are in the other modules."""

from __future__ import annotations

import os
import signal
import sys
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


def main() -> None:
    """Runs the program. Errors that are meant for the user are printed without a traceback."""
    # transformers and TFDS print messages when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from middo_jax.parallel.preemption import EXIT_PREEMPTED, preempted
    from middo_jax.rundir import RunError

    signal.signal(signal.SIGTERM, preempted)
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # typer turns a Ctrl-C into this code and prints nothing
            print("interrupted; run the same command again to continue", file=sys.stderr)
        elif end.code == EXIT_PREEMPTED:
            print("preempted, all is saved; run the same command again to continue", file=sys.stderr)
        raise
    except (RunError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("MIDDO_TRACEBACK"):
            raise
        print_error(error)
        sys.exit(1)
