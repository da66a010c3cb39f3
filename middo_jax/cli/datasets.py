"""Commands about datasets: export-data, convert, inspect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from middo_jax.cli.options import DATA_HELP, EXIT_FAULTS, AsJson, Overrides, RunFolder, show, with_data
from middo_jax.cli.program import app

Format = Annotated[
    str | None,
    typer.Option(
        "--format", help="alpaca sharegpt messages prompt_completion parquet. Default: as it came in."
    ),
]
WithHeldout = Annotated[bool, typer.Option("--with-heldout", help="Also write the held-out rows.")]
WithScores = Annotated[
    bool, typer.Option("--with-scores", help="Add the last scores as middo_loss_post etc.")
]
WithLineage = Annotated[
    bool, typer.Option("--with-lineage", help="Add where each row comes from, as middo_op etc.")
]
WithPairs = Annotated[
    bool, typer.Option("--with-pairs", help="Also write preference pairs, accepted against lost answers.")
]
License = Annotated[
    str | None,
    typer.Option(help="The dataset's licence for its card, as the hub names it: cc-by-4.0, other, ..."),
]


@app.command(
    "export-data", epilog="Example: middo export-data runs/mine ./better --with-heldout --with-scores"
)
def export_data(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Format = None,
    heldout: WithHeldout = False,
    scores: WithScores = False,
    lineage: WithLineage = False,
    pairs: WithPairs = False,
    license: License = None,
    as_json: AsJson = False,
) -> None:
    """Writes a run's last dataset with a card, and what LLaMA-Factory, axolotl and TRL need to read it."""
    from middo_jax import exporting
    from middo_jax.buckets import read_only
    from middo_jax.rundir import RunDir

    extras: exporting.Extras = {"heldout": heldout, "scores": scores, "lineage": lineage, "pairs": pairs}
    with read_only(run) as folder:
        done = exporting.export_data(RunDir(folder), out, to, license, **extras)
    for text in filter(None, (done.note, done.warning)):
        print(text, file=sys.stderr)
    show(as_json, {**done._asdict(), "path": str(done.path)}, str(done.path))


@app.command(epilog="Example: middo push runs/mine me/better-alpaca --license cc-by-nc-4.0 --dry-run")
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(help="A dataset repository of the hub: OWNER/NAME.")],
    license: License = None,
    to: Format = None,
    heldout: WithHeldout = False,
    scores: WithScores = False,
    lineage: WithLineage = False,
    pairs: WithPairs = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be sent; nothing is sent.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sends what `middo export-data` writes to the Hugging Face hub. The token is read from $HF_TOKEN."""
    from middo_jax import exporting, pushing
    from middo_jax.buckets import read_only
    from middo_jax.rundir import RunDir

    if license is None and sys.stdin.isatty():
        license = typer.prompt(pushing.ASKED, err=True)
    extras: exporting.Extras = {"heldout": heldout, "scores": scores, "lineage": lineage, "pairs": pairs}
    plan = pushing.Push(repo, license, public, dry_run)
    with read_only(run) as folder:
        done = pushing.push(RunDir(folder), plan, to, **extras)
    show(as_json, done._asdict(), pushing.render(done))


@app.command(epilog="Example: middo convert alpaca.json chat.jsonl --format messages")
def convert(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Argument(help="The file to write; a folder for tfds.")],
    to: Annotated[
        str, typer.Option("--format", help="alpaca messages sharegpt prompt_completion parquet tfds")
    ],
    from_: Annotated[
        str,
        typer.Option("--from", help="The format of DATA: auto alpaca messages sharegpt prompt_completion"),
    ] = "auto",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Writes a dataset in another format. Unusable rows are counted and written to OUT.rejected.jsonl."""
    from middo_jax import converting
    from middo_jax.config import load

    config = load(None, ["model.path=none", *with_data(data, overrides or ())])
    done = converting.convert(config, out, to, from_)
    for line in done.said:
        print(line, file=sys.stderr)
    facts = {"out": str(out), "n": done.n, "rejected": done.rejected, "repaired": done.repaired}
    show(as_json, facts, str(out))


@app.command(epilog="Example: middo inspect alpaca.json --model ./base model.max_length=512")
def inspect(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model whose tokenizer and template are used. Without it, only rows are looked at."
        ),
    ] = None,
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark that no row may quote: a file, or all splits of a folder. May be repeated."
        ),
    ] = None,
    most: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            help="NAME=SHARE: the largest share of rows with a fault; a larger one exits with 3.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 3 if any row has a fault other than languages.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Checks a dataset for faults; with a model, shows lengths, packing and the first sample."""
    from middo_jax import inspecting

    layers = with_data(data, overrides or ())
    found = inspecting.inspect(layers, model, against or (), most or (), strict)
    for line in found.said:
        print(line, file=sys.stderr)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    show(as_json, found.facts, found.text(color))
    if found.is_over:
        raise typer.Exit(EXIT_FAULTS)
