"""The steps of the loop as commands of their own: score, select, refine, train, eval, export."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from middo_jax.cli.options import (
    MODEL_HELP,
    AsJson,
    Data,
    Model,
    Overrides,
    ScoredFolder,
    beside,
    in_job,
    inside,
    names_in,
    show,
)
from middo_jax.cli.program import app

if TYPE_CHECKING:
    from middo_jax.evaluation.heldout import HeldoutLoss
    from middo_jax.results import Scores


@app.command(epilog="Example: middo score --data alpaca.json --model ./tuned --pre-model ./base --out scored")
def score(
    data: Data,
    model: Annotated[
        list[str],
        typer.Option(
            help=f"{MODEL_HELP} Several, each as NAME=MODEL: OUT/by_model.parquet has all their columns."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for dataset.jsonl, scores.parquet and embeddings.parquet.")
    ],
    pre_model: Annotated[str | None, typer.Option(help="The model before training, for loss_pre.")] = None,
    axes: Annotated[
        str | None,
        typer.Option(help="Axes to measure, comma-separated. Default: those that the settings name."),
    ] = None,
    keep_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of the data to write next to the scores, comma-separated. Default: all scalar ones."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again, and replace the scores that OUT has.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measures losses, neighbours and ratings of a dataset, without the loop; reuses the scores in OUT."""
    from middo_jax import api, comparing

    wanted, named = None if axes is None else names_in(axes), _named_models(model)
    api.require_axes(wanted or (), "--axes")
    options: comparing.ScoreOptions = {
        "pre_model": pre_model,
        "axes": wanted,
        "keep_columns": None if keep_columns is None else names_in(keep_columns),
        "force": force,
        "settings": overrides,
    }
    with in_job(beside(out), overrides):
        if named is None:
            scores = api.score(data, model[0], out=out, **options)
            path, facts = inside(out, "scores.parquet"), _facts(scores)
        else:
            found = comparing.score_models(data, named, out, **options)
            of = {name: _facts(scores) for name, scores in found.of.items()}
            path, facts = str(found.path), {"n": len(found.table), "models": of}
    show(as_json, {"out": inside(out), **facts, "scores": path}, path)


def _named_models(given: list[str]) -> dict[str, str] | None:
    """The models of `--model NAME=MODEL` by name; None if one model was given without a name.

    Raises:
      ValueError: of several, one has no name, or two have the same.
    """
    pairs = [value.partition("=") for value in given]
    if len(given) == 1 and (not pairs[0][1] or Path(given[0]).exists()):
        return None
    if unnamed := [
        value for value, (_, sign, model) in zip(given, pairs, strict=True) if not sign or not model
    ]:
        raise ValueError(
            f"--model {unnamed[0]}: of several models each needs a name: --model NAME={unnamed[0]}"
        )
    named = {name: model for name, _, model in pairs}
    if len(named) < len(given):
        raise ValueError("--model: two models have the same name")
    return named


def _facts(scores: Scores) -> dict[str, Any]:
    counts = {"n": len(scores.table), "rejected": len(scores.rejected), "n_reused": scores.n_reused}
    return {**counts, "reused": scores.reused}


