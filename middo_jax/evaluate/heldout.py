"""Held-out loss: the loss on examples that no training saw. Axes: b row, n example, t position."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.packing import first_fit, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.decoder import Decoder
from middo_jax.models.nll import target_nll
from middo_jax.parallel.mesh import batch_divisor, constrain, named_sharding


class RowLosses(NamedTuple):
    """Sums of the loss of each of n examples, in their order.

    Attributes:
      ids: of the examples.
      nll_n: float64 [n], sum of the negative log-likelihoods of the row's target tokens, in nats.
      n_targets_n: int64 [n], how many target tokens that sum has.
    """

    ids: Sequence[str]
    nll_n: np.ndarray
    n_targets_n: np.ndarray


class SourceLoss(NamedTuple):
    """The same as `HeldoutLoss`, for the examples of one source."""

    loss: float
    n_target_tokens: int


class HeldoutLoss(NamedTuple):
    """Mean negative log-likelihood of all target tokens, each weighing the same.

    Attributes:
      loss: nats a token.
      n_target_tokens: over how many.
      n: of how many examples.
      by_source: the same of each source, by name; empty if there is but one.
    """

    loss: float
    n_target_tokens: int
    n: int
    by_source: Mapping[str, SourceLoss]


def heldout_loss(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenized: Sequence[TokenizedExample],
    *,
    mesh: Mesh,
    batch_tokens: int,
    chunk: int,
    pack_length: int,
    sources: Sequence[str] = (),
) -> HeldoutLoss:
    """Loss per target token over a set of examples; see `row_losses`.

    Args:
      graphdef: the decoder's structure.
      params: its parameters, on the mesh.
      tokenized: the examples, at least one of them with a target.
      mesh: where to compute.
      batch_tokens: tokens of a batch, all devices together; rounded to whole rows for each device.
      chunk: target positions of a device whose logits exist at one time.
      pack_length: tokens of a row.
      sources: where each example is from, to tell the losses apart; empty: all from one.

    Raises:
      ValueError: no target token at all, or an example is longer than `pack_length`.
    """
    rows = row_losses(
        graphdef,
        params,
        tokenized,
        mesh=mesh,
        batch_tokens=batch_tokens,
        chunk=chunk,
        pack_length=pack_length,
    )
    return total(rows, sources)


def total(rows: RowLosses, sources: Sequence[str] = ()) -> HeldoutLoss:
    """The loss over all rows, and that of each source where `sources` names several (one name per row)."""
    names = sorted(set(sources)) or [""]
    source_n = np.asarray([names.index(source) for source in sources] or [0] * len(rows.ids), np.int32)
    by_source = {}
    for i, name in enumerate(names):
        of = source_n == i
        if n := int(rows.n_targets_n[of].sum()):
            by_source[name] = SourceLoss(math.fsum(rows.nll_n[of]) / n, n)
    n_targets = int(rows.n_targets_n.sum())
    return HeldoutLoss(
        math.fsum(rows.nll_n) / n_targets, n_targets, len(rows.ids), by_source if len(names) > 1 else {}
    )


def row_losses(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenized: Sequence[TokenizedExample],
    *,
    mesh: Mesh,
    batch_tokens: int,
    chunk: int,
    pack_length: int,
) -> RowLosses:
    """Sum of the target tokens' losses of each example; arguments and errors are those of `heldout_loss`."""
    # The first token of an example has nothing before it that could predict it.
    targets_n = np.asarray([int(example.is_target_n[1:].sum()) for example in tokenized], np.int64)
    if not targets_n.any():
        raise ValueError(f"held-out loss: none of the {len(tokenized)} examples has a token to predict")
    divisor = batch_divisor(mesh)
    batch = max(1, batch_tokens // (pack_length * divisor)) * divisor
    rows = first_fit([len(example) for example in tokenized], pack_length, max_segments=pack_length)
    sharding = named_sharding(mesh, "batch")
    sums = []
    with jax.set_mesh(mesh):
        for start in range(0, len(rows), batch):
            packed = pack(
                tokenized, rows[start : start + batch], batch, pack_length, max_segments=pack_length
            )
            # Padding has no target and hence no loss, so any example may get it.
            example_bt = np.take_along_axis(packed.example_bs, packed.segment_ids_bt, axis=1)
            inputs = (
                packed.tokens_bt,
                packed.segment_ids_bt,
                packed.positions_bt,
                packed.is_target_bt,
                example_bt.astype(np.int32),
            )
            on_mesh = (jax.make_array_from_process_local_data(sharding, x, x.shape) for x in inputs)
            sums.append(_nll_sums(graphdef, params, *on_mesh, chunk, len(tokenized)))
    # Read only now: the host packs while the device computes. Each example is whole within one batch.
    nll_n = np.sum([np.asarray(nll, np.float64) for nll in sums], axis=0)
    return RowLosses([example.id for example in tokenized], nll_n, targets_n)


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def _nll_sums(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    is_target_bt: jax.Array,
    example_bt: jax.Array,
    chunk: int,
    n_examples: int,
) -> jax.Array:
    """float32 [n_examples]."""
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(tokens_bt, segment_ids_bt, positions_bt)
    nll_bt = target_nll(model, hidden_btd, jnp.roll(tokens_bt, -1, axis=1), is_target_bt, chunk)
    return constrain(jax.ops.segment_sum(nll_bt.ravel(), example_bt.ravel(), n_examples), None)
