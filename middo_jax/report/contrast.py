"""The contrast margins of a run's models by kind of fault, and the effect of the rounds on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.lib
import pyarrow.parquet as pq

from middo_jax.report.effects import EFFECTS, bootstrap
from middo_jax.rundir import RunDir, RunError
from middo_jax.rundir.schemas import CONTRAST_ROWS
from middo_jax.rundir.tables import refuse_newer


def contrast(run: RunDir) -> list[dict[str, Any]]:
    """The margins by kind of fault; empty if the run's evaluation did not measure them.

    Returns:
      of each kind {fault, n (held-out rows), margins: {model: mean over the rows, nats per token}, change and
      interval: of the mean from round_00 to final with its 95 % bootstrap interval over rows, None if
      unknown}. A larger margin is better.

    Raises:
      RunError: contrast_rows.parquet cannot be read.
    """
    path = run.contrast_rows
    recorded = run.final.stages().get("evaluate", {}).get("files", {})
    if f"../{path.name}" not in recorded or not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (pyarrow.lib.ArrowException, OSError) as e:
        raise RunError(f"{path}: not a table of contrast margins ({e}); delete it") from e
    refuse_newer(table.schema, CONTRAST_ROWS, path)
    found: dict[str, dict[str, dict[str, float]]] = {}  # fault: model: id: margin
    for row in table.to_pylist():
        found.setdefault(row["fault"], {}).setdefault(row["model"], {})[row["id"]] = row["margin"]
    return [_of_fault(fault, of_models) for fault, of_models in sorted(found.items())]


def _of_fault(fault: str, of_models: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    margins = {name: float(np.mean(list(rows.values()))) for name, rows in of_models.items()}
    before, after = (of_models.get(name) for name in EFFECTS["rounds"])
    change, interval = None, None
    if before and after and before.keys() == after.keys():
        pairs = np.array([(margin, after[id_]) for id_, margin in before.items()])
        change = float(np.mean(pairs[:, 1] - pairs[:, 0]))
        interval = bootstrap(pairs[:, 0], pairs[:, 1], np.ones(len(pairs)))
    n = max(map(len, of_models.values()))
    return {"fault": fault, "n": n, "margins": margins, "change": change, "interval": interval}


def contrast_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per kind of fault, for a terminal."""
    lines = []
    for of in found:
        margins = ", ".join(f"{name} {margin:.3f}" for name, margin in of["margins"].items())
        line = f"contrast margin, {of['fault']} ({of['n']:,} rows): {margins} nats per token"
        if of["interval"] is not None:
            low, high = of["interval"]
            line += f"; the rounds {of['change']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
        lines.append(line)
    return lines
