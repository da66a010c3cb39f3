"""The take-back stage (`refine.take_back`): a round's selection and the one before -> taken_back.jsonl."""

from __future__ import annotations

import time
from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from middo_jax.config import Config
from middo_jax.config.axis_table import axis_names
from middo_jax.progress import Progress
from middo_jax.refinement.taking_back import Badness, made_worse
from middo_jax.rundir import RoundDir, read_jsonl, write_jsonl
from middo_jax.rundir.files import each_jsonl
from middo_jax.rundir.link import Link
from middo_jax.rundir.rows import TakenBackRow
from middo_jax.session import read_dataset
from middo_jax.stages.review import outcomes_of


def take_back_stage(config: Config, link: Link, progress: Progress) -> None:
    """Writes what is taken back in this round and was in earlier ones, and says how much it is."""
    began, begun, here, earlier = time.monotonic(), link.begin(), link.folder, link.earlier
    assert earlier is not None
    outcomes = outcomes_of(earlier, read_dataset(earlier))
    ids = {row["id"] for row in each_jsonl(here.dataset)}
    judged = {o.task.original.id for o in outcomes} | {
        o.example.id for o in outcomes if o.example is not None
    }
    found = made_worse(outcomes, _badness(earlier, judged), _badness(here, judged), ids, here.index)
    write_jsonl(here.taken_back, [*taken_back(earlier), *found])
    n = sum(outcome.example is not None for outcome in outcomes)
    progress.say(f"{len(found):,} of {n:,} rewrites of {earlier.path.name} are taken back")
    begun.finish(config, time.monotonic() - began, n=len(found), accepted=n)


def taken_back(directory: RoundDir, is_on: bool = True) -> list[TakenBackRow]:
    """The rows of a round's taken_back.jsonl; none if `refine.take_back` is off or nothing was compared."""
    return read_jsonl(directory.taken_back) if is_on and directory.taken_back.exists() else []


def _badness(directory: RoundDir, ids: Collection[str]) -> Badness:
    """The badness of some samples on all axes; that of millions as dicts would fill the memory."""
    table = pq.read_table(directory.selected, filters=pc.field("id").isin(pa.array(list(ids), pa.string())))
    columns = {f"{axis}_z": axis for axis in axis_names() if f"{axis}_z" in table.column_names}
    rows = table.select(["id", *columns]).to_pylist()
    return {row["id"]: {axis: row[column] for column, axis in columns.items()} for row in rows}
