"""Commands about datasets: convert, inspect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from middo_jax.cli.options import AsJson, Overrides, show
from middo_jax.cli.program import app


@app.command(epilog="Example: middo convert alpaca.json chat.jsonl --format messages")
def convert(
    data: Annotated[str, typer.Argument(help="As --data of other commands.")],
    out: Path,
    to: Annotated[
        str, typer.Option("--format", help="alpaca messages sharegpt prompt_completion parquet tfds")
    ],
    from_: Annotated[
        str,
        typer.Option("--from", help="The format of DATA: auto alpaca messages sharegpt prompt_completion"),
    ] = "auto",
) -> None:
    """Writes a dataset in another format. Unusable rows are counted and written to OUT.rejected.jsonl."""
    from middo_jax.data.sources import commonest_reasons, read, write
    from middo_jax.rundir import local, write_jsonl

    examples, rejections = read(data, from_)
    write(examples, local(out), to)
    if rejections:
        beside = out.with_name(f"{out.name}.rejected.jsonl")
        write_jsonl(beside, (r.to_json() for r in rejections))
        print(f"{len(rejections)} rows could not be used, see {beside}", file=sys.stderr)
        print("\n".join(commonest_reasons(rejections)), file=sys.stderr)
    print(out)


@app.command(epilog="Example: middo inspect alpaca.json --model ./base model.max_length=512")
def inspect(
    data: Annotated[str, typer.Argument(help="As --data of other commands.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model whose tokenizer and template are used. Without it, only rows are counted."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Counts the rows of a dataset; with a model, shows lengths, packing and the first sample."""
    from middo_jax.config import load
    from middo_jax.data.sources import read_rows
    from middo_jax.data.tokenize import tokenize_all, truncate
    from middo_jax.models.source import tokenizer_directory
    from middo_jax.progress import for_stderr
    from middo_jax.report.inspection import inspect_rows, inspect_tokens
    from middo_jax.report.terminal import render_inspection
    from middo_jax.session import Session, usable

    base = tokenizer_directory(model) if model else "none"
    config = load(None, [f"model.path={base}", f"data.path={data}", *(overrides or ())])
    rows = read_rows(config.data.path, config.data.format, config.data.limit)
    facts = inspect_rows(rows.examples, rows.rejections)
    if model:
        session, max_length = Session(config, for_stderr()), config.model.max_length
        rows = usable(session, rows)
        whole = tokenize_all(rows.examples, session.tokenizer)
        cut = [truncate(tokenized, max_length) for tokenized in whole]
        session.tell_of_no_end(cut)
        facts = inspect_rows(rows.examples, rows.rejections) | inspect_tokens(
            whole,
            cut,
            session.tokenizer,
            max_length=max_length,
            pack_length=max_length,
            scoring=session.plan_losses(cut).facts(),
        )
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show(as_json, facts, render_inspection(facts, color=color))
