"""Loss curves of each training: its training loss, and the held-out losses measured meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from middo_jax.report import plots
from middo_jax.report.status import load_jsonl
from middo_jax.rundir import RoundDir, RunDir, file_hash

COLOURS = 7  # classes c-s0 ... of the page
LABELS = ("optimizer step", "loss, nats per token")


def training_curves(folders: Sequence[RoundDir]) -> dict[str, Any]:
    """One line per training with finite losses in metrics.jsonl, and their plot; None without lines."""
    drawn = []
    for i, folder in enumerate(folders):
        rows = [r for r in load_jsonl(folder.metrics, torn_end=True) or [] if r["loss"] is not None]
        if rows:
            drawn.append(_line(folder.path.name, rows, i))
    return {"lines": drawn, "plot": plots.lines("Training loss", drawn, LABELS) if drawn else None}


def heldout_curves(folders: Sequence[RoundDir]) -> dict[str, Any]:
    """The same for evaluations.jsonl; the rows of `sources` are (training, source, first loss, last loss).

    `others` are trainings that were evaluated on other held-out rows than the run's present ones.
    """
    drawn, sources, others = [], [], []
    for i, folder in enumerate(folders):
        rows = load_jsonl(folder.evaluations) or []
        if not rows:
            continue
        if _is_of_other_rows(folder):
            others.append(folder.path.name)
            continue
        drawn.append(_line(folder.path.name, rows, i))
        first, last = rows[0]["by_source"], rows[-1]["by_source"]
        sources += [(folder.path.name, name, first[name]["loss"], last[name]["loss"]) for name in last]
    plot = plots.lines("Held-out loss while training", drawn, LABELS) if drawn else None
    return {"lines": drawn, "plot": plot, "sources": sources, "others": others}


def _is_of_other_rows(folder: RoundDir) -> bool:
    known = folder.stages().get("train", {}).get("heldout")  # earlier versions did not record it
    heldout = RunDir(folder.path.parent).heldout
    return known is not None and heldout.exists() and file_hash(heldout) != known


def _line(name: str, rows: Sequence[dict[str, Any]], number: int) -> plots.Line:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    return plots.Line(name, steps, losses, f"c-s{number % COLOURS}")
