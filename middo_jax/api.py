"""The verbs behind both the commands and Python: each takes values, returns values and prints nothing.

Progress goes to stderr. `import middo_jax` has these functions without importing this module, which loads
JAX; `select` is in `selecting`, which does not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from middo_jax import stages
from middo_jax.config import Config, SettingsLike, layers_of, load
from middo_jax.config.axis_table import axes as axis_rows
from middo_jax.config.axis_table import axis_names
from middo_jax.data.example import Example
from middo_jax.data.files import require_not_read
from middo_jax.data.own_columns import own_columns
from middo_jax.data.sources import Rejection, UserRows
from middo_jax.evaluation.heldout import HeldoutLoss
from middo_jax.loop import run_loop
from middo_jax.models.resolve import resolve
from middo_jax.parallel.coordination import barrier
from middo_jax.progress import for_stderr
from middo_jax.quickstart import CONFIG, DATA, demo_model, shipped
from middo_jax.report.status import status
from middo_jax.results import Exported, Refined, Run, Scores, Trained
from middo_jax.rundir import RoundDir, RunDir, RunError, held, local, read_jsonl, write_jsonl, write_text
from middo_jax.selecting import PathLike, load_config
from middo_jax.session import Session, prepare, read_data, session_for, session_of, write_dataset
from middo_jax.signals.axes import computed_names
from middo_jax.signals.table import SCHEMA, with_columns
from middo_jax.stages.score import measure


def run(config: Config | PathLike, settings: SettingsLike = None) -> Run:
    """The closed loop: train, score, select, refine, merge, again; resumed where it stopped.

    Args:
      config: of `load_config`, or a YAML file.
      settings: laid over a YAML file, see `load_config`.

    Raises:
      ValueError: a wrong setting, or data that cannot be used.
      RunError: the folder holds a run of an earlier version.
    """
    if isinstance(config, Config):
        config = load(None, [*layers_of(config), *layers_of(settings)])
    else:
        config = load_config(config, settings)
    done = run_loop(config, for_stderr())
    return Run(done.path, done.report, status(done))


def quickstart(settings: SettingsLike = None) -> tuple[Path, list[str | Mapping[str, Any]]]:
    """What `run` takes for the loop on a small model and the rows that ship with the package."""
    layers = layers_of(settings)
    data, nowhere = {"data.path": str(shipped() / DATA)}, {"model.path": ""}
    own = load(shipped() / CONFIG, [data, nowhere, *layers]).model.path
    # The demo model is looked for, and downloaded, only if the settings name no other.
    here = {**data, "model.path": own or demo_model()}
    return shipped() / CONFIG, [here, *layers]


def score(
    rows: Any,
    model: PathLike,
    pre_model: PathLike | None = None,
    axes: Collection[str] | None = None,
    *,
    keep_columns: Collection[str] | None = None,
    out: PathLike | None = None,
    settings: SettingsLike = None,
) -> Scores:
    """Losses, neighbours and ratings of a dataset under a model.

    Args:
      rows: a path, tfds:NAME:SPLIT or hf:NAME:SPLIT; or a list of dicts, a pyarrow Table, a pandas DataFrame
        or a Hugging Face Dataset. The columns tell the format (`data.format`).
      model: a Hugging Face directory, a checkpoint of ours, a LoRA adapter, a .gguf file or a hub repo id.
      pre_model: the model before training, for `loss_pre`. None leaves that empty, and no sample can be hard.
      axes: what to measure, of complexity, diversity, quality and registered axes; None is all.
      keep_columns: which of the user's columns come back; None is all that hold scalars only.
      out: a folder that gets dataset.jsonl, scores.parquet, embeddings.parquet and the manifest, for `select`
        and `middo refine`. None writes nothing.
      settings: see `load_config`; or a Config, of which the model and the data are replaced.

    Raises:
      ValueError: an unknown axis, a wrong setting, or data that cannot be used; the message says which.
      RunLocked: another process writes into `out`.
    """
    axes = axis_names() if axes is None else axes
    require_axes(axes)
    place = None if out is None else local(Path(out))
    model_path = resolve(os.fspath(model))
    with contextlib.nullcontext() if place is None else held(place):
        session = session_for(model_path, _path(rows), settings, place)
        data = read_data(session, None if _path(rows) else rows)
        kept, _, rejections, *_ = prepare(session, data)
        own = _own_columns(data, kept, keep_columns)
        if pre_model is None and "complexity" in axes:
            session.progress.say(
                "no --pre-model (pre_model in Python): loss_pre stays empty, and no sample can be called hard"
            )
        pre_path = None if pre_model is None else resolve(os.fspath(pre_model))
        if place is None:
            scored = measure(session, kept, model_path, pre_path, axes)
            table = with_columns(scored.table, own)
        else:
            stages.check_embedder(session, pre_path, axes)
            directory = _begin(session, place, kept, rejections)
            scored = stages.score_stage(session, directory, model_path, pre_path, axes, own=own)
            table = scored.table
    return Scores(table, scored.embedding_nd, rejections, scored.facts["passes"])


def refine(folder: PathLike, *, settings: SettingsLike = None) -> Refined:
    """Has the selected samples of a folder rewritten by a served LLM, and accepts what helps.

    Every answer is in a cache as soon as it comes: called again, it pays for nothing twice.

    Args:
      folder: that `score` and `select` wrote, or a round of a run.
      settings: laid over its config.yaml, such as {"refine.base_url": URL, "refine.model": NAME}.

    Raises:
      RunLocked: another process writes into the folder.
      RunError: the folder holds no selection.
      RefinerError: the endpoint fails for all requests alike; what it answered is kept.
    """
    session, directory = session_of(Path(folder), settings), RoundDir(Path(folder))
    with held(directory.path):
        stages.refine_round(session, directory)
        return merged(session, directory)


def merged(session: Session, directory: RoundDir) -> Refined:
    """Writes the next dataset of a folder whose samples were refined: merged.jsonl."""
    path = directory / "merged.jsonl"
    write_jsonl(path, (example.to_json() for example in stages.merge_stage(session, directory)))
    return Refined(path, read_jsonl(directory.refined), directory.stages()["refine"]["usage"])


def train(rows: Any, model: PathLike, out: PathLike, *, settings: SettingsLike = None) -> Trained:
    """Supervised fine-tuning; called again with the same arguments, it goes on where it was stopped.

    Args:
      rows: see `score`.
      model: where training starts, see `score`.
      out: a folder that gets checkpoint/, metrics.jsonl, dataset.jsonl and the manifest.
      settings: see `load_config`, such as {"train.num_epochs": 3, "lora.rank": 16}.

    Raises:
      ValueError: a wrong setting, or data that cannot be used.
      RunLocked: another process writes into the folder.
      AnotherTraining: the folder holds another training; it stays as it was.
      RunError: the folder is a run's.
      TrainingDiverged, OutOfMemory: the message says what to do.
    """
    place, model_path = local(Path(out)), resolve(os.fspath(model))
    with held(place):
        session = session_for(model_path, _path(rows), settings, place)
        data = read_data(session, None if _path(rows) else rows)
        kept, heldout, rejections, *_ = prepare(session, data)
        with session.stage():  # checks, training and the loss at its end read the same conversations
            stages.check_training(session, kept, heldout)
            stages.check_continues(session, RoundDir(place), kept)
            directory = _begin(session, place, kept, rejections)
            stages.train_stage(session, directory, model_path, heldout)
            loss = None
            if heldout:
                loss = stages.HeldOut(session, heldout).loss(session.load_model(directory.checkpoint))
        return Trained(directory.checkpoint, read_jsonl(directory.metrics), loss)


def evaluate(rows: Any, model: PathLike, *, settings: SettingsLike = None) -> HeldoutLoss:
    """The loss per target token of a model on a dataset, in nats, and on each of its sources.

    Args:
      rows: see `score`.
      model: see `score`.
      settings: see `load_config`.

    Raises:
      ValueError: a wrong setting, or data that cannot be used.
    """
    path = resolve(os.fspath(model))
    session = session_for(path, _path(rows), settings)
    examples, *_ = prepare(session, read_data(session, None if _path(rows) else rows))
    return stages.HeldOut(session, examples).loss(session.load_model(path))


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
      checkpoint: of `train` or of a run, or a PEFT adapter.
      out: must not exist, or be empty.
      dtype: float32, bfloat16 or float16; None is float32, in which training keeps its weights.
      verify: whether transformers, if torch is installed, has to compute the same logits.
      adapter: write the LoRA adapter alone, as a PEFT directory.

    Raises:
      RunError: there is no finished checkpoint, or no adapter in it.
      FileExistsError: `out` holds something.
      CheckpointError: the export computes something else; nothing is left of it.
    """
    source, directory = Path(checkpoint), local(Path(out))
    if adapter:
        stages.export_adapter(source, directory, dtype)
        return Exported(directory, None)
    facts = stages.export_checkpoint(source, directory, dtype, for_stderr(), verify=verify)
    return Exported(directory, facts)


