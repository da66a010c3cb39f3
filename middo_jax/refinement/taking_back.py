"""Rewrites that are taken back, because their samples are worse in the next round. Pure functions.

A sample's badness on an axis is by how many standard deviations of its own round it is worse than the mean.
The scores themselves are not compared: those of the two rounds come from different models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from middo_jax.data.example import Example
from middo_jax.refinement.tasks import Outcome, Task
from middo_jax.rundir.rows import TakenBackRow

Badness = Mapping[str, Mapping[str, float | None]]  # by id and axis


def made_worse(
    outcomes: Sequence[Outcome], before: Badness, after: Badness, here: Collection[str], round_index: int
) -> list[TakenBackRow]:
    """The accepted rewrites and additions of the round before that are worse in this round.

    Of the axes that selected the sample, at least one is worse and none is better. Of an addition the sparse
    sample is compared, which it was made for. A rewrite without both values is not judged.

    Args:
      outcomes: of the round before.
      before: badness in the round before, of the samples there.
      after: badness in this round.
      here: the ids of this round's dataset.
      round_index: of this round.
    """
    rows: list[TakenBackRow] = []
    for outcome in outcomes:
        task, child = outcome.task, outcome.example
        if child is None or child.id not in here:
            continue
        adds = task.op == "synthesize"
        if not adds and task.original.id in here:  # it would be there twice
            continue
        now = after.get(task.original.id if adds else child.id, {})
        then = before.get(task.original.id, {})
        pairs = {axis: (then.get(axis), now.get(axis)) for axis in task.axes}
        known = {axis: (b, a) for axis, (b, a) in pairs.items() if b is not None and a is not None}
        if any(a > b for b, a in known.values()) and not any(a < b for b, a in known.values()):
            rows.append(
                {
                    "round": round_index,
                    "op": task.op,
                    "axes": list(task.axes),
                    "id": child.id,
                    "source_id": task.original.id,
                    "badness_before": {axis: b for axis, (b, _) in known.items()},
                    "badness_after": {axis: a for axis, (_, a) in known.items()},
                    "original": None if adds else _as_it_was(task).to_json(),
                }
            )
    return rows


def _as_it_was(task: Task) -> Example:
    original = task.original
    if original.lineage.op == "seed" or original.lineage.scores_after is not None:
        return original
    lineage = dataclasses.replace(original.lineage, scores_after=dict(task.scores))
    return dataclasses.replace(original, lineage=lineage)


def restored(examples: Sequence[Example], rows: Sequence[TakenBackRow], round_index: int) -> list[Example]:
    """A round's dataset with the originals in the places of what is taken back in it, and less additions."""
    taken = {row["id"]: row for row in rows if row["round"] == round_index}
    found: list[Example] = []
    for example in examples:
        row = taken.get(example.id)
        if row is None:
            found.append(example)
        elif row["original"] is not None:
            found.append(Example.from_json(row["original"]))
    return found


def still_asked(tasks: Sequence[Task], rows: Sequence[TakenBackRow], round_index: int) -> list[Task]:
    """The tasks that are left: none of a rewrite that is taken back, and none that was taken back before.

    The refiner would answer an equal task alike.
    """
    going = {row["id"] for row in rows if row["round"] == round_index}
    refused = {(row["op"] == "synthesize", row["source_id"]) for row in rows}
    return [
        task
        for task in tasks
        if task.original.id not in going and (task.op == "synthesize", task.original.id) not in refused
    ]
