"""Commands that run the loop, and those on a run: run, quickstart, report, status, clean, rollback, trace."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from middo_jax.cli.options import AsJson, Overrides, RunFolder, in_job, show
from middo_jax.cli.program import app

if TYPE_CHECKING:
    from middo_jax.results import Run


@app.command("run", epilog="Example: middo run configs/quickstart.yaml rounds=2 train.learning_rate=1e-4")
def run_command(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings.")],
    overrides: Overrides = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Put damaged files aside, in RUN/damaged-..., and do again what is missing then."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Runs the closed loop: train, score, select, refine, merge, repeat. Continues where it stopped."""
    from middo_jax import api

    with in_job(api.load_config(config, overrides).runs_dir, overrides, config):
        _show_run(api.run(config, overrides, repair=repair), as_json)


@app.command(epilog="Example: middo quickstart train.num_epochs=2")
def quickstart(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Runs the loop on a small model and rows that ship with the program, in runs/quickstart."""
    from middo_jax import api

    _show_run(api.run(*api.quickstart(overrides)), as_json)


@app.command(epilog="Example: middo report runs/quickstart")
def report(run: RunFolder, as_json: AsJson = False) -> None:
    """Writes RUN/report.html again, from the present files."""
    from middo_jax.buckets import read_only, send
    from middo_jax.report.build import build
    from middo_jax.rundir import RunDir

    with read_only(run) as folder:
        path = send(build(RunDir(folder)))
    show(as_json, {"report": path}, path)


@app.command(epilog="Example: middo status runs/quickstart")
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Shows the finished stages of a run, the stale ones, and the next one."""
    from middo_jax.buckets import read_only
    from middo_jax.report.status import render_status
    from middo_jax.report.status import status as of
    from middo_jax.rundir import RunDir

    with read_only(run) as folder:
        facts = of(RunDir(folder))
    show(as_json, facts, render_status(facts))


@app.command(epilog="Example: middo clean runs/quickstart --yes")
def clean(
    run: RunFolder,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lists what can be removed from a run's folder to save space, and removes it with --yes."""
    from middo_jax import cleaning
    from middo_jax.buckets import shown
    from middo_jax.rundir import RunDir

    with _changed(run, yes) as folder:
        found = cleaning.clean(RunDir(folder), yes)
        text = cleaning.render_clean(found, RunDir(folder), yes)
    rows = [{"path": shown(each.path), "size": each.size, "why": each.why} for each in found]
    facts = {"removed": yes, "bytes": sum(each.size for each in found), "paths": rows}
    show(as_json, facts, text)


@app.command(epilog="Example: middo rollback runs/quickstart 0 --yes")
def rollback(
    run: RunFolder,
    round_: Annotated[int, typer.Argument(metavar="ROUND", min=0, help="The last round that stays.")],
    yes: Annotated[bool, typer.Option("--yes", help="Put aside what is listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Goes back to the state after a round: what came later is listed, and put aside with --yes."""
    from middo_jax import rollback as rolling
    from middo_jax.buckets import shown
    from middo_jax.rundir import RunDir

    with _changed(run, yes) as folder:
        done = rolling.rollback(RunDir(folder), round_, yes)
        text = rolling.render_rollback(done, RunDir(folder))
    facts = {
        "round": done.round,
        "later": [shown(path) for path in done.later],
        "aside": None if done.aside is None else shown(done.aside),
    }
    show(as_json, facts, text)


@app.command(epilog="Example: middo trace runs/quickstart 3fa9c2")
def trace(
    run: RunFolder,
    sample: Annotated[str, typer.Argument(metavar="ID", help="An id, or the beginning of one.")],
    as_json: AsJson = False,
) -> None:
    """Shows the ancestors and descendants of a sample over the rounds, with their scores."""
    from middo_jax.buckets import read_only
    from middo_jax.report.lineage import trace as of
    from middo_jax.report.terminal import render_trace
    from middo_jax.rundir import RunDir

    with read_only(run) as folder:
        chain = of(RunDir(folder), sample)
    show(as_json, chain, render_trace(chain))


def _changed(run: Path, yes: bool) -> contextlib.AbstractContextManager[Path]:
    """The folder of a run for a command that changes it only with --yes."""
    from middo_jax.buckets import read_only, working
    from middo_jax.progress import for_stderr

    return working(run, for_stderr().say) if yes else read_only(run)


def _show_run(done: Run, as_json: bool) -> None:
    from middo_jax.buckets import shown
    from middo_jax.report.contrast import contrast_lines
    from middo_jax.report.controls import control_lines
    from middo_jax.report.effects import effect_lines

    told = [
        *effect_lines(done.facts["effects"]),
        *contrast_lines(done.facts["contrast"]),
        *control_lines(done.facts["controls"]),
    ]
    text = "\n".join([*told, shown(done.report)])
    show(as_json, {"report": shown(done.report), **done.facts}, text)
