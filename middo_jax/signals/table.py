"""scores.parquet: one row per sample, with the key `id`. Columns that were not computed are null.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from middo_jax.rundir import atomic
from middo_jax.rundir.files import DamagedFile
from middo_jax.rundir.schemas import SCORES
from middo_jax.rundir.tables import arrow_schema, refuse_newer
from middo_jax.signals.consistency import NEEDED, consistency
from middo_jax.signals.ifd import ifd
from middo_jax.signals.judge.rubrics import COLUMNS, quality
from middo_jax.signals.neighbours.nearest import Neighbours
from middo_jax.signals.readings import pmi

SCHEMA = arrow_schema(SCORES)
# Older tables have these columns, which are in selection.parquet now.
MOVED = frozenset({"hard", "sparse", "low_quality"})
# Older tables do not have these columns.
ADDED = frozenset(
    {
        *("prompt_hash", "loss_unconditional", "ifd"),
        *("end_nll", "worst_decile_nll", "prompt_nll", "pmi", "reverse_ifd", "consistency", "fault"),
    }
)
_GROUP_ROWS = 1 << 17
# A sample may have no such reading: an answer without an end of turn, a conversation of several turns.
MAY_BE_ABSENT = frozenset({"end_nll", "reverse_ifd"})


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of n samples; None for an axis that was not measured.

    Attributes:
      ids: the samples, in the order of all arrays.
      n_target_tokens: [n] number of targets.
      truncated: [n] whether the sample was cut.
      loss_pre, loss_post: [n] mean NLL of the targets, in nats.
      neighbours: by the embeddings.
      ratings: [n, 6], in the order of `rubrics.COLUMNS`.
      prompt_hashes: [n], see `duplicates.prompt_hash`.
      loss_unconditional: [n] like loss_post, for the responses without their prompts.
      end_nll, worst_decile_nll, prompt_nll: [n], see `signals.readings`.
      reverse_ifd: [n], see `signals.readings`.
      ranked: whether the readings are ranked for the axis `consistency`, see there what it needs.
    """

    ids: Sequence[str]
    n_target_tokens: np.ndarray
    truncated: np.ndarray
    loss_pre: np.ndarray | None = None
    loss_post: np.ndarray | None = None
    neighbours: Neighbours | None = None
    ratings: np.ndarray | None = None
    prompt_hashes: Sequence[str] | None = None
    loss_unconditional: np.ndarray | None = None
    end_nll: np.ndarray | None = None
    worst_decile_nll: np.ndarray | None = None
    prompt_nll: np.ndarray | None = None
    reverse_ifd: np.ndarray | None = None
    ranked: bool = False

    def to_table(self) -> pa.Table:
        """A table of SCHEMA. Values that are not finite become null, and `error` names them."""
        n = len(self.ids)
        knn = self.neighbours
        floats: dict[str, np.ndarray | None] = {
            "loss_pre": self.loss_pre,
            "loss_post": self.loss_post,
            "knn_mean_sim": None if knn is None else knn.mean_similarity(),
            "quality": None if self.ratings is None else quality(self.ratings),
            "loss_unconditional": self.loss_unconditional,
            "end_nll": self.end_nll,
            "worst_decile_nll": self.worst_decile_nll,
            "prompt_nll": self.prompt_nll,
            "reverse_ifd": self.reverse_ifd,
        }
        if self.loss_post is not None and self.loss_unconditional is not None:
            floats["ifd"] = ifd(self.loss_post, self.loss_unconditional)
            floats["pmi"] = pmi(self.loss_post, self.loss_unconditional, self.n_target_tokens)
        fault_n = None
        if self.ranked:
            ranked = consistency({name: np.asarray(floats[name], np.float64) for name in NEEDED})
            floats["consistency"], fault_n = ranked.rank_n, ranked.fault_n
        for i, column in enumerate(COLUMNS):
            floats[column] = None if self.ratings is None else self.ratings[:, i]
        columns = {name: _nullable(values) for name, values in floats.items() if values is not None}
        columns |= {
            "id": pa.array(self.ids, pa.string()),
            "n_target_tokens": pa.array(self.n_target_tokens, pa.int32()),
            "truncated": pa.array(self.truncated, pa.bool_()),
            "error": pa.array(_errors(floats, n), pa.string()),
        }
        if fault_n is not None:
            columns["fault"] = pa.array(fault_n, pa.string())
        if self.prompt_hashes is not None:
            columns["prompt_hash"] = pa.array(self.prompt_hashes, pa.string())
        if knn is not None:
            found = [row >= 0 for row in knn.index_nj]
            ids = [[self.ids[i] for i in row[ok]] for row, ok in zip(knn.index_nj, found, strict=True)]
            sims = [row[ok].tolist() for row, ok in zip(knn.similarity_nj, found, strict=True)]
            columns |= {"knn_ids": pa.array(ids), "knn_sims": pa.array(sims, pa.list_(pa.float32()))}
        return pa.table([columns.get(f.name, pa.nulls(n, f.type)) for f in SCHEMA], schema=SCHEMA)


