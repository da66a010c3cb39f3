"""The public functions behind the commands and the Python API. They return values; progress goes to stderr.

This module loads JAX, so `import middo_jax` imports it only when one of its functions is used. `select` is in
`selecting`, which does not load JAX.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from middo_jax import refinement, stages
from middo_jax.buckets import here, working
from middo_jax.config import Config, ConfigError, SettingsLike, layers_of, load
from middo_jax.config.axis_table import axes as axis_rows
from middo_jax.config.axis_table import axis_names, scored_axes
from middo_jax.data.example import Example
from middo_jax.data.files import require_not_read
from middo_jax.data.in_memory import RowsLike
from middo_jax.data.own_columns import own_columns, with_user_ids
from middo_jax.data.user_rows import UserRows
from middo_jax.evaluation.heldout import HeldoutLoss
from middo_jax.loop import run_loop
from middo_jax.models.resolve import resolve
from middo_jax.parallel.coordination import barrier, from_first
from middo_jax.planning.amounts import Amounts
from middo_jax.planning.forecast import Plan, PlanRequest, plan_run
from middo_jax.progress import for_stderr
from middo_jax.quickstart import ANSWERS, CONFIG, DATA, demo_model, shipped
from middo_jax.refinement import DryRun
from middo_jax.report.status import status
from middo_jax.results import Exported, Refined, Run, Scores, Trained
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    RunError,
    held,
    local,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.rows import BenchmarksFile
from middo_jax.selecting import PathLike, load_config
from middo_jax.session import Prepared, Session, prepare, read_data, session_for, session_of, write_dataset
from middo_jax.signals.axes import computed_names
from middo_jax.signals.table import SCHEMA, with_columns
from middo_jax.stages.batch import BatchState
from middo_jax.stages.score import measure_samples

NO_PRE_MODEL = "no --pre-model (pre_model in Python): loss_pre stays empty, and no sample can be hard"


def run(config: Config | PathLike, settings: SettingsLike = None, *, repair: bool = False) -> Run:
    """The closed loop: train, score, select, refine, merge, again; resumed where it stopped.

    Args:
      config: of `load_config`, or a YAML file.
      settings: laid over a YAML file, see `load_config`.
      repair: put damaged files aside, in a folder `damaged-...` of the run, and do again what is missing.

    Raises:
      ValueError: a wrong setting, or data that cannot be used.
      RunError: the folder holds a run of an earlier version, or a file that cannot be used.
      DiskFull: there is no room; what was finished is kept.
    """
    if isinstance(config, Config):
        config = load(None, [*layers_of(config), *layers_of(settings)])
    else:
        config = load_config(config, settings)
    progress = for_stderr()
    with working(config.place, progress.say) as folder:
        done = run_loop(config, progress, repair, folder)
        return Run(done.path, done.report, status(done))


def quickstart(settings: SettingsLike = None) -> tuple[Path, list[str | Mapping[str, Any]]]:
    """Returns the arguments of `run` for a small model and the rows that ship with the package."""
    layers = layers_of(settings)
    files = {"data.path": str(shipped() / DATA), "refine.base_url": f"replay:{shipped() / ANSWERS}"}
    own = load(shipped() / CONFIG, [files, {"model.path": ""}, *layers]).model.path
    # The demo model is searched and downloaded only if the settings name no other model.
    named = {**files, "model.path": own or demo_model()}
    return shipped() / CONFIG, [named, *layers]


def score(
    rows: RowsLike,
    model: PathLike,
    pre_model: PathLike | None = None,
    axes: Collection[str] | None = None,
    *,
    keep_columns: Collection[str] | None = None,
    out: PathLike | None = None,
    force: bool = False,
    settings: SettingsLike = None,
) -> Scores:
    """Computes losses, neighbours and ratings of a dataset under a model.

    Args:
      rows: a path, tfds:NAME:SPLIT or hf:NAME:SPLIT; or a list of dicts, a pyarrow Table, a pandas DataFrame
        or a Hugging Face Dataset. The columns tell the format (`data.format`).
      model: a Hugging Face directory, a checkpoint of ours, a LoRA adapter, a .gguf file or a hub repo id.
      pre_model: the model before training, for `loss_pre`. None leaves that empty, and no sample can be hard.
      axes: what to measure, of complexity, diversity, quality, consistency and registered axes. None is all
        but consistency, which scoring.readings=[consistency] adds.
      keep_columns: which of the user's columns come back; None is all that hold scalars only.
      out: a folder that gets dataset.jsonl, scores.parquet, embeddings.parquet and the manifest, for `select`
        and `middo refine`. None writes nothing. Samples that it has scores of, by the same models and
        settings, are not measured again.
      force: whether scores that `out` has are measured again, and replaced if they are others.
      settings: see `load_config`; or a Config, of which the model and the data are replaced.

    Raises:
      ValueError: an axis is unknown, a setting is wrong, or the data cannot be used.
      RunError: `out` has other scores, and `force` is not set.
      RunLocked: another process writes into `out`.
    """
    require_axes(axes or ())
    model_path = resolve(os.fspath(model))
    with _locked(out) as place:
        session = session_for(model_path, _path(rows), settings, place).settled()
        axes = scored_axes(session.config) if axes is None else axes
        stages.check_own_texts(session.config)
        prepared, own = _read(session, rows, keep_columns)
        kept, rejections = prepared.kept, prepared.rejections
        if pre_model is None and "complexity" in axes:
            session.progress.say(NO_PRE_MODEL)
        pre_path = None if pre_model is None else resolve(os.fspath(pre_model))
        if place is None:
            table, embedding_nd, facts = measure_samples(session, kept, model_path, pre_path, axes)
            return Scores(with_columns(table, own), embedding_nd, rejections, facts["passes"])
        stages.check_embedder(session, pre_path, axes)
        require_no_run(place)
        link = stages.scoring(session, RoundDir(place), model_path, pre_path)
        found = from_first("score: before", lambda: stages.found_scores(link, session, kept, axes, force))
        directory = _begin(session, place, prepared)
        if found == "all":
            scored = stages.kept_scores(session, link, own)
        else:
            earlier = directory if found == "some" else None
            scored = stages.score_stage(
                session, directory, model_path, pre_path, axes, earlier=earlier, own=own
            )
    table, embedding_nd, facts = scored
    return Scores(table, embedding_nd, rejections, facts["passes"], facts.get("n_kept", 0))


def refine(folder: PathLike, *, settings: SettingsLike = None) -> Refined:
    """Rewrites the selected samples of a folder with a served LLM, and accepts or rejects the rewrites.

    Each answer is cached when it arrives, so a second call pays for no request twice.

    Args:
      folder: folder written by `score` and `select`, or a round of a run.
      settings: override those of its config.yaml, such as {"refine.base_url": URL, "refine.model": NAME}.

    Raises:
      RunLocked: another process writes into the folder.
      RunError: the folder contains no selection.
      RefinerError: the endpoint fails for every request; earlier answers stay in the cache.
    """
    session, directory = session_of(Path(folder), settings), RoundDir(Path(folder))
    with held(directory.path):
        stages.refine_round(session, directory)
        return merge_refined(session, directory)


def dry_run(folder: PathLike, *, settings: SettingsLike = None) -> DryRun:
    """The requests that `refine` would send, and their estimated cost. Sends and writes nothing.

    Args:
      folder: see `refine`.
      settings: see `refine`.

    Raises:
      RunError: the folder holds no selection.
    """
    asked, here = session_of(Path(folder), settings).config.refine, RoundDir(Path(folder))
    form = "json" if asked.response_format == "json" else "text"
    tasks = stages.plan_refinement(here, asked)
    return refinement.dry_run(tasks, asked, form, stages.kept_samples(here, asked.turns))


def refine_by_batch(
    folder: PathLike,
    read: Sequence[PathLike] = (),
    write: PathLike | None = None,
    *,
    settings: SettingsLike = None,
) -> Refined | BatchState:
    """Like `refine`, but requests and answers are files of OpenAI's batch API.

    Args:
      folder: see `refine`.
      read: result files.
      write: the file that gets the requests without an answer.
      settings: see `refine`; `refine.model` must be set.

    Returns:
      The rewrites once all requests have an answer; the state of the batch until then.

    Raises:
      RunLocked: another process writes into the folder.
      RunError: the folder holds no selection, `refine.model` is not set, a file holds no results of these
        requests, or it would be overwritten.
    """
    files, out = [Path(path) for path in read], None if write is None else Path(write)
    if out is not None and out.resolve() in {file.resolve() for file in files}:
        raise RunError(f"{out} has results that are read, and would be overwritten; write to another file")
    session, directory = session_of(Path(folder), settings), RoundDir(Path(folder))
    with held(directory.path), stages.answer_cache(session, directory) as cache:
        state = stages.batch_stage(session, directory, cache, files, out)
        return merge_refined(session, directory) if state.is_finished else state


def train(rows: RowsLike, model: PathLike, out: PathLike, *, settings: SettingsLike = None) -> Trained:
    """Fine-tunes a model (SFT). A second call with the same arguments resumes a stopped training.

    Args:
      rows: see `score`.
      model: the model that training starts from, see `score`.
      out: folder for checkpoint/, metrics.jsonl, dataset.jsonl and the manifest.
      settings: see `load_config`, such as {"train.num_epochs": 3, "lora.rank": 16}.

    Raises:
      ValueError: a setting is wrong, or the data cannot be used.
      RunLocked: another process writes into the folder.
      AnotherTraining: the folder contains another training, which stays unchanged.
      RunError: the folder belongs to a run.
      TrainingDiverged, OutOfMemory: the message says what to do.
    """
    model_path = resolve(os.fspath(model))
    with working(out, for_stderr().say) as place, held(place):
        session = session_for(model_path, _path(rows), settings, place).settled()
        data = read_data(session, None if _path(rows) else rows)
        prepared = prepare(session, data)
        kept, heldout = prepared.kept, prepared.heldout
        with session.stage():  # the checks, the training and the final loss share tokenized conversations
            stages.check_training(session, kept, heldout)
            stages.check_continues(session, RoundDir(place), kept)
            directory = _begin(session, place, prepared)
            stages.train_stage(session, directory, model_path, heldout)
            loss = None
            if heldout:
                loss = stages.HeldOut(session, heldout).loss(session.load_model(directory.checkpoint))
        return Trained(directory.checkpoint, read_jsonl(directory.metrics), loss)


def evaluate(rows: RowsLike, model: PathLike, *, settings: SettingsLike = None) -> HeldoutLoss:
    """Computes the loss of a model on a dataset and on each of its sources, in nats per target token.

    Args:
      rows: see `score`.
      model: see `score`.
      settings: see `load_config`.

    Raises:
      ValueError: a setting is wrong, or the data cannot be used.
    """
    path = resolve(os.fspath(model))
    session = session_for(path, _path(rows), settings)
    examples, *_ = prepare(session, read_data(session, None if _path(rows) else rows))
    return stages.HeldOut(session, examples).loss(session.load_model(path))


def benchmark(
    model: PathLike, tasks: Collection[str] = (), *, settings: SettingsLike = None
) -> BenchmarksFile:
    """The scores of a model on lm-eval's tasks and on the offline ones, with standard errors.

    Args:
      model: see `score`.
      tasks: as `evaluate.tasks`, which they replace if there are any.
      settings: see `load_config`, such as {"evaluate.limit": 100}.

    Returns:
      The contents of benchmarks.json (docs/files.md).

    Raises:
      ValueError: a wrong setting, or a task that is not known or cannot be run.
      OSError: a task's dataset is neither here nor within reach.
    """
    path = resolve(os.fspath(model))
    named = [{"evaluate.tasks": list(tasks)}] if tasks else []
    session = session_for(path, None, [*layers_of(settings), *named])
    if not session.config.evaluate.tasks:
        raise ConfigError("benchmark: no tasks; name some, or set evaluate.tasks")
    stages.check_benchmarks(session.config)
    return stages.measure_benchmarks(session, {path.name: path})


def export(
    checkpoint: PathLike,
    out: PathLike,
    *,
    dtype: str | None = None,
    verify: bool = True,
    adapter: bool = False,
) -> Exported:
    """Writes a trained model as a Hugging Face directory, adapters merged into their base.

    Args:
      checkpoint: checkpoint of `train` or of a run, or a PEFT adapter.
      out: folder for the export; it must be empty or not exist.
      dtype: float32, bfloat16 or float16; None means float32, in which training keeps its weights.
      verify: whether to compare logits with transformers, if torch is installed.
      adapter: whether to write only the LoRA adapter, as a PEFT directory.

    Raises:
      RunError: there is no finished checkpoint, or no adapter in it.
      FileExistsError: `out` is not empty.
      CheckpointError: the export's logits differ from the model's; the export is removed.
    """
    source, progress = Path(here(os.fspath(checkpoint))), for_stderr()
    with working(out, progress.say) as place:
        directory = local(place)
        if adapter:
            stages.export_adapter(source, directory, dtype)
            return Exported(directory, None)
        facts = stages.export_checkpoint(source, directory, dtype, progress, verify=verify)
        return Exported(directory, facts)


def plan(config: Config, request: PlanRequest, rows: int | None = None, tokens: float | None = None) -> Plan:
    """Plans a run for chips that are not there: memory, time and money of every stage.

    Compiles the programs that the run would use. Loads no weights: of the model only config.json is read and,
    for the lengths of the data, the tokenizer.

    Args:
      config: return value of `load_config`.
      request: chips, mesh, stages, price.
      rows: number of rows to plan for, instead of those of `data.path`.
      tokens: their mean length; given with `rows`.

    Raises:
      ValueError: a setting, the topology or the mesh is wrong, or the data cannot be used.
      PlanError: the TPU compiler is not installed, or does not have this topology.
    """
    session = Session(config, for_stderr())
    if rows is not None and tokens is not None:
        amounts = Amounts.assumed(rows, tokens, config.model.max_length)
    else:
        tokenized = session.tokenize(prepare(session)[0])
        n_targets = sum(int(one.is_target_n.sum()) for one in tokenized)
        lengths_n = np.asarray([len(one) for one in tokenized])
        amounts = Amounts.of_lengths(lengths_n, n_targets, config.data.name)
    return plan_run(config, session.decoder, amounts, request, session.progress)


def save_plan(found: Plan) -> Path:
    """Writes a plan into its run's folder as plan.json, which the report shows beside the measured times."""
    config = found.workload.config
    with working(config.place, for_stderr().say) as folder:
        run = RunDir(folder)
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.plan, found.to_json())
        return run.plan


