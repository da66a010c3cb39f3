"""The selection stage: scores -> one set of samples per axis. It needs neither a model nor JAX."""

from __future__ import annotations

import time

import pyarrow as pa

from middo_jax.config import Config
from middo_jax.rundir import RoundDir, RunError, chain, write_json
from middo_jax.rundir.rows import SelectionFile
from middo_jax.signals.select import select
from middo_jax.signals.table import read_scores, write_scores


def select_stage(config: Config, directory: RoundDir) -> tuple[pa.Table, SelectionFile]:
    """Selects a set of samples per axis. Writes selection.parquet and selection.json, returns their content.

    Raises:
      RunError: the folder contains no scores.
    """
    began = time.monotonic()
    if not directory.scores.exists():
        raise RunError(f"{directory.path}: no scores.parquet there; run `middo score` first")
    begun = chain.select(directory).begin()
    table, selection = select(read_scores(directory.scores), config)
    write_scores(directory.selected, table)
    write_json(directory.selection, selection)
    counts = {axis: facts["n_selected"] for axis, facts in selection["axes"].items()}
    begun.finish(config, time.monotonic() - began, **counts)
    return table, selection
