"""One dataset scored under several models: a folder per model, and one table with their columns side by side.

OUT/
  by_model.parquet        id, loss_post_base, loss_post_tuned, quality_base, quality_tuned, ...
  models/base/            as `score` writes it; `middo select OUT/models/base` reads it
  models/tuned/
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from middo_jax import api
from middo_jax.config import ConfigError, SettingsLike, layers_of, load
from middo_jax.data.files import require_not_read
from middo_jax.data.in_memory import RowsLike
from middo_jax.data.own_columns import SUFFIX
from middo_jax.progress import for_stderr
from middo_jax.results import Scores
from middo_jax.rundir import atomic, held, local
from middo_jax.selecting import PathLike
from middo_jax.signals.axes import computed_names
from middo_jax.signals.table import SCHEMA

TABLE, FOLDERS = "by_model.parquet", "models"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# What compares samples with each other, or names none but the text, is not compared between models.
_LEFT_OUT = frozenset(("id", "knn_ids", "knn_sims", "prompt_hash"))


class ScoreOptions(TypedDict, total=False):
    """The options of `score` that hold for every model."""

    pre_model: PathLike | None
    axes: Collection[str] | None
    keep_columns: Collection[str] | None
    force: bool
    settings: SettingsLike


class ModelScores(NamedTuple):
    """The result of `score_models`.

    Attributes:
      table: one row per sample that any model scored: `id`, one column COLUMN_NAME per score and model, then
        the user's own columns. A column that is empty under all models is left out.
      of: the scores by the name of their model.
      path: the file with the table.
    """

    table: pa.Table
    of: dict[str, Scores]
    path: Path


def score_models(
    rows: RowsLike, models: Mapping[str, PathLike], out: PathLike, **options: Unpack[ScoreOptions]
) -> ModelScores:
    """Scores a dataset under several models. What `out` has of a model is reused, as by `score`.

    Args:
      rows: see `score`; not an iterator, since each model reads it.
      models: the models by a name of letters, digits and `_.-`.
      out: a folder, which gets by_model.parquet and one folder of `score` per model.
      **options: of `score`, for every model.

    Raises:
      ValueError: see `score`; or a name cannot be used.
      RunError: a folder has other scores, and `force` is not set.
      RunLocked: another process writes into `out`.
      DataError: by_model.parquet is read as data, or would be.
    """
    if not models:
        raise ConfigError("score_models: no models")
    if wrong := [name for name in models if not _NAME.fullmatch(name)]:
        raise ConfigError(
            f"{wrong[0]!r} is no name of a model: use letters, digits and _.-, a letter or digit first"
        )
    place, say = local(Path(out)), for_stderr().say
    api.require_no_run(place)
    if isinstance(rows, str | os.PathLike):
        unnamed = {"model.path": "-", "data.path": os.fspath(rows)}
        given = load(None, [unnamed, *layers_of(options.get("settings"))])
        for path in given.data.paths:
            require_not_read(path, [place / TABLE])
    found: dict[str, Scores] = {}
    with held(place):
        for name, model in models.items():
            say(f"model {name}: {model}")
            found[name] = api.score(rows, model, out=place / FOLDERS / name, **options)
        table = side_by_side({name: scores.table for name, scores in found.items()})
        with atomic(place / TABLE, "wb") as file:
            pq.write_table(table, file)
    return ModelScores(table, found, place / TABLE)


def side_by_side(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Joins tables of scores by `id`, in the order of the first one; see `ModelScores.table`."""
    ids = list(dict.fromkeys(id_ for table in tables.values() for id_ in table["id"].to_pylist()))
    rows = {name: _rows(table, ids) for name, table in tables.items()}
    of_scores = [name for name in (*SCHEMA.names, *computed_names()) if name not in _LEFT_OUT]
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    for score in of_scores:
        having = {name: table[score] for name, table in tables.items() if score in table.column_names}
        if any(column.null_count < len(column) for column in having.values()):
            columns |= {f"{score}_{name}": column.take(rows[name]) for name, column in having.items()}
    owned: dict[str, Any] = {}
    for name, table in tables.items():
        for own in (o for o in table.column_names if o not in of_scores and o not in _LEFT_OUT):
            values = table[own].take(rows[name])
            owned[own] = pc.call_function("coalesce", [owned[own], values]) if own in owned else values
    return pa.table(columns | {_free(own, columns): values for own, values in owned.items()})


def _free(own: str, taken: Collection[str]) -> str:
    return own if own not in taken else _free(f"{own}{SUFFIX}", taken)


def _rows(table: pa.Table, ids: list[str]) -> pa.Array:
    """The row of each id; null where the table does not have it."""
    row_of = {id_: row for row, id_ in enumerate(table["id"].to_pylist())}
    return pa.array([row_of.get(id_) for id_ in ids], pa.int64())
