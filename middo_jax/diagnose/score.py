"""The fused pass: each example's loss and the embedding of its prompt, from one forward of packed batches.

Axes: b row, t position, s segment, d model width, n example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.packing import PackedBatch, pack, plan_buckets
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models.nll import target_nll
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.parallel.mesh import batch_divisor

Progress = Callable[[int, int], None]  # examples done, examples in all
MIN_LENGTH = 8  # tokens an example takes in the plan: a row of 256 holds at most 32


class SegmentScores(NamedTuple):
    """What a batch gives for each of its segments, in float32; 0 where a row has no such segment."""

    nll_sum_bs: jax.Array
    n_targets_bs: jax.Array
    embedding_bsd: jax.Array


class ExampleScores(NamedTuple):
    """What a pass gives for each example, in the order in which they came.

    Attributes:
      loss_n: mean NLL of the targets in nats, float32 sums; NaN where there is no target.
      n_targets_n: int32.
      embedding_nd: float32, mean of the last hidden state over the prompt; NaN where there is no prompt.
    """

    loss_n: np.ndarray
    n_targets_n: np.ndarray
    embedding_nd: np.ndarray


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segments", "chunk"))
def score_batch(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    is_target_bt: jax.Array,
    in_prompt_bt: jax.Array,
    *,
    max_segments: int,
    chunk: int,
) -> SegmentScores:
    """Loss sums and prompt embeddings of all segments of a packed batch."""
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(tokens_bt, segment_ids_bt, positions_bt)
    nll_bt = target_nll(model, hidden_btd, tokens_bt, is_target_bt, chunk)
    in_segment_bts = (segment_ids_bt[..., None] == jnp.arange(max_segments)).astype(jnp.float32)
    prompt_bts = in_segment_bts * in_prompt_bt[..., None]
    # HIGHEST: on accelerators a float32 product is otherwise rounded to bfloat16 or TF32.
    total_bsd = jnp.einsum(
        "bts,btd->bsd", prompt_bts, hidden_btd.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return SegmentScores(
        nll_sum_bs=jnp.einsum("bt,bts->bs", nll_bt, in_segment_bts, precision=jax.lax.Precision.HIGHEST),
        n_targets_bs=(is_target_bt[..., None] * in_segment_bts).sum(axis=1),
        embedding_bsd=total_bsd / prompt_bts.sum(axis=1)[..., None],
    )


def score_examples(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    examples: Sequence[TokenizedExample],
    *,
    mesh: Mesh,
    batch_tokens: int,
    chunk: int,
    on_progress: Progress | None = None,
) -> ExampleScores:
    """Scores every example; the result depends on neither the packing nor the mesh.

    Args:
      graphdef: static structure of the model.
      params: its parameters, on the mesh.
      examples: what to score.
      mesh: where.
      batch_tokens: tokens of a batch, all devices together.
      chunk: target positions whose logits exist at one time.
      on_progress: called after each batch.
    """
    loss_n = np.full(len(examples), np.nan, np.float32)
    n_targets_n = np.zeros(len(examples), np.int32)
    width = jax.eval_shape(lambda p: nnx.merge(graphdef, p).embed[...], params).shape[1]
    embedding_nd = np.full((len(examples), width), np.nan, np.float32)
    done = 0

    def keep(batch: PackedBatch, scores: SegmentScores) -> None:
        nonlocal done
        scores = to_host(scores)
        b, s = np.nonzero(batch.example_bs >= 0)
        n = batch.example_bs[b, s]
        n_targets_n[n] = scores.n_targets_bs[b, s]
        with np.errstate(invalid="ignore", divide="ignore"):  # no target: 0/0 is NaN, as promised
            loss_n[n] = scores.nll_sum_bs[b, s] / scores.n_targets_bs[b, s]
        embedding_nd[n] = scores.embedding_bsd[b, s]
        done += len(n)
        if on_progress is not None:
            on_progress(done, len(examples))

    buckets = plan_buckets(
        [len(e) for e in examples], batch_tokens, batch_divisor(mesh), min_length=MIN_LENGTH
    )
    running: tuple[PackedBatch, SegmentScores] | None = None
    with jax.set_mesh(mesh):
        for bucket in buckets:
            max_segments = bucket.length // MIN_LENGTH
            for rows in bucket.batches():
                batch = pack(examples, rows, bucket.batch, bucket.length, max_segments)
                arrays = [to_mesh(mesh, array, "batch", "length") for array in batch[:-1]]
                scores = score_batch(graphdef, params, *arrays, max_segments=max_segments, chunk=chunk)
                # The next batch is under way before the last one's numbers are waited for.
                if running is not None:
                    keep(*running)
                running = batch, scores
        if running is not None:
            keep(*running)
    return ExampleScores(loss_n, n_targets_n, embedding_nd)
