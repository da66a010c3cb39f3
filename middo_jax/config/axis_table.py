"""The table of axes: the scores by which samples are selected, and how the selected samples are refined.

A row declares everything about an axis: the columns of scores.parquet that decide, the end of them that is
bad, the name of the selected set, the refiner's task, and the report's texts. `signals.axes` describes how a
registered axis computes its column.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.fields import FieldInfo

from middo_jax.config.axes import AxisSettings, Threshold
from middo_jax.config.settings import Config

TaskOp = Literal["simplify", "rewrite", "synthesize", "reanswer", "complete"]
_NAMES_OF_ROWS = frozenset({"id", "all"})  # of a column of selection.parquet, of an entry of its overlaps


@dataclasses.dataclass(frozen=True)
class Axis:
    """One row of the table.

    Attributes:
      name: as in `--axes` and selection.json; its threshold is the settings group of this name.
      set_name: what selected samples are called, and the column of selection.parquet that marks them.
      columns: the one or two columns of scores.parquet that decide; a sample is selected where all are bad.
      bad: the end of these columns at which a sample is wanting.
      label: the report's name of what each column measures, for people; unit included.
      heading: the report's title of its plot.
      op: what the refiner is asked to do with a selected sample; None: it is only marked. `reanswer`: its
        prompt is answered anew, or its answer is completed if that was cut.
      optional: a run scores it only if `scoring.readings` names it.
    """

    name: str
    set_name: str
    columns: tuple[str, ...]
    bad: Literal["high", "low"]
    label: tuple[str, ...]
    heading: str
    op: TaskOp | None = None
    optional: bool = False

    @property
    def sign(self) -> int:
        """+1 if high scores are bad, -1 if low scores are."""
        return 1 if self.bad == "high" else -1

    @property
    def title(self) -> str:
        """The set's name with spaces, for the report."""
        return self.set_name.replace("_", " ")


_TABLE = [
    Axis(
        "complexity",
        "hard",
        ("loss_pre", "loss_post"),
        bad="high",
        label=("loss before training", "loss after training"),
        heading="Complexity: loss before and after training",
        op="simplify",
    ),
    Axis(
        "diversity",
        "sparse",
        ("knn_mean_sim",),
        bad="low",
        label=("mean similarity to the nearest neighbours",),
        heading="Diversity: nearness to neighbours",
        op="synthesize",
    ),
    Axis(
        "quality",
        "low_quality",
        ("quality",),
        bad="low",
        label=("quality, 0 to 10",),
        heading="Quality: the model's own rating",
        op="rewrite",
    ),
    Axis(
        "consistency",
        "inconsistent",
        ("consistency",),
        bad="high",
        label=("percentile rank of its worst reading",),
        heading="Consistency: the reading that is worst",
        op="reanswer",
        optional=True,
    ),
]
BUILT_IN = tuple(row.name for row in _TABLE)


def axes() -> tuple[Axis, ...]:
    """Returns all axes, in the order in which they are reported."""
    return tuple(_TABLE)


def axis(name: str) -> Axis:
    """Returns the row of an axis.

    Raises:
      KeyError: there is no axis of that name.
    """
    for row in _TABLE:
        if row.name == name:
            return row
    raise KeyError(name)


def axis_names() -> tuple[str, ...]:
    """Returns the names of all axes."""
    return tuple(row.name for row in _TABLE)


def scored_axes(config: Config) -> tuple[str, ...]:
    """The names of the axes that are scored where none is named: all, but an optional one only on request."""
    return tuple(row.name for row in _TABLE if not row.optional or row.name in config.scoring.readings)


def threshold_of(config: Config, name: str) -> Threshold:
    """Returns the threshold of an axis; the default if the axis was entered after `config` was created."""
    settings: AxisSettings = getattr(config, name, AxisSettings())
    return settings.threshold


def enter(row: Axis) -> None:
    """Appends an axis to the table, and its threshold to the settings.

    Raises:
      ValueError: one of its names is taken, or it uses an option that only built-in axes can use.
    """
    if row.name in Config.model_fields or hasattr(Config, row.name):
        raise ValueError(f"axis {row.name!r}: there is a setting of that name already")
    for name in (row.name, row.set_name):
        if not name.isidentifier():
            raise ValueError(f"axis {row.name!r}: {name!r} must be letters, digits and underscores")
    if row.set_name in {known.set_name for known in _TABLE} | _NAMES_OF_ROWS:
        raise ValueError(f"axis {row.name!r}: there is a set called {row.set_name!r} already")
    if len(row.columns) not in (1, 2) or len(row.label) != len(row.columns):
        raise ValueError(f"axis {row.name!r}: must have one or two columns, and a label for each")
    if row.op not in (None, "rewrite"):
        raise ValueError(
            f"axis {row.name!r}: op={row.op!r} belongs to a built-in axis, because only its gates check the "
            "result; give 'rewrite' or None"
        )
    _TABLE.append(row)
    Config.__pydantic_fields__[row.name] = FieldInfo.from_annotated_attribute(AxisSettings, AxisSettings())
    Config.model_rebuild(force=True)


def strike(name: str) -> None:
    """Removes an entered axis and its threshold.

    Raises:
      KeyError: there is no axis of that name, or it is built in.
    """
    if name in BUILT_IN:
        raise KeyError(name)
    _TABLE.remove(axis(name))
    del Config.__pydantic_fields__[name]
    Config.model_rebuild(force=True)
