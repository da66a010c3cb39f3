"""Parameters -> a Hugging Face directory, gathering one tensor of one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from middo_jax.models.hf.companions import ChatFormat, write_companions
from middo_jax.models.hf.files import DTYPES, LazyTensor, new_directory, write_weights
from middo_jax.models.hf.layout import TensorRow, tensor_table, turned
from middo_jax.models.hf.verifying import Expectation, Verification, compare
from middo_jax.models.model import Model, by_path
from middo_jax.parallel.hosts import to_host


def export(
    model: Model,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    *,
    chat: ChatFormat | None = None,
    expectation: Expectation | None = None,
) -> Verification | None:
    """Writes a model without adapters as a Hugging Face directory that transformers, vLLM and `load` read.

    In a program of several processes all must call it; the first one writes.

    Args:
      model: model as returned by `load`, possibly trained since; sharded or not.
      source_dir: directory that it was loaded from; config.json and the tokenizer's files are copied.
      out_dir: directory that is missing or empty; it appears only once it is complete and verified.
      dtype: float32, bfloat16 or float16; None keeps each parameter's dtype.
      max_shard_bytes: maximum size of a file of weights; a larger tensor gets a file of its own.
      chat: how training formatted conversations; None: as the source does.
      expectation: what transformers must compute from the directory; None: not verified.

    Returns:
      How closely the expectation is met; None without one, and on all processes but the first.

    Raises:
      ValueError: the dtype is not supported.
      FileExistsError: out_dir is not empty.
      CheckpointError: source_dir has no config.json, or the expectation is not met.
    """
    if dtype not in (None, *(names := list(map(str, DTYPES.values())))):
        raise ValueError(f"dtype {dtype!r} cannot be exported, only {', '.join(names)}")
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    values = by_path(model.params)
    tensors = [_lazy(row, values, dtype) for row in tensor_table(model.config)]
    verification = None
    if jax.process_index() == 0:
        with new_directory(out_dir) as directory:
            write_companions(source_dir, directory, str(tensors[0].dtype), chat or ChatFormat())
            write_weights(directory, tensors, max_shard_bytes)
            if expectation is not None:
                verification = compare(directory, expectation)
    else:
        for each in tensors:
            each.read()  # gathering is collective
    multihost_utils.sync_global_devices("export")
    return verification


def _lazy(row: TensorRow, values: Mapping[Any, jax.Array], dtype: str | None) -> LazyTensor:
    wanted = np.dtype(dtype or values[row.spec.path].dtype)

    def read() -> np.ndarray:
        return to_host(turned(_of_layer(values, row), row.spec.transposed, wanted))

    return LazyTensor(row.name, row.shape, wanted, read)


def _of_layer(values: Mapping[Any, jax.Array], row: TensorRow) -> jax.Array:
    """The value of a row's tensor in the decoder's layout, sharded as its parameter is."""
    value = values[row.spec.path]
    return value if row.layer is None else _slice_of(value, row.layer)


@jax.jit
def _slice_of(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, axis=0, keepdims=False)
