"""Control arms: which rows they give to the refiner, and what it is asked to do. Pure functions.

An arm has as many tasks as the loop had in all its rounds, of the same operations. Only the choice of rows
differs, or with `reanswer` only the operation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from middo_jax.config import Control
from middo_jax.config.refine import Turns
from middo_jax.data.example import Example
from middo_jax.refinement.tasks import Outcome, Task, Verdict, why_kept

# The column of scores.parquet by which an arm ranks rows, and the sign of the first ones.
RANKED_BY: Mapping[str, tuple[str, int]] = {
    "loss": ("loss_post", 1),
    "ifd": ("ifd", 1),
    "length": ("n_target_tokens", -1),
}
LEFT_OUT = Verdict(None, "left out: the loop has no more rewrites than this arm has already")


def arm_tasks(
    arm: Control,
    of_loop: Sequence[Task],
    examples: Sequence[Example],
    rows: Mapping[str, Mapping[str, Any]],
    seed: int,
    turns: Turns = "last",
) -> list[Task]:
    """The tasks of an arm, the first choice first; fewer than the loop's if there are not as many rows.

    Args:
      arm: `none` has no tasks.
      of_loop: the loop's tasks of all rounds, in order.
      examples: round_00's dataset, of which all arms choose.
      rows: its scores by id.
      seed: of the random choice, and of the order in which operations are given to rows.
      turns: `refine.turns`.
    """
    if arm == "none":
        return []
    everything = {example.id: example for example in examples}
    by_id = {id_: example for id_, example in everything.items() if why_kept(example, turns) is None}
    if arm == "reanswer":
        roots = {task.original.root_id: task for task in reversed(of_loop)}
        ordered = dict.fromkeys(task.original.root_id for task in of_loop)
        return [
            Task("reanswer", roots[id_].axes, by_id[id_], scores=_scores(of_loop, rows.get(id_, {})))
            for id_ in ordered
            if id_ in by_id
        ]
    kinds = [(task.op, task.axes) for task in of_loop]
    rng = np.random.default_rng((seed, 1))
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    chosen = _ranked(arm, list(by_id), rows, seed)
    if any(op == "synthesize" for op, _ in kinds):  # its neighbours are the hints
        chosen = [id_ for id_ in chosen if rows[id_].get("knn_ids")]
    tasks = []
    for (op, axes), id_ in zip(kinds, chosen, strict=False):
        near = rows[id_]["knn_ids"] if op == "synthesize" else ()
        hints = tuple(everything[hint] for hint in near)
        tasks.append(Task(op, axes, by_id[id_], hints, _scores(of_loop, rows[id_])))
    return tasks


def _ranked(arm: str, ids: Sequence[str], rows: Mapping[str, Mapping[str, Any]], seed: int) -> list[str]:
    """Ids in the order of an arm's choice; rows without the number are left out, ties go to the earlier."""
    if arm == "random":
        order: list[int] = np.random.default_rng((seed, 0)).permutation(len(ids)).tolist()
        return [ids[i] for i in order]
    column, sign = RANKED_BY[arm]
    values = {id_: rows.get(id_, {}).get(column) for id_ in ids}
    known = {id_: value for id_, value in values.items() if value is not None and math.isfinite(value)}
    return sorted(known, key=lambda id_: -sign * known[id_])


def _scores(of_loop: Sequence[Task], row: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores that the lineage keeps: the same columns as those of the loop's tasks."""
    names = dict.fromkeys(name for task in of_loop for name in task.scores)
    return {name: row.get(name) for name in names}


def limited(outcomes: Sequence[Outcome], most: int) -> list[Outcome]:
    """The outcomes with at most so many accepted rewrites: the first choices stay."""
    found: list[Outcome] = []
    accepted = 0
    for outcome in outcomes:
        accepted += outcome.example is not None
        takes = outcome.example is None or accepted <= most
        found.append(outcome if takes else dataclasses.replace(outcome, example=None, verdict=LEFT_OUT))
    return found