def require_axes(axes: Collection[str], name: str = "axes") -> None:
    """Raises ValueError if an axis is unknown; `name` is the user's name of the argument."""
    if unknown := [axis for axis in axes if axis not in axis_names()]:
        raise ValueError(f"{name}: {unknown[0]!r} is none of {', '.join(axis_names())}")


@contextlib.contextmanager
def _locked(out: PathLike | None) -> Iterator[Path | None]:
    """The folder for results, in which no other process can write meanwhile; None without one."""
    if out is None:
        yield None
        return
    with working(out, for_stderr().say) as place, held(place):
        yield place


def _path(rows: RowsLike) -> str | None:
    """Returns `rows` as a string if it is a path, else None."""
    return os.fspath(rows) if isinstance(rows, str | os.PathLike) else None


def _read(session: Session, rows: RowsLike, wanted: Collection[str] | None) -> tuple[Prepared, pa.Table]:
    """(the data, the wanted columns of its samples). The rows themselves are freed."""
    keeps_rows = wanted is None or len(wanted) > 0
    data = read_data(session, None if _path(rows) else rows, keeps_rows)
    prepared = prepare(session, data)
    own = _own_columns(data, prepared.kept, wanted) if keeps_rows else pa.table({})
    return prepared, with_user_ids(own, prepared.kept)


