"""`select` and `load_config`: the public functions that need neither a model nor JAX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from middo_jax.config import Config, SettingsLike, layers_of, load
from middo_jax.config.axis_table import axes
from middo_jax.results import Scores, Selection
from middo_jax.rundir import RoundDir, held
from middo_jax.rundir.settings import settings_of
from middo_jax.signals.select import select as choose
from middo_jax.signals.table import as_scores, completed, read_scores
from middo_jax.stages.select import select_stage

PathLike = str | os.PathLike[str]


def load_config(path: PathLike | None = None, settings: SettingsLike = None) -> Config:
    """Reads settings from a YAML file and overrides some of them. docs/settings.md lists all settings.

    Args:
      path: the file; None starts from the defaults.
      settings: {"train.learning_rate": 1e-4, "complexity": {"fraction": 0.05}}, or strings as on the command
        line: ["train.learning_rate=1e-4"].

    Raises:
      ConfigError: a setting is unknown (the message suggests the nearest name) or has a wrong type or range,
        or the file does not exist.
    """
    return load(None if path is None else Path(path), layers_of(settings))


def select(
    scores: Scores | pa.Table | PathLike,
    *,
    complexity: Mapping[str, Any] | None = None,
    diversity: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    settings: SettingsLike = None,
) -> Selection:
    """Selects the hard, sparse and low-quality samples. Needs neither a model nor JAX.

    Args:
      scores: the result of `score`; or a table with `id` and the columns of at least one axis; or the folder
        of `score` or of a round. A folder's config.yaml has the settings that are not given here, and the
        folder gets selection.json and selection.parquet.
      complexity: {"m": 1.5}, standard deviations from the mean, or {"fraction": 0.05}, the share of the
        samples; m is 1 by default.
      diversity: as `complexity`.
      quality: as `complexity`.
      settings: further settings, see `load_config`; also the thresholds of registered axes.

    Raises:
      ValueError: a setting is wrong, or the table contains no scores.
      RunError: the folder contains no scores.
      RunLocked: another process writes into the folder.
    """
    given = {"complexity": complexity, "diversity": diversity, "quality": quality}
    # The arguments override thresholds in `settings`.
    layers = [*layers_of(settings), {axis: dict(of) for axis, of in given.items() if of is not None}]
    if isinstance(scores, str | os.PathLike):
        directory = RoundDir(Path(scores))
        config = settings_of(directory.path, layers)
        with held(directory.path):
            chosen, facts = select_stage(config, directory)
            table = read_scores(directory.scores)
    else:
        table = scores.table if isinstance(scores, Scores) else _checked(scores)
        config = load(None, [{"model.path": "none", "data.path": "none"}, *layers])
        chosen, facts = choose(table, config)
    return Selection(_flagged(table, chosen), facts)


def _checked(table: pa.Table) -> pa.Table:
    """A caller's table as a table of scores: the columns that it lacks are null.

    Raises:
      ValueError: it has no `id`, or no axis has all its columns.
    """
    columns = {row.name: row.columns for row in axes()}
    present = set(table.column_names)
    if "id" not in present:
        raise ValueError(f"the table of scores has no column id, only {', '.join(sorted(present)) or 'none'}")
    if not any(present.issuperset(of) for of in columns.values()):
        needed = "; ".join(f"{axis} needs {' and '.join(of)}" for axis, of in columns.items())
        raise ValueError(f"the table of scores has the columns of no axis: {needed}")
    return as_scores(completed(table), "the table of scores")


def _flagged(table: pa.Table, chosen: pa.Table) -> pa.Table:
    """Adds one boolean column per axis to the scores: whether a sample is in its set. Rows must match."""
    for name in (row.set_name for row in axes()):
        at = table.schema.get_field_index(name)
        column = chosen[name]
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    return table