def require_axes(axes: Collection[str], name: str = "axes") -> None:
    """Raises ValueError if one of them is unknown; `name` is what the user calls them."""
    if unknown := [axis for axis in axes if axis not in axis_names()]:
        raise ValueError(f"{name}: {unknown[0]!r} is none of {', '.join(axis_names())}")


def _path(rows: Any) -> str | None:
    """The path that `rows` is; None if it is a table."""
    return os.fspath(rows) if isinstance(rows, str | os.PathLike) else None


def _own_columns(data: UserRows, kept: list[Example], wanted: Collection[str] | None) -> pa.Table:
    row_of = {example.id: row for example, row in zip(data.examples, data.rows, strict=True)}
    taken = {*SCHEMA.names, *computed_names(), *(row.set_name for row in axis_rows())}
    return own_columns(kept, [row_of[example.id] for example in kept], wanted, taken)


def _begin(session: Session, out: Path, kept: list[Example], rejections: list[Rejection]) -> RoundDir:
    """A folder with the settings, the dataset, and the rows that could not be used.

    Raises:
      RunError: the folder is a run, or a round of one.
      DataError: a file there is the data.
    """
    directory = RoundDir(local(out))
    if RunDir(out).rounds() or directory.run is not None:
        raise RunError(f"{out}: holds a run, whose files this would replace; give another folder")
    for path in session.config.data.paths:
        require_not_read(path, [directory.dataset, directory.rejected])
    write_text(out / "config.yaml", session.config.to_yaml())
    write_jsonl(directory.rejected, (r.to_json() for r in rejections))
    write_dataset(directory, kept)
    barrier("dataset: written")  # all processes of a job read it next
    return directory
