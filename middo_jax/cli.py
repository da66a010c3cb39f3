"""The commands: parse, call, print. Results go to stdout, progress goes to stderr.

Imports are inside the functions, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from middo_jax.config import Config
    from middo_jax.data.sources import UserRows
    from middo_jax.evaluation.heldout import HeldoutLoss
    from middo_jax.results import Run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Closed-loop data optimisation for LLM fine-tuning. Settings come last, as a.b=value.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=c]...", help="Settings or YAML files of settings; later ones take precedence."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[str, typer.Option(help="A file, a dataset directory, tfds:NAME:SPLIT or hf:NAME:SPLIT.")]
MODEL_HELP = "A Hugging Face directory, a checkpoint, a LoRA adapter, a .gguf file or a hub id."
Model = Annotated[str, typer.Option(help=MODEL_HELP)]


EXIT_FAULTS = 3  # of `middo inspect`: more rows have a fault than a limit allows
_JOB: dict[str, Any] = {}  # what the options say of the job that this process belongs to


@contextlib.contextmanager
def _in_job(shared: Path, overrides: list[str] | None, config: Path | None = None) -> Iterator[None]:
    """The block runs in all processes of a job, if there is one; all of them see the folder `shared`."""
    from middo_jax.config import load
    from middo_jax.parallel.cluster import find_job, joined
    from middo_jax.progress import for_stderr

    unnamed = [] if config else [{"model.path": "-", "data.path": "-"}]
    hosts = load(config, [*unnamed, *(overrides or ())]).hosts
    with joined(find_job(os.environ, **_JOB), for_stderr(), shared, hosts, _print_error):
        yield


def _print_error(error: BaseException) -> None:
    if not isinstance(error, (ValueError, OSError, RuntimeError)) or os.environ.get("MIDDO_TRACEBACK"):
        traceback.print_exception(error)
        return
    print(f"middo: {error}", file=sys.stderr)
    print("(MIDDO_TRACEBACK=1 shows the traceback)", file=sys.stderr)


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
    _JOB.update(coordinator=coordinator, processes=processes, process=process)


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
        _print_error(error)
        sys.exit(1)


@app.command("run", epilog="Example: middo run configs/quickstart.yaml rounds=2 train.learning_rate=1e-4")
def run_command(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Runs the closed loop: train, score, select, refine, merge, repeat. Continues where it stopped."""
    from middo_jax import api

    runs_dir = Path(api.load_config(config, overrides).runs_dir)
    with _in_job(runs_dir, overrides, config):
        _show_run(api.run(config, overrides), as_json)


