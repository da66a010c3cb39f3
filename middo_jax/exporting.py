"""`middo export-data`: a run's dataset in the user's own shape, with what other trainers need to read it.

OUT/
  train.jsonl          the last dataset (train.parquet with parquet)
  heldout.jsonl        with --with-heldout
  pairs.jsonl          with --with-pairs: preference pairs for DPO and the like (pairs.parquet with parquet)
  README.md            dataset card with front matter, so that `datasets.load_dataset(OUT)` reads it
  dataset_info.json    for LLaMA-Factory: dataset_dir: OUT
  axolotl.yaml, trl.py
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import pyarrow.parquet as pq

from middo_jax.buckets import shown
from middo_jax.data.example import Example
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.parquet import write_parquet
from middo_jax.data.sources import DataError, write
from middo_jax.data.spelling import Spelling
from middo_jax.data.stored import Changed, Examples, Joined, Stored
from middo_jax.preferences import preference_pairs
from middo_jax.progress import Progress
from middo_jax.report.card import card
from middo_jax.report.status import load_settings, require_run, status
from middo_jax.rundir import (
    RoundDir,
    RunDir,
    RunError,
    local,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.files import each_jsonl
from middo_jax.trainers import Contents, write_readers

WRITTEN = ("alpaca", "sharegpt", "messages", "prompt_completion", "parquet")
SCORES = ("loss_pre", "loss_post", "knn_mean_sim", "quality")
_PREFIX = "middo_"


class ExportedDataset(NamedTuple):
    """What was written.

    Attributes:
      path: the folder.
      n: rows to train on.
      n_heldout: held-out rows.
      n_pairs: preference pairs.
      format: of the rows.
      note: what LLaMA-Factory cannot read, so that it gets no file; None if it can read all.
      warning: that the run is not up to date, so that these are not the rows that it would have; else None.
    """

    path: Path
    n: int
    n_heldout: int
    n_pairs: int
    format: str
    note: str | None
    warning: str | None


class Extras(TypedDict, total=False):
    """What is written beside the dataset.

    Attributes:
      heldout: whether the held-out rows are written too.
      scores: whether rows have their last scores, as middo_loss_post etc.
      lineage: whether rows say where they come from, as middo_op etc.
      pairs: whether preference pairs are written too.
    """

    heldout: bool
    scores: bool
    lineage: bool
    pairs: bool


def export_data(
    run: RunDir,
    out: Path,
    form: str | None = None,
    license: str | None = None,
    **extras: Unpack[Extras],
) -> ExportedDataset:
    """Writes the last dataset of a run.

    Args:
      run: its folder.
      out: a folder that does not exist or is empty.
      form: alpaca, sharegpt, messages, prompt_completion or parquet, with the columns' usual names; None: the
        format that came in, with the user's names and order of columns.
      license: of the dataset, for its card, by its name at the hub: apache-2.0, cc-by-4.0, other, ...
      **extras: what is written beside the dataset.

    Raises:
      RunError: the run has no dataset yet, or `out` is not empty.
      DataError: there is no such format, or it has no place for a row.
    """
    require_run(run)
    folder = last_dataset(run)
    place = local(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder; name another, or remove it first")
    existed = place.exists()
    try:
        return _export(run, folder, place, form, license, extras)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)  # the next try finds it as it was: empty, or not there
        if existed:
            place.mkdir()
        raise


def _export(
    run: RunDir, folder: RoundDir, place: Path, form: str | None, license: str | None, extras: Extras
) -> ExportedDataset:
    """Writes everything into an empty folder; see `export_data`."""
    scores, lineage = extras.get("scores", False), extras.get("lineage", False)
    settings, own = load_settings(run), _shape(run, form)
    examples = Stored(folder.dataset)
    kept_out: Examples = Stored(run.heldout) if extras.get("heldout") else ()
    known = _scores(run) if scores else {}
    ending = "parquet" if form == "parquet" else "jsonl"

    def widened(rows: Examples) -> Examples:
        return Changed(rows, lambda one: _with_columns(one, known.get(one.id), scores, lineage))

    splits = {"train": examples, **({"heldout": kept_out} if kept_out else {})}
    files = {split: f"{split}.{ending}" for split in splits}
    both = widened(Joined(examples, kept_out))  # readers expect the same columns in both files
    columns, has_turns = set[str](), False
    for split, rows in splits.items():
        path = place / files[split]
        if form is None:
            write_jsonl(path, own.rows(widened(rows), both))
        else:
            write(widened(rows), path, form, own.id_column, both)
        found_columns, with_turns = _columns(path, own.names.get("prompt", "prompt"))
        columns |= found_columns
        has_turns |= with_turns and own.format == "prompt_completion"
    name = settings.get("name") or run.path.resolve().name
    contents = _contents(columns, has_turns, both, is_own=form is None)
    unread = write_readers(place, str(name), files, own, contents)
    found = preference_pairs(run) if extras.get("pairs") else []
    pairs = _write_pairs(found, place / f"pairs.{ending}") if found else None
    write_text(place / "README.md", card(run, files, own.format, pairs, license))
    note = None if unread is None else f"no dataset_info.json: LLaMA-Factory does not read {unread}"
    warning = _not_up_to_date(run, folder)
    return ExportedDataset(place, len(examples), len(kept_out), len(found), own.format, note, warning)


def _not_up_to_date(run: RunDir, folder: RoundDir) -> str | None:
    """The warning for a run of which a stage is not done, or stale."""
    pending = status(run)["next"]
    if pending is None:
        return None
    return (
        f"warning: {shown(run.path)} is not up to date, {pending['stage']} of {pending['round']} is next: "
        f"these are the rows of {folder.path.name} as they are now; `middo run` brings it up to date"
    )


def _write_pairs(pairs: list[dict[str, Any]], path: Path) -> str:
    """Writes preference pairs; returns the file's name. `datasets` reads a folder's files alike."""
    if path.suffix == ".parquet":
        write_parquet(path, lambda: iter(pairs))
    else:
        write_jsonl(path, pairs)
    return path.name


def _shape(run: RunDir, form: str | None) -> OwnShape:
    """The shape of the rows that came in, or a format with its usual names."""
    if form not in (None, *WRITTEN):
        raise DataError(f"a run's dataset cannot be written as {form!r}; there are {', '.join(WRITTEN)}")
    own = own_shape(run)
    return own if form is None else OwnShape(form, id_column=own.id_column)


def write_as_it_came(run: RunDir, examples: Examples, path: Path, progress: Progress) -> str:
    """Writes a dataset in the format of the user's data; returns the name of the format that was used.

    A conversation of several turns or with tools may have no place in that format. Then all rows are written
    as messages, which is said.
    """
    own = own_shape(run)
    try:
        write_jsonl(path, own.rows(examples))
    except DataError as error:
        if own.format == "messages":
            raise
        progress.say(f"{path}: written as messages ({error})")
        own = OwnShape("messages", id_column=own.id_column)
        write_jsonl(path, own.rows(examples))
    return own.format


def last_dataset(run: RunDir) -> RoundDir:
    """The folder of the newest dataset of a run: `final`, or the last round's.

    Raises:
      RunError: there is none.
    """
    for folder in (run.final, *reversed(run.rounds())):
        if folder.dataset.exists():
            return folder
    raise RunError(f"{run.path}: no round has a dataset yet; `middo run` makes one")


def own_shape(run: RunDir) -> OwnShape:
    """The shape of the rows that came in; messages if the run did not record it, or it has no rows."""
    record = run.round(0).stages().get("prepare", {})
    settings, spelling = load_settings(run).get("data", {}), Spelling.from_json(record.get("spelling", {}))
    return OwnShape.of(record.get("format"), record.get("columns", ()), settings, spelling)


def _scores(run: RunDir) -> dict[str, dict[str, float | None]]:
    """The last scores of each sample that any round scored, by id."""
    found: dict[str, dict[str, float | None]] = {}
    for folder in run.rounds():
        if folder.scores.exists():
            for row in pq.read_table(folder.scores, columns=["id", *SCORES]).to_pylist():
                found[row.pop("id")] = row
    return found


def _with_columns(
    example: Example, scores: Mapping[str, float | None] | None, with_scores: bool, with_lineage: bool
) -> Example:
    """The example with columns about it beside the user's own."""
    added: dict[str, Any] = {}
    lineage = example.lineage
    if with_scores:
        later = {k: v for k, v in (scores or {}).items() if v is not None}
        measured = {**(lineage.scores_after or {}), **later}  # a round's own scores are the later ones
        added |= {_PREFIX + name: measured.get(name) for name in SCORES}
    if with_lineage:
        added |= {
            f"{_PREFIX}id": example.id,
            f"{_PREFIX}op": lineage.op,
            f"{_PREFIX}round": lineage.round,
            f"{_PREFIX}axis": lineage.axis,
            f"{_PREFIX}parent_ids": list(lineage.parent_ids),
            f"{_PREFIX}root_id": example.root_id,
            f"{_PREFIX}refiner": lineage.refiner,
        }
    if taken := sorted(added.keys() & example.extra.keys()):
        raise DataError(f"sample {example.id} has a column {taken[0]!r} of its own; rename it")
    return dataclasses.replace(example, extra={**example.extra, **added}) if added else example


def _contents(columns: set[str], has_turns: bool, examples: Iterable[Example], is_own: bool) -> Contents:
    is_weighted = has_calls = False
    for message in (m for e in examples for m in (*e.messages, *(e.behind if is_own else ()))):
        is_weighted = is_weighted or not message.learnt
        has_calls = has_calls or bool(message.tool and message.role == "assistant")
    return Contents(frozenset(columns), is_weighted, has_calls, has_turns)


def _columns(path: Path, prompt: str) -> tuple[set[str], bool]:
    """(the columns of a file, whether a row has a list in the column `prompt`)."""
    if path.suffix == ".parquet":
        return set(pq.read_schema(path).names), False
    found, has_turns = set[str](), False
    for row in each_jsonl(path):
        found |= row.keys()
        has_turns = has_turns or isinstance(row.get(prompt), list)
    return found, has_turns
