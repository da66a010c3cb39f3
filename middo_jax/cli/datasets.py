"""Commands about datasets: export-data, convert, inspect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from middo_jax.cli.options import DATA_HELP, EXIT_FAULTS, AsJson, Overrides, RunFolder, data_layer, show
from middo_jax.cli.program import app

if TYPE_CHECKING:
    from middo_jax.config import Config
    from middo_jax.data.sources import UserRows


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
    from middo_jax.rundir import RunDir

    extras: exporting.Extras = {"heldout": heldout, "scores": scores, "lineage": lineage, "pairs": pairs}
    done = exporting.export_data(RunDir(run), out, to, license, **extras)
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
    from middo_jax.rundir import RunDir

    if license is None and sys.stdin.isatty():
        license = typer.prompt(pushing.ASKED, err=True)
    extras: exporting.Extras = {"heldout": heldout, "scores": scores, "lineage": lineage, "pairs": pairs}
    plan = pushing.Push(repo, license, public, dry_run)
    done = pushing.push(RunDir(run), plan, to, **extras)
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
    from middo_jax.config import load
    from middo_jax.data.files import require_not_read
    from middo_jax.data.mixing import read_configured
    from middo_jax.data.sources import commonest_reasons, write
    from middo_jax.rundir import local, write_jsonl

    config = load(None, ["model.path=none", data_layer(data), *(overrides or ())])
    settings = config.data
    if from_ != "auto":
        settings = settings.model_copy(update={"format": from_})
    for path in settings.paths:
        require_not_read(path, [out, out.with_name(f"{out.name}.rejected.jsonl")])
    read = read_configured(settings, config.seed)
    examples, rejections = read.examples, read.rejections
    for line in read.said:
        print(line, file=sys.stderr)
    write(examples, local(out), to, settings.id_column or "id")
    if rejections:
        beside = out.with_name(f"{out.name}.rejected.jsonl")
        write_jsonl(beside, (r.to_json() for r in rejections))
        print(f"{len(rejections)} rows could not be used, see {beside}", file=sys.stderr)
        print("\n".join(commonest_reasons(rejections)), file=sys.stderr)
    if read.repairs:
        print("rows were repaired (data.strict=true refuses them):", file=sys.stderr)
        print("\n".join(commonest_reasons(read.repairs)), file=sys.stderr)
    counts = {"n": len(examples), "rejected": len(rejections), "repaired": len(read.repairs)}
    show(as_json, {"out": str(out), **counts}, str(out))


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
        typer.Option(help="A benchmark's file that no row may quote; repeat the option for further files."),
    ] = None,
    most: Annotated[
        list[str] | None,
        typer.Option("--max", help="NAME=SHARE: the largest share of rows with a fault; more ends with 3."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Ends with 3 if any row has a fault; languages do not count.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Checks a dataset for faults; with a model, shows lengths, packing and the first sample."""
    from middo_jax import linting
    from middo_jax.config import load
    from middo_jax.data.mixing import read_configured
    from middo_jax.models.loading import tokenizer_directory
    from middo_jax.report.inspection import inspect_rows
    from middo_jax.report.terminal import printable, render_inspection

    base = tokenizer_directory(model) if model else "none"
    config = load(None, [data_layer(data), f"model.path={base}", *(overrides or ())])
    rows = read_configured(config.data, config.seed)
    for line in rows.said:
        print(line, file=sys.stderr)
    facts = inspect_rows(rows.examples, rows.rejections, rows.repairs)
    texts = [text for path in against or () for text in linting.read_texts(path)]
    limits = linting.read_limits(most or ())
    faults = linting.lint(rows.examples, rows.places, rows.rejections, limits, strict, texts)
    if model:
        facts = _inspected(config, rows)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    facts["checks"] = [found.to_json() for found in faults]
    lines = printable("\n".join(linting.render(faults)))
    show(as_json, facts, f"{render_inspection(facts, color=color)}\n{lines}")
    if any(found.is_over for found in faults):
        raise typer.Exit(EXIT_FAULTS)


def _inspected(config: Config, rows: UserRows) -> dict[str, Any]:
    """What a model's tokenizer makes of the rows."""
    from middo_jax.data.tokenize import tokenize_all, truncate
    from middo_jax.progress import for_stderr
    from middo_jax.report.inspection import inspect_rows, inspect_tokens
    from middo_jax.session import Session, usable

    session, max_length = Session(config, for_stderr()), config.model.max_length
    rows = usable(session, rows)
    whole = tokenize_all(rows.examples, session.tokenizer)
    cut = [truncate(tokenized, max_length) for tokenized in whole]
    session.tell_of_no_end(cut)
    return inspect_rows(rows.examples, rows.rejections, rows.repairs) | inspect_tokens(
        whole,
        cut,
        session.tokenizer,
        max_length=max_length,
        pack_length=max_length,
        scoring=session.plan_losses(cut).facts(),
    )