@app.command(epilog="Example: middo quickstart train.num_epochs=2")
def quickstart(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Runs the loop on a small model and rows that ship with the program, in runs/quickstart."""
    from middo_jax import api

    _show_run(api.run(*api.quickstart(overrides)), as_json)


@app.command(epilog="Example: middo score --data alpaca.json --model ./tuned --pre-model ./base --out scored")
def score(
    data: Data,
    model: Model,
    out: Annotated[
        Path, typer.Option(help="The folder for dataset.jsonl, scores.parquet and embeddings.parquet.")
    ],
    pre_model: Annotated[str | None, typer.Option(help="The model before training, for loss_pre.")] = None,
    axes: Annotated[str, typer.Option(help="Comma-separated.")] = "complexity,diversity,quality",
    keep_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of the data to write next to the scores, comma-separated. Default: all scalar ones."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measures losses, neighbours and ratings of a dataset, without the loop."""
    from middo_jax import api
    from middo_jax.rundir import RoundDir

    wanted = _names(axes)
    api.require_axes(wanted, "--axes")
    kept = None if keep_columns is None else _names(keep_columns)
    with _in_job(out.absolute().parent, overrides):
        scores = api.score(data, model, pre_model, wanted, keep_columns=kept, out=out, settings=overrides)
    path = str(RoundDir(out).scores)
    result = {"out": str(out), "n": len(scores.table), "rejected": len(scores.rejected), "scores": path}
    _show(as_json, result, path)


@app.command(epilog="Example: middo select scored complexity.m=1.5 quality.fraction=0.05")
def select(directory: Path, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Selects the hard, sparse and low-quality samples of DIRECTORY/scores.parquet."""
    from middo_jax import selecting
    from middo_jax.report.terminal import render_selection

    selection = selecting.select(directory, settings=overrides).facts
    _show(as_json, selection, render_selection(selection))


@app.command(
    epilog="Example: middo refine scored --dry-run refine.base_url=http://127.0.0.1:8000/v1 refine.model=m"
)
def refine(
    directory: Path,
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
    as_json: AsJson = False,
) -> None:
    """Rewrites the selected samples of DIRECTORY by a served LLM, into refined.jsonl and merged.jsonl."""
    from middo_jax import api, refinement, stages
    from middo_jax.report.terminal import render_batch, render_dry_run
    from middo_jax.rundir import RoundDir, held
    from middo_jax.session import session_of

    session, here = session_of(directory, overrides), RoundDir(directory)
    settings = session.config.refine
    if dry_run:
        form = "json" if settings.response_format == "json" else "text"
        tasks = stages.plan_refinement(here, settings.turns)
        plan = refinement.dry_run(tasks, settings, form, stages.kept_samples(here, settings.turns))
        facts = dataclasses.asdict(plan)
        _show(as_json, facts, render_dry_run(facts))
        return
    if write_batch or read_batch:
        with held(here.path), stages.answer_cache(session, here) as cache:
            state = stages.batch_stage(session, here, cache, read_batch or (), write_batch)
            if not state.is_finished:
                facts = dataclasses.asdict(state)
                command = shlex.join(["middo", "refine", str(directory), *(overrides or ())])
                _show(as_json, facts, render_batch(facts, command, write_batch))
                return
            refined = api.merged(session, here)
    else:
        refined = api.refine(directory, settings=overrides)
    counts = {"tasks": len(refined.rows), "accepted": refined.n_accepted}
    result = {**counts, "merged": str(refined.merged), "usage": refined.usage}
    text = f"{refined.n_accepted} of {len(refined.rows)} rewrites accepted\n{refined.merged}"
    _show(as_json, result, text)


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

    with _in_job(out.absolute().parent, overrides):
        trained = api.train(data, model, out, settings=overrides)
    checkpoint = str(trained.checkpoint)
    result: dict[str, Any] = {"checkpoint": checkpoint, "last": trained.metrics[-1]}
    if trained.heldout is not None:
        result["heldout"] = _loss(trained.heldout)
    _show(as_json, result, checkpoint)


@app.command(
    "eval", epilog="Example: middo eval --data heldout.jsonl --model runs/quickstart/final/checkpoint"
)
def evaluate(data: Data, model: Model, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measures the loss per target token of a model on a dataset."""
    from middo_jax import api

    with _in_job(Path.cwd(), overrides):
        result = _loss(api.evaluate(data, model, settings=overrides))
    _show(as_json, result, f"{result['loss']:.6f} nats per token over {result['n_target_tokens']:,} tokens")


@app.command(epilog="Example: middo export runs/quickstart/final/checkpoint ./tuned --dtype bfloat16")
def export(
    checkpoint: Path,
    out: Path,
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

    with _in_job(out.absolute().parent, None):
        exported = api.export(checkpoint, out, dtype=dtype, verify=verify, adapter=adapter)
    _show(as_json, {"out": str(exported.path), **(exported.verification or {})}, str(exported.path))


@app.command(
    "export-data", epilog="Example: middo export-data runs/mine ./better --with-heldout --with-scores"
)
def export_data(
    run: Path,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--format", help="alpaca sharegpt messages prompt_completion parquet. Default: as it came in."
        ),
    ] = None,
    heldout: Annotated[bool, typer.Option("--with-heldout", help="Also write the held-out rows.")] = False,
    scores: Annotated[
        bool, typer.Option("--with-scores", help="Add the last scores as middo_loss_post etc.")
    ] = False,
    lineage: Annotated[
        bool, typer.Option("--with-lineage", help="Add where each row comes from, as middo_op etc.")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--with-pairs", help="Also write preference pairs, accepted against lost answers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a run's last dataset with a card, and what LLaMA-Factory, axolotl and TRL need to read it."""
    from middo_jax import exporting
    from middo_jax.rundir import RunDir

    parts = {"heldout": heldout, "scores": scores, "lineage": lineage, "pairs": pairs}
    done = exporting.export_data(RunDir(run), out, to, **parts)
    _show(as_json, {**done._asdict(), "path": str(done.path)}, str(done.path))


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
    overrides: Overrides = None,
) -> None:
    """Writes a dataset in another format. Unusable rows are counted and written to OUT.rejected.jsonl."""
    from middo_jax.config import load
    from middo_jax.data.files import require_not_read
    from middo_jax.data.reading import Reading
    from middo_jax.data.sources import commonest_reasons, read_rows, write
    from middo_jax.rundir import local, write_jsonl

    require_not_read(data, [out, out.with_name(f"{out.name}.rejected.jsonl")])
    settings = load(None, ["model.path=none", {"data.path": data}, *(overrides or ())]).data
    read = read_rows(data, from_, settings.limit, Reading.of(settings))
    examples, rejections = read.examples, read.rejections
    write(examples, local(out), to, settings.id_column or "id")
    if rejections:
        beside = out.with_name(f"{out.name}.rejected.jsonl")
        write_jsonl(beside, (r.to_json() for r in rejections))
        print(f"{len(rejections)} rows could not be used, see {beside}", file=sys.stderr)
        print("\n".join(commonest_reasons(rejections)), file=sys.stderr)
    if read.repairs:
        print("rows were repaired (data.strict=true refuses them):", file=sys.stderr)
        print("\n".join(commonest_reasons(read.repairs)), file=sys.stderr)
    print(out)


@app.command(epilog="Example: middo serve ./tuned --port 8000")
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    overrides: Overrides = None,
) -> None:
    """Serves a model by an OpenAI-compatible endpoint, on loopback unless --host is given."""
    from middo_jax.inference.server import build_app, load_engine, serve_forever
    from middo_jax.models.resolve import resolve
    from middo_jax.session import new_session

    path = resolve(model)
    named = {"model.path": str(path), "data.path": "none"}
    session = new_session([named, *(overrides or ())])
    config = session.config
    engine, tokenizer, eos_ids = load_engine(path, config.serve, config.model.dtype, mesh=session.mesh)
    with engine:
        serve_forever(build_app(engine, tokenizer, path.resolve().name, eos_ids), host, port)


@app.command(epilog="Example: middo report runs/quickstart")
def report(run: Path) -> None:
    """Writes RUN/report.html again, from the present files."""
    from middo_jax.report.build import build
    from middo_jax.rundir import RunDir

    print(build(RunDir(run)))


@app.command(epilog="Example: middo status runs/quickstart")
def status(run: Path, as_json: AsJson = False) -> None:
    """Shows the finished stages of a run, the stale ones, and the next one."""
    from middo_jax.report.status import render_status
    from middo_jax.report.status import status as of
    from middo_jax.rundir import RunDir

    facts = of(RunDir(run))
    _show(as_json, facts, render_status(facts))


@app.command(epilog="Example: middo trace runs/quickstart 3fa9c2")
def trace(
    run: Path,
    sample: Annotated[str, typer.Argument(metavar="ID", help="An id, or the beginning of one.")],
    as_json: AsJson = False,
) -> None:
    """Shows the ancestors and descendants of a sample over the rounds, with their scores."""
    from middo_jax.report.lineage import trace as of
    from middo_jax.report.terminal import render_trace
    from middo_jax.rundir import RunDir

    chain = of(RunDir(run), sample)
    _show(as_json, chain, render_trace(chain))


@app.command(epilog="Example: middo inspect alpaca.json --model ./base model.max_length=512")
def inspect(
    data: Annotated[str, typer.Argument(help="As --data of other commands.")],
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
    from middo_jax.data.reading import Reading
    from middo_jax.data.sources import read_rows
    from middo_jax.models.source import tokenizer_directory
    from middo_jax.report.inspection import inspect_rows
    from middo_jax.report.terminal import printable, render_inspection

    base = tokenizer_directory(model) if model else "none"
    config = load(None, [f"model.path={base}", f"data.path={data}", *(overrides or ())])
    reading = Reading.of(config.data)
    rows = read_rows(config.data.path, config.data.format, config.data.limit, reading)
    facts = inspect_rows(rows.examples, rows.rejections, rows.repairs)
    texts = [text for path in against or () for text in linting.read_texts(path)]
    limits = linting.read_limits(most or ())
    faults = linting.lint(rows.examples, rows.places, rows.rejections, limits, strict, texts)
    if model:
        facts = _inspected(config, rows)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    facts["checks"] = [found.to_json() for found in faults]
    lines = printable("\n".join(linting.render(faults)))
    _show(as_json, facts, f"{render_inspection(facts, color=color)}\n{lines}")
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


def _show_run(done: Run, as_json: bool) -> None:
    from middo_jax.report.effects import effect_lines

    text = "\n".join([*effect_lines(done.facts["effects"]), str(done.report)])
    _show(as_json, {"report": str(done.report), **done.facts}, text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _loss(of: HeldoutLoss) -> dict[str, Any]:
    return {"loss": of.loss, "n_target_tokens": of.n_target_tokens}


def _show(as_json: bool, value: Any, text: str) -> None:
    from middo_jax.rundir.files import is_reader

    if is_reader():  # another process of the job prints it
        return
    print(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text)
