"""Axes of your own: how a column of scores is computed from those that were measured.

row = Axis("verbosity", "wordy", ("n_target_tokens",), bad="high", label=("answer, tokens",),
           heading="Verbosity: length of the answer")
register(row)                     # a column of scores.parquet as it is; verbosity.m=2 is a setting

row = Axis("surprise", "surprising", ("loss_change",), bad="high", ...)
register(row, {"loss_change": lambda table: as_floats(table, "loss_post") - as_floats(table, "loss_pre")})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import pyarrow as pa

from middo_jax.config.axis_table import Axis, axes, enter, strike
from middo_jax.signals.table import SCHEMA, as_floats

Column = Callable[[pa.Table], np.ndarray]
_COLUMNS: dict[str, Mapping[str, Column]] = {}  # axis: its columns that are not in SCHEMA


def register(row: Axis, columns: Mapping[str, Column] | None = None) -> None:
    """Adds an axis: its row, its threshold as a setting, and how its columns are computed.

    Args:
      row: its row of the table.
      columns: for each of its columns that scores.parquet does not have: a function of the table of scores
        (of `signals.table.SCHEMA`) that returns [n] floats, NaN where a sample has none.

    Raises:
      ValueError: a name is taken, a column has no function, or a function has no column; says which.
    """
    columns = dict(columns or {})
    wanted = set(row.columns).difference(SCHEMA.names)
    if clash := sorted(columns.keys() & set(computed_names())):
        raise ValueError(f"axis {row.name!r}: another axis computes the column {clash[0]!r}")
    if missing := sorted(wanted - columns.keys()):
        raise ValueError(f"axis {row.name!r}: nothing computes its column {missing[0]!r}")
    if superfluous := sorted(columns.keys() - wanted):
        raise ValueError(
            f"axis {row.name!r}: computes {superfluous[0]!r}, which is measured or none of its columns"
        )
    enter(row)
    _COLUMNS[row.name] = columns


def unregister(name: str) -> None:
    """Removes an axis that was registered.

    Raises:
      KeyError: there is none of that name, or it is built in.
    """
    strike(name)
    del _COLUMNS[name]


def computed_names() -> list[str]:
    """The columns that registered axes compute."""
    return [name for row in axes() for name in _COLUMNS.get(row.name, ())]


def with_computed(table: pa.Table, wanted: Collection[str]) -> pa.Table:
    """The table of scores with the columns that the axes of these names compute; not finite becomes null.

    Raises:
      ValueError: a function returned something other than one number per row.
    """
    for row in axes():
        for name, compute in _COLUMNS.get(row.name, {}).items() if row.name in wanted else ():
            values = np.asarray(compute(table), np.float64)
            if values.shape != (len(table),):
                raise ValueError(
                    f"axis {row.name!r}: the function of column {name!r} returned the shape {values.shape}, "
                    f"not one number for each of {len(table)} rows"
                )
            # float32, like all scores: a table that was written and read selects the same samples.
            column = pa.array(values.astype(np.float32), pa.float32(), mask=~np.isfinite(values))
            table = table.append_column(name, column)
    return table


def scores_of(table: pa.Table, row: Axis) -> dict[str, np.ndarray] | None:
    """The columns that decide on an axis, [n] each; None where one was not computed."""
    if not set(row.columns) <= set(table.column_names):
        return None
    columns = {name: as_floats(table, name) for name in row.columns}
    return None if any(np.isnan(values).all() for values in columns.values()) else columns
