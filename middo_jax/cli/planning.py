"""The command that plans a run for chips that are not there: plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from middo_jax.cli.options import AsJson, Overrides, names_in, show
from middo_jax.cli.program import app


@app.command(epilog="Example: middo plan run.yaml --topology v5e:8x8 --price 1.2")
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings.")],
    topology: Annotated[
        str, typer.Option(help="CHIP:SHAPE, such as v5e:8x8 or v5p:4x4x8; v5e:16x16x2 is two slices.")
    ],
    overrides: Overrides = None,
    mesh: Annotated[
        str | None, typer.Option(help="DATA,FSDP,TENSOR devices. Without it: the fastest mesh that fits.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to plan for, instead of those of data.path.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=2, help="With --rows: mean tokens per row.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Some of train,score,rate,neighbours,refine,export. Without it: all.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per chip-hour.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write plan.json into the run's folder, for its report.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predicts, without a TPU, whether a run fits a slice, how long it takes, and what limits it."""
    # Before JAX is imported: programs are compiled for the topology, and nothing runs on a chip of this host.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from middo_jax import api
    from middo_jax.planning.forecast import PlanRequest, text_of

    if (rows is None) != (tokens is None):
        raise typer.BadParameter("give --rows and --tokens together, or neither")
    named = None if stages is None else names_in(stages)
    request = PlanRequest.parse(topology, mesh, named, price)
    settings = api.load_config(config, overrides)
    found = api.plan(settings, request, rows, tokens)
    if save:
        api.save_plan(found)
    show(as_json, found.to_json(), text_of(found))
