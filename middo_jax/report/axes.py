"""The axes as the report shows them: those of the table, and those that only the run's own files name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from middo_jax.config.axis_table import BUILT_IN, axes


class ShownAxis(NamedTuple):
    """One axis.

    Attributes:
      title: of its set, such as "low quality".
      colour: a CSS class of the page.
      columns: of scores.parquet that decide.
      label: what each column measures.
      heading: of its plot.
      above: samples above the threshold are chosen, not those below it.
    """

    title: str
    colour: str
    columns: tuple[str, ...]
    label: tuple[str, ...]
    heading: str
    above: bool


def shown_axes(selections: Iterable[Mapping[str, Any] | None] = ()) -> dict[str, ShownAxis]:
    """All axes by name.

    Args:
      selections: contents of selection.json. An axis there that is not registered now, since it was in the
        process that wrote the file, is named after its columns.
    """
    shown = {
        row.name: ShownAxis(
            row.title,
            f"c-{row.name}" if row.name in BUILT_IN and not row.optional else "c-own",
            row.columns,
            row.label,
            row.heading,
            row.bad == "high",
        )
        for row in axes()
    }
    for selection in selections:
        for name, facts in (selection or {}).get("axes", {}).items():
            columns = tuple(facts["threshold"])
            if name not in shown:
                shown[name] = ShownAxis(name, "c-own", columns, columns, name.capitalize(), _is_above(facts))
    return shown


def _is_above(facts: Mapping[str, Any]) -> bool:
    """The threshold is at mean + m std where high scores are bad, at mean - m std where low ones are."""
    m, column = facts["m"], next(iter(facts["threshold"]))
    values = [facts[name].get(column) for name in ("threshold", "mean")]
    if m is None or None in values:
        return False
    return (values[0] - values[1]) * m > 0