@app.command(epilog="Example: middo select scored complexity.m=1.5 quality.fraction=0.05")
def select(directory: ScoredFolder, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Selects the hard, sparse and low-quality samples of DIRECTORY/scores.parquet."""
    from middo_jax import selecting
    from middo_jax.report.terminal import render_selection

    selection = selecting.select(directory, settings=overrides).facts
    show(as_json, selection, render_selection(selection))


@app.command(
    epilog="Example: middo refine scored --dry-run refine.base_url=http://127.0.0.1:8000/v1 refine.model=m"
)
def refine(
    directory: ScoredFolder,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the requests and their estimated cost.")
    ] = False,
    write_batch: Annotated[
        Path | None,
        typer.Option(help="Send nothing; write the requests that are possible now as an OpenAI batch file."),
    ] = None,
    read_batch: Annotated[
        list[Path] | None, typer.Option(help="A result file of a batch; repeat the option for further files.")
    ] = None,
    write_review: Annotated[
        Path | None, typer.Option(help="A new file with the accepted rewrites, for people to judge.")
    ] = None,
    review_format: Annotated[str, typer.Option(help="Of --write-review: argilla label-studio")] = "argilla",
    read_review: Annotated[
        list[Path] | None,
        typer.Option(help="A file with people's verdicts; repeat the option for further files."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="A new file with all answers of the refiner so far, for refine.base_url=replay:FILE."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrites the selected samples of DIRECTORY by a served LLM, into refined.jsonl and merged.jsonl."""
    from middo_jax import api
    from middo_jax.report.terminal import render_batch, render_dry_run
    from middo_jax.results import Refined

    if write_review or read_review:
        _review(directory, write_review, review_format, read_review or [], overrides, as_json)
        return
    if record is not None:
        _record(directory, record, overrides, as_json)
        return
    if dry_run:
        facts = dataclasses.asdict(api.dry_run(directory, settings=overrides))
        show(as_json, facts, render_dry_run(facts))
        return
    if write_batch or read_batch:
        refined = api.refine_by_batch(directory, read_batch or (), write_batch, settings=overrides)
        if not isinstance(refined, Refined):
            facts = dataclasses.asdict(refined)
            command = shlex.join(["middo", "refine", str(directory), *(overrides or ())])
            show(as_json, facts, render_batch(facts, command, write_batch))
            return
    else:
        refined = api.refine(directory, settings=overrides)
    counts = {"tasks": len(refined.rows), "accepted": refined.n_accepted}
    result = {**counts, "merged": str(refined.merged), "usage": refined.usage}
    text = f"{refined.n_accepted} of {len(refined.rows)} rewrites accepted\n{refined.merged}"
    show(as_json, result, text)


def _record(directory: Path, path: Path, overrides: list[str] | None, as_json: bool) -> None:
    from middo_jax import recording
    from middo_jax.report.terminal import printable

    n, model = recording.record(directory, path, settings=overrides)
    facts = {"answers": n, "model": model, "recording": str(path)}
    show(as_json, facts, f"{n:,} answers of {printable(model, lines=False)}\n{path}")


def _review(
    directory: Path,
    write: Path | None,
    form: str,
    read: list[Path],
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    from middo_jax import reviewing
    from middo_jax.report.verdicts import describe
    from middo_jax.rundir import RoundDir

    if write is not None and read:
        raise ValueError("give --write-review or --read-review, not both")
    if write is not None:
        n = reviewing.write_review(directory, write, form, settings=overrides)
        show(as_json, {"rewrites": n, "review": str(write)}, f"{n:,} rewrites to review\n{write}")
        return
    refined, found = reviewing.read_review(directory, read, settings=overrides)
    run = RoundDir(directory).run
    then = "" if run is None else "\n`middo run` now makes again what depends on the merged dataset"
    text = f"{describe(found)}{then}\n{refined.merged}"
    show(as_json, {"verdicts": dict(found), "merged": str(refined.merged)}, text)


@app.command(epilog="Example: middo train --data alpaca.json --model ./base --out tuned train.num_epochs=3")
def train(
    data: Data,
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for checkpoint/ and metrics.jsonl.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tunes a model on a dataset. Continues where it stopped."""
    from middo_jax import api
    from middo_jax.buckets import shown

    with in_job(beside(out), overrides):
        trained = api.train(data, model, out, settings=overrides)
    checkpoint = shown(trained.checkpoint)
    result: dict[str, Any] = {"checkpoint": checkpoint, "last": trained.metrics[-1]}
    if trained.heldout is not None:
        result["heldout"] = _loss(trained.heldout)
    show(as_json, result, checkpoint)


@app.command(
    "eval", epilog="Example: middo eval --data heldout.jsonl --model runs/quickstart/final/checkpoint"
)
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="For the loss: as --data of other commands.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="For benchmarks: lm-eval's tasks, comma-separated (evaluate.tasks).")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own (evaluate.include_path).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum rows of each task (evaluate.limit).")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question (evaluate.num_fewshot).")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measures the loss per target token of a model on a dataset, or its scores on benchmarks."""
    from middo_jax import api
    from middo_jax.report.benchmarks import render_benchmarks

    if (data is None) == (tasks is None):
        raise ValueError("middo eval: give --data for the loss on a dataset, or --tasks for benchmarks")
    named = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    if data is not None and (of_tasks := [name for name, value in named.items() if value is not None]):
        options = " and ".join(f"--{name.replace('_', '-')}" for name in of_tasks)
        raise ValueError(
            f"middo eval: {options}: only with --tasks, not with --data (data.limit limits the rows)"
        )
    if data is None:
        given = {
            f"evaluate.{name}": str(value) if isinstance(value, Path) else value
            for name, value in named.items()
            if value is not None
        }
        settings = [*(overrides or ()), given]
        with in_job(Path.cwd(), overrides):
            found = api.benchmark(model, names_in(tasks or ""), settings=settings)
        show(as_json, found, render_benchmarks([found]))
        return
    with in_job(Path.cwd(), overrides):
        result = _loss(api.evaluate(data, model, settings=overrides))
    show(as_json, result, f"{result['loss']:.6f} nats per token over {result['n_target_tokens']:,} tokens")


@app.command(epilog="Example: middo export runs/quickstart/final/checkpoint ./tuned --dtype bfloat16")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of a run or of `middo train`, or a LoRA adapter.")
    ],
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as trained, float32, if not given.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="If torch is installed, compare logits with transformers; needs memory for a second model."
        ),
    ] = True,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the LoRA adapter alone, as a PEFT directory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a checkpoint as a Hugging Face directory; a LoRA adapter is merged."""
    from middo_jax import api
    from middo_jax.buckets import shown

    with in_job(beside(out), None):
        exported = api.export(checkpoint, out, dtype=dtype, verify=verify, adapter=adapter)
    path = shown(exported.path)
    show(as_json, {"out": path, **(exported.verification or {})}, path)


def _loss(of: HeldoutLoss) -> dict[str, Any]:
    return {"loss": of.loss, "n_target_tokens": of.n_target_tokens}
