"""How many candidates each gate rejected, and how the measured candidates changed their samples' scores.

Reads candidates.jsonl, one row per attempt. The gates are the rows of `config.gates`, in the order in which
they are applied; the gate that rejected a candidate was its last one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from middo_jax.config.gates import Gate, gates
from middo_jax.report import plots
from middo_jax.report.verdicts import people

PEOPLE = "people's verdicts"
ANSWERED = "the refiner answered"  # not a gate: a failed request or a spent budget leaves no candidate

CHANGES = {  # axis: (score of the sample, field of the measurement, label, whether more is better)
    "complexity": ("loss_post", "loss", "loss under the model, nats per token", False),
    "diversity": ("knn_mean_sim", "core_similarity", "the core's similarity to its neighbours", True),
    "quality": ("quality", "quality", "the model's rating, 0 to 10", True),
}


def acceptance(
    rows: Sequence[dict[str, Any]] | None,
    settings: dict[str, Any],
    colours: dict[str, str],
    tasks: Sequence[Mapping[str, Any]] = (),
    limits: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """The page's values about a round's candidates; None without candidates.jsonl.

    Args:
      rows: of candidates.jsonl.
      settings: the run's, as nested dicts. A gate whose setting is missing has its default.
      colours: CSS class of each axis.
      tasks: rows of refined.jsonl after people's verdicts, see `after_people`.
      limits: the limits for candidates, as the stage's record has them.
    """
    if rows is None:
        return None
    groups = sorted({tuple(row["axes"]) for row in rows})
    refine = settings.get("refine") if isinstance(settings.get("refine"), dict) else {}
    itself = bool(limits.get("refines_itself"))
    lost = Counter(tuple(task["axes"]) for task in tasks if task["person"] == "reject")
    accepted = [_accepted(rows, group) for group in groups]
    return {
        "groups": groups,
        "gates": [
            {
                "title": ANSWERED if gate is None else gate.title,
                "cells": [_cell(gate, rows, group, refine, itself) for group in groups],
            }
            for gate in (None, *_met(rows))
        ]
        + ([] if people(tasks) is None else [{"title": PEOPLE, "cells": _judged(groups, accepted, lost)}]),
        "accepted": [n - lost[group] for group, n in zip(groups, accepted, strict=True)],
        "tries": [_tries(rows, group) for group in groups],
        "attempts": [
            {"number": n + 1, "tried": len(of), "accepted": sum(row["accepted"] for row in of)}
            for n in sorted({row["attempt"] for row in rows})
            if (of := [row for row in rows if row["attempt"] == n])
        ],
        "changes": [
            change for axis in CHANGES if (change := _change(axis, rows, colours.get(axis, "c-both")))
        ],
    }


def _judged(
    groups: Sequence[tuple[str, ...]], accepted: Sequence[int], lost: Mapping[tuple[str, ...], int]
) -> list[dict[str, Any]]:
    """How many rewrites of each group passed all gates, and how many of them no person rejected."""
    pairs = zip(groups, accepted, strict=True)
    return [{"state": "shut", "asked": n, "passed": n - lost[group]} for group, n in pairs]


def _cell(
    gate: Gate | None, rows: Sequence[dict[str, Any]], group: tuple[str, ...], refine: Any, itself: bool
) -> dict[str, Any]:
    """How many candidates of a group reached a gate and passed it.

    `gate` None: whether the refiner answered.
    """
    name = None if gate is None else gate.name
    if gate is not None:
        if not gate.concerns(group, refines_itself=itself):
            return {"state": "none"}
        if not gate.is_shut(refine.get("accept", "measured"), refine.get("gates") or {}):
            return {"state": "open"}
    order = [None, *(row.name for row in _met(rows))]
    stopped = Counter(row["gate"] for row in rows if tuple(row["axes"]) == group and not row["accepted"])
    of_group = sum(tuple(row["axes"]) == group for row in rows)
    asked = of_group - sum(stopped[earlier] for earlier in order[: order.index(name)])
    return {"state": "shut", "asked": asked, "passed": asked - stopped[name]}


def _met(rows: Sequence[dict[str, Any]]) -> list[Gate]:
    """The gates of the table, and after them gates that only the run's program had registered."""
    known = {gate.name for gate in gates()}
    others = sorted({row["gate"] for row in rows if row["gate"]} - known)
    last = dataclasses.replace(gates()[-1], of="all", accept="none", switch=None)
    return [*gates(), *(dataclasses.replace(last, name=name, title=name) for name in others)]


def _accepted(rows: Sequence[dict[str, Any]], group: tuple[str, ...]) -> int:
    return sum(row["accepted"] for row in rows if tuple(row["axes"]) == group)


def _tries(rows: Sequence[dict[str, Any]], group: tuple[str, ...]) -> dict[str, int]:
    of = [row for row in rows if tuple(row["axes"]) == group]
    return {"samples": len({row["task_id"] for row in of}), "tries": len(of)}


def _change(axis: str, rows: Sequence[dict[str, Any]], colour: str) -> dict[str, Any] | None:
    """Scores before and after, for all candidates that were measured on an axis; None if there are none."""
    before_name, after_name, label, more_is_better = CHANGES[axis]
    points = [
        (before, after, row["accepted"])
        for row in rows
        if axis in row["axes"]
        and (before := row["before"].get(before_name)) is not None
        and (after := (row["measured"] or {}).get(after_name)) is not None
    ]
    if not points:
        return None
    before, after = (np.array([point[i] for point in points], np.float64) for i in (0, 1))
    chosen = np.array([point[2] for point in points], bool)
    title = f"{axis.capitalize()}: {label}"
    points = plots.Points(before, after, chosen)
    plot = plots.scatter(title, points, ("before", "after"), (None, None), colour, diagonal=True, height=320)
    return {
        "axis": axis,
        "label": label,
        "better": "above the line is better" if more_is_better else "below the line is better",
        "plot": plot,
        "accepted": _medians(before[chosen], after[chosen]),
        "rejected": _medians(before[~chosen], after[~chosen]),
    }


def _medians(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    if not before.size:
        return {"n": 0, "before": None, "after": None}
    return {"n": before.size, "before": float(np.median(before)), "after": float(np.median(after))}