def write_scores(path: Path, table: pa.Table) -> None:
    """Writes scores.parquet whole or not at all, in row groups that can be read one at a time."""
    with atomic(path, "wb") as file:
        pq.write_table(table, file, row_group_size=_GROUP_ROWS)


def read_scores(path: Path) -> pa.Table:
    """Reads scores.parquet, with the user's columns last. Columns that an older file does not have are null.

    Raises:
      ValueError: the file is not a table of scores; DamagedFile if it is no table at all.
      RunError: a newer version wrote it.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DamagedFile(path, error) from error
    return as_scores(table, str(path))


def as_scores(table: pa.Table, where: str) -> pa.Table:
    """A table with the columns of SCHEMA first and all others after them, see `read_scores`.

    Raises:
      ValueError: a column is missing; `where` names the table.
      RunError: a newer version made it.
    """
    refuse_newer(table.schema, SCORES, where)
    for name in sorted(ADDED.difference(table.column_names)):
        table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{where}: not a score table: no column {', '.join(missing)}; run `middo score` again"
        )
    own = table.drop_columns([name for name in table.column_names if name in {*SCHEMA.names, *MOVED}])
    return with_columns(table.select(SCHEMA.names).cast(SCHEMA), own)


def completed(table: pa.Table) -> pa.Table:
    """A table with the columns of SCHEMA that it lacks, as nulls; `as_scores` then takes it."""
    for field in SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def with_columns(table: pa.Table, others: pa.Table) -> pa.Table:
    """A table with the columns of another one appended; both have the same rows."""
    for name in others.column_names:
        table = table.append_column(others.schema.field(name), others[name])
    return table


def neighbours_of(table: pa.Table, k: int) -> Neighbours:
    """The neighbours in a table, k of each row, as the search returned them."""
    row_of = {id_: i for i, id_ in enumerate(table["id"].to_pylist())}
    index_nj = np.full((len(table), k), -1, np.int32)
    similarity_nj = np.full((len(table), k), np.nan, np.float32)
    rows = zip(table["knn_ids"].to_pylist(), table["knn_sims"].to_pylist(), strict=True)
    for i, (ids, sims) in enumerate(rows):
        index_nj[i, : len(ids)] = [row_of[id_] for id_ in ids]
        similarity_nj[i, : len(sims)] = sims
    return Neighbours(index_nj, similarity_nj)


def as_floats(table: pa.Table, column: str) -> np.ndarray:
    """A column as float64 [n]; null becomes NaN."""
    return table[column].cast(pa.float64()).to_numpy(zero_copy_only=False)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float32(), mask=~np.isfinite(values))


def _errors(floats: dict[str, np.ndarray | None], n: int) -> list[str | None]:
    errors: list[list[str]] = [[] for _ in range(n)]
    for name, values in floats.items():
        if values is not None and name not in MAY_BE_ABSENT:
            for i in np.flatnonzero(~np.isfinite(values)):
                errors[i].append(f"{name} is not finite")
    return ["; ".join(error) or None for error in errors]
