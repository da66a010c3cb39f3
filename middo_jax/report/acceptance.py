"""What became of the refiner's candidates: how many met their end at which gate, and what the others changed.

Reads candidates.jsonl, a row an attempt. Gates are counted in the order of GATES: one that has stopped a
candidate was its last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from middo_jax.report import plots

GATES = {
    "answered": "the refiner answered",
    "readable": "it can be read and trained on",
    "sane": "no refusal, echo or copy",
    "numbers": "numbers kept",
    "code": "code blocks kept",
    "language": "language kept",
    "length": "about as long as the dataset's",
    "duplicate": "no near-duplicate",
    "context": "still about its original's task",
    "loss": "loss below the hard ones'",
    "coverage": "nearer to its core than neighbours are",
    "novelty": "no paraphrase of a sample",
    "distribution": "not farther out, not hard",
    "quality": "rating rises",
}
ALWAYS = ("answered", "readable")  # cannot be switched off
BY_TEXT = ("sane", "numbers", "code", "language", "length", "duplicate")
OF_REWRITES, OF_ADDITIONS = ("numbers", "code", "context"), ("coverage", "novelty", "distribution")
OF_AXIS = {"loss": "complexity", "quality": "quality"}

CHANGES = {  # axis: (score of the sample, number of the measurement, what to call it, more is better)
    "complexity": ("loss_post", "loss", "loss under the model, nats a token", False),
    "diversity": ("knn_mean_sim", "core_similarity", "the core's similarity to its neighbours", True),
    "quality": ("quality", "quality", "the model's rating, 0 to 10", True),
}


def acceptance(
    rows: Sequence[dict[str, Any]] | None, settings: dict[str, Any], colours: dict[str, str]
) -> dict[str, Any] | None:
    """What the page says of a round's candidates; None where there is no candidates.jsonl.

    Args:
      rows: of candidates.jsonl.
      settings: the run's, as a tree; a setting that is not there counts as the gate being shut.
      colours: CSS class of each axis.
    """
    if rows is None:
        return None
    groups = sorted({tuple(row["axes"]) for row in rows})
    refine = settings.get("refine") if isinstance(settings.get("refine"), dict) else {}
    return {
        "groups": groups,
        "gates": [
            {"title": title, "cells": [_cell(gate, rows, group, refine) for group in groups]}
            for gate, title in GATES.items()
        ],
        "accepted": [_accepted(rows, group) for group in groups],
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


def _cell(gate: str, rows: Sequence[dict[str, Any]], group: tuple[str, ...], refine: Any) -> dict[str, Any]:
    """How many of a group passed a gate, of those that no earlier one had stopped."""
    order = list(GATES)
    if not _concerns(gate, group):
        return {"state": "none"}
    if not _is_shut(gate, refine):
        return {"state": "open"}
    ends = Counter(
        None if row["accepted"] else row["gate"] or "answered" for row in rows if tuple(row["axes"]) == group
    )
    stopped_before = sum(ends[earlier] for earlier in order[: order.index(gate)])
    asked = ends.total() - stopped_before
    return {"state": "shut", "asked": asked, "passed": asked - ends[gate]}


def _concerns(gate: str, group: tuple[str, ...]) -> bool:
    if gate in OF_AXIS:
        return OF_AXIS[gate] in group
    if gate in (*OF_REWRITES, *OF_ADDITIONS):
        return (gate in OF_ADDITIONS) == ("diversity" in group)
    return True


def _is_shut(gate: str, refine: Any) -> bool:
    accept, gates = refine.get("accept", "measured"), refine.get("gates") or {}
    if gate in ALWAYS:
        return True
    if accept == "none" or (accept == "sane" and gate not in BY_TEXT):
        return False
    return gates.get(gate, True) not in (False, None)


def _accepted(rows: Sequence[dict[str, Any]], group: tuple[str, ...]) -> int:
    return sum(row["accepted"] for row in rows if tuple(row["axes"]) == group)


def _tries(rows: Sequence[dict[str, Any]], group: tuple[str, ...]) -> dict[str, int]:
    of = [row for row in rows if tuple(row["axes"]) == group]
    return {"samples": len({row["task_id"] for row in of}), "tries": len(of)}


def _change(axis: str, rows: Sequence[dict[str, Any]], colour: str) -> dict[str, Any] | None:
    """Before and after of every candidate that was measured on an axis; None where none was."""
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
    plot = plots.scatter(
        title, before, after, chosen, ("before", "after"), (None, None), colour, diagonal=True, height=320
    )
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
