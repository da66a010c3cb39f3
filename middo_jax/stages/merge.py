"""The merge: a round's dataset and its accepted rewrites -> the next dataset, read one row at a time.

A dataset of millions of rows does not fit the memory as Python objects. What the merge decides depends on ids
only, so outlines of the samples are merged first; the texts are read again while the result is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from middo_jax.config.axis_table import axes as axis_rows
from middo_jax.data.example import Example, Lineage, Op
from middo_jax.refinement import merge
from middo_jax.refinement.growth import Dropped, fit, max_size
from middo_jax.refinement.taking_back import restored
from middo_jax.rundir import RoundDir, RunError, write_jsonl
from middo_jax.rundir.files import each_jsonl, read_json
from middo_jax.session import Session
from middo_jax.signals.table import read_scores
from middo_jax.stages.review import outcomes_of, strange_verdicts
from middo_jax.stages.taking_back import taken_back


@dataclasses.dataclass(frozen=True)
class Merged:
    """D_{t+1}. Iterating reads the samples from the folder's files, in order.

    Attributes:
      directory: folder of D_t.
      kept: the samples; those of D_t are outlines without texts.
      gone: the dropped ones, likewise.
      scores: by id, the scores that samples of earlier rounds get in their lineage.
      n_strange: number of people's verdicts on rewrites that were made anew since then.
    """

    directory: RoundDir
    kept: Sequence[Example]
    gone: Sequence[Dropped]
    scores: Mapping[str, dict[str, float | None]]
    n_strange: int

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Example]:
        """The samples with their texts."""
        rows = each_jsonl(self.directory.dataset)
        for sample in self.kept:  # samples of D_t are in its order
            yield sample if sample.messages else self._read(next(r for r in rows if r["id"] == sample.id))

    def dropped(self) -> Iterator[Dropped]:
        """The dropped samples with their texts."""
        rows = each_jsonl(self.directory.dataset)
        texts = {one.example.id for one in self.gone if not one.example.messages}
        found = {row["id"]: self._read(row) for row in rows if row["id"] in texts} if texts else {}
        for one in self.gone:
            yield dataclasses.replace(one, example=found.get(one.example.id, one.example))

    def _read(self, row: dict[str, Any]) -> Example:
        example = Example.from_json(row)
        if example.id not in self.scores:
            return example
        lineage = dataclasses.replace(example.lineage, scores_after=self.scores[example.id])
        return dataclasses.replace(example, lineage=lineage)


def merge_stage(session: Session, directory: RoundDir) -> Merged:
    """Returns the next dataset, see `merged`, and writes the dropped samples to dropped.jsonl."""
    found = merged(session, directory)
    if n := found.n_strange:
        session.progress.say(f"{n:,} verdicts of {directory.verdicts} are on rewrites that were made anew")
    write_jsonl(directory.dropped, (d.to_json() for d in found.dropped()))
    return found


def merged(session: Session, directory: RoundDir) -> Merged:
    """D_{t+1}: the folder's dataset with its accepted rewrites after a review, limited by `refine.growth`.

    The originals of rewrites that are taken back (`refine.take_back`) are in their places again. A sample
    from an earlier round gets its present scores in its lineage, unless it was measured when it was accepted.

    Raises:
      RunError: samples must be dropped, but the folder's scores have no neighbours.
    """
    if not directory.dataset.exists():
        raise RunError(f"{directory.path}: no dataset.jsonl there")
    outlines, unscored = list[Example](), set[str]()
    for row in each_jsonl(directory.dataset):
        lineage = row["lineage"]
        outlines.append(_outline(row["id"], lineage["op"]))
        # Set only once: by the measurement at its acceptance or by the scores of the first round after it.
        if lineage["op"] != "seed" and lineage.get("scores_after") is None:
            unscored.add(row["id"])
    table = read_scores(directory.scores)
    taken = taken_back(directory, session.config.refine.take_back)
    staying = restored(outlines, taken, directory.index)
    together = merge(staying, outcomes_of(directory, outlines))
    room = max_size(len(outlines), session.config.refine.growth)
    drops = room is not None and room < len(together)
    neighbours = neighbours_of(directory, table, session.config.refine.growth) if drops else {}
    axes = read_json(directory.selection)["axes"]
    selected = {id_ for axis in axes.values() for id_ in axis["ids"]}
    kept, gone = fit(outlines, together, room, selected, neighbours)
    scores = lineage_scores(table, rows_of(table, unscored))
    if missing := unscored - scores.keys():
        raise RunError(f"{directory.scores}: no row of sample {min(missing)}; score the round again")
    return Merged(directory, kept, gone, scores, strange_verdicts(directory, outlines))


_LINEAGES: dict[Op, Lineage] = {}


def _outline(id_: str, op: Op) -> Example:
    """A sample without its texts; outlines share all but their ids."""
    return Example((), id_, _LINEAGES.setdefault(op, Lineage(op=op)))


def neighbours_of(
    directory: RoundDir, table: pa.Table, growth: float | str
) -> Mapping[str, Sequence[tuple[str, float]]]:
    """The neighbours of each sample in a table of scores, which decide what is dropped.

    Raises:
      RunError: the table has none.
    """
    if table["knn_ids"].null_count == len(table):
        raise RunError(
            f"{directory.path}: its scores have no neighbours, and refine.growth={growth} needs them to drop "
            "samples: score the diversity axis too, or set refine.growth=free"
        )
    return _Neighbours(table)


class _Neighbours(Mapping[str, Sequence[tuple[str, float]]]):
    """The neighbours in a table of scores, made when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        found = table.select(["id", "knn_ids", "knn_sims"]).combine_chunks()
        self._ids, self._sims = found["knn_ids"], found["knn_sims"]
        self._row_of = {id_: row for row, id_ in enumerate(found["id"].to_pylist())}

    def __getitem__(self, id_: str) -> Sequence[tuple[str, float]]:
        row = self._row_of[id_]
        ids, sims = self._ids[row].as_py(), self._sims[row].as_py()
        return list(zip(ids or (), sims or (), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __len__(self) -> int:
        return len(self._row_of)


def rows_of(table: pa.Table, ids: Collection[str]) -> list[dict[str, Any]]:
    """The rows of some samples; those of a whole table of millions would fill the memory."""
    return table.filter(pc.field("id").isin(list(ids))).to_pylist() if ids else []


def lineage_scores(table: pa.Table, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What the lineage of some samples keeps of their scores: the columns that decide on an axis.

    Those of an optional axis only where it was scored. `table` has the scores of all samples.
    """
    names = [
        name
        for axis in axis_rows()
        for name in axis.columns
        if not axis.optional or table[name].null_count < len(table)
    ]
    return {row["id"]: {name: row.get(name) for name in names} for row in rows}
