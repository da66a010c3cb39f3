"""Loss curves of each training: its training loss, and the held-out losses measured meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from middo_jax.report import plots
from middo_jax.report.status import load_jsonl
from middo_jax.rundir import RoundDir

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
    """The same for evaluations.jsonl; the rows of `sources` are (training, source, first loss, last loss)."""
    drawn, sources = [], []
    for i, folder in enumerate(folders):
        rows = load_jsonl(folder.evaluations) or []
        if not rows:
            continue
        drawn.append(_line(folder.path.name, rows, i))
        first, last = rows[0]["by_source"], rows[-1]["by_source"]
        sources += [(folder.path.name, name, first[name]["loss"], last[name]["loss"]) for name in last]
    plot = plots.lines("Held-out loss while training", drawn, LABELS) if drawn else None
    return {"lines": drawn, "plot": plot, "sources": sources}


def _line(name: str, rows: Sequence[dict[str, Any]], number: int) -> plots.Line:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    return plots.Line(name, steps, losses, f"c-s{number % COLOURS}")
