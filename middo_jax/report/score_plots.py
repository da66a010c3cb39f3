"""The plots of a round's scores, one per axis, with the selected samples in colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from middo_jax.report import plots
from middo_jax.report.axes import ShownAxis


def score_plots(
    scores: pa.Table | None, sets: dict[str, Any], settings: dict[str, Any], axes: Mapping[str, ShownAxis]
) -> dict[str, Any]:
    """One plot per axis, with the samples of selection.json in colour; None for an axis without scores."""
    # With normalised losses the thresholds do not apply to the losses in the plot.
    normalised = settings.get("complexity", {}).get("normalise", "none") != "none"
    is_log_odds = settings.get("quality", {}).get("score") == "log_odds"
    found: dict[str, Any] = {}
    for axis, (name, colour, columns, labels, heading, _) in axes.items():
        if scores is None or not set(columns).issubset(scores.column_names):
            found[axis] = None
            continue
        values = np.stack([_floats(scores[column]) for column in columns], axis=1)
        chosen_ids = pa.array(sets.get(axis, {}).get("ids", ()), scores.schema.field("id").type)
        chosen = pc.call_function("is_in", [scores["id"]], pc.SetLookupOptions(chosen_ids)).to_numpy(
            zero_copy_only=False
        )
        known = np.isfinite(values).all(axis=1)
        values, chosen = values[known], chosen[known]
        if not len(values):
            found[axis] = None
            continue
        limits = [sets.get(axis, {}).get("threshold", {}).get(c) for c in columns]
        if axis == "complexity" and normalised:
            limits = [None, None]
        if len(columns) == 2:
            points = plots.Points(values[:, 0], values[:, 1], chosen)
            plot = plots.scatter(heading, points, (labels[0], labels[1]), (limits[0], limits[1]), colour)
        else:
            label = "quality, log-odds of a good rating" if axis == "quality" and is_log_odds else labels[0]
            plot = plots.histogram(
                f"Distribution of {columns[0]}", values[:, 0], chosen, limits[0], label, colour
            )
        drawn = sum(
            min(n, len(range(n)[plots.thinned(n)])) for n in (int(chosen.sum()), int((~chosen).sum()))
        )
        shown = drawn if len(columns) == 2 else len(values)
        found[axis] = {
            "plot": plot,
            "n": len(values),
            "shown": shown,
            "chosen": int(chosen.sum()),
            "name": name,
            "at_mean_length": axis == "complexity" and normalised,
        }
    return found


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64 [n]; null becomes NaN."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
