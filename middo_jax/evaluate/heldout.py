"""Held-out loss: what a model makes of examples that no training has seen. Axes: b row, t position."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.packing import first_fit, pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.decoder import Decoder
from middo_jax.models.nll import target_nll
from middo_jax.parallel.mesh import batch_divisor, named_sharding


class HeldoutLoss(NamedTuple):
    """Mean negative log-likelihood of all target tokens, each weighing the same.

    Attributes:
      loss: nats a token.
      n_target_tokens: over how many.
      n: of how many examples.
    """

    loss: float
    n_target_tokens: int
    n: int


def heldout_loss(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenized: Sequence[TokenizedExample],
    *,
    mesh: Mesh,
    batch_tokens: int,
    chunk: int,
    pack_length: int,
) -> HeldoutLoss:
    """Loss per target token over a set of examples.

    Args:
      graphdef: the decoder's structure.
      params: its parameters, on the mesh.
      tokenized: the examples, at least one of them with a target.
      mesh: where to compute.
      batch_tokens: tokens of a batch, all devices together; rounded to whole rows for each device.
      chunk: target positions whose logits exist at one time.
      pack_length: tokens of a row.

    Raises:
      ValueError: no target token at all, or an example is longer than `pack_length`.
    """
    # The first token of an example has nothing before it that could predict it.
    n_targets = sum(int(example.is_target_n[1:].sum()) for example in tokenized)
    if not n_targets:
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
            inputs = (packed.tokens_bt, packed.segment_ids_bt, packed.positions_bt, packed.is_target_bt)
            on_mesh = (jax.make_array_from_process_local_data(sharding, x, x.shape) for x in inputs)
            sums.append(_nll_sum(graphdef, params, *on_mesh, chunk))
    # Read only now: while the device computes, the host packs.
    return HeldoutLoss(math.fsum(float(x) for x in sums) / n_targets, n_targets, len(tokenized))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _nll_sum(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    is_target_bt: jax.Array,
    chunk: int,
) -> jax.Array:
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(tokens_bt, segment_ids_bt, positions_bt)
    return target_nll(model, hidden_btd, tokens_bt, is_target_bt, chunk).sum()