def _own_columns(data: UserRows, kept: list[Example], wanted: Collection[str] | None) -> pa.Table:
    assert data.rows is not None
    row_of = {example.id: row for example, row in zip(data.examples, data.rows, strict=True)}
    taken = {*SCHEMA.names, *computed_names(), *(row.set_name for row in axis_rows())}
    return own_columns(kept, [row_of[example.id] for example in kept], wanted, taken)


def _begin(session: Session, out: Path, prepared: Prepared) -> RoundDir:
    """Creates a folder with the settings, the dataset and the rejected rows.

    Raises:
      RunError: the folder is a run or a round of a run.
      DataError: a file there is the data.
    """
    directory = RoundDir(local(out))
    require_no_run(out)
    settings = session.config.data
    for path in (*settings.paths, *filter(None, [settings.eval_path])):
        require_not_read(path, directory.written)
    write_text(out / "config.yaml", session.config.to_yaml())
    write_jsonl(directory.rejected, (r.to_json() for r in prepared.rejections))
    write_dataset(directory, prepared.kept, prepared.id_columns)
    barrier("dataset: written")  # all processes of a job read the dataset next
    return directory


def require_no_run(out: Path) -> None:
    """Raises RunError if a folder is a run or a round of a run."""
    if RunDir(out).rounds() or RoundDir(local(out)).run is not None:
        raise RunError(f"{out}: holds a run, and this would replace its files; give another folder")


def merge_refined(session: Session, directory: RoundDir) -> Refined:
    """Writes merged.jsonl, the next dataset, in a folder whose samples were refined."""
    path = directory.merged
    write_jsonl(path, (example.to_json() for example in stages.merge_stage(session, directory)))
    return Refined(path, read_jsonl(directory.refined), directory.stages()["refine"]["usage"])
