"""The fused pass: each example's loss and the embedding of its prompt, from one forward of packed batches.

What all examples begin with, such as a template's system turn, is read once a row where attention can share
it; what no loss and no embedding needs, such as the end of the last turn, is not read at all.
Axes: b row, t position, s segment, d model width, n example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.packing import Bucket, plan_buckets
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import Rows, Tree, common_prefix
from middo_jax.models.attention import shares_prefixes
from middo_jax.models.nll import target_nll
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.runner import Batch, PassFacts, sweep
from middo_jax.progress import Progress, Silent

MIN_LENGTH = 8  # tokens an example takes in the plan: a row of 1,024 holds at most 128
MIN_PREFIX = 8  # tokens: a shorter one is not worth its place in every row


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


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segments", "chunk", "prefix", "longest"))
def score_batch(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    next_bt: jax.Array,
    is_target_bt: jax.Array,
    in_prompt_bt: jax.Array,
    until_bt: jax.Array | None = None,
    *,
    max_segments: int,
    chunk: int,
    prefix: int = 0,
    longest: int | None = None,
) -> SegmentScores:
    """Loss sums and prompt embeddings of all segments of a packed batch; -1 is in no segment."""
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(
        tokens_bt, segment_ids_bt, positions_bt, until_bt, prefix=prefix, longest=longest
    )
    nll_bt = target_nll(model, hidden_btd, next_bt, is_target_bt, chunk)
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
    progress: Progress | None = None,
    name: str = "scores",
) -> tuple[ExampleScores, PassFacts]:
    """Scores every example; the result depends on neither the packing nor the mesh.

    Args:
      graphdef: static structure of the model.
      params: its parameters, on the mesh.
      examples: what to score.
      mesh: where.
      batch_tokens: tokens of a batch, all devices together.
      chunk: target positions of a device whose logits exist at one time.
      progress: is told how far the pass is, under this name.
      name: of the pass.
    """
    config = nnx.merge(graphdef, params).config
    loss_n = np.full(len(examples), np.nan, np.float32)
    n_targets_n = np.zeros(len(examples), np.int32)
    embedding_nd = np.full((len(examples), config.hidden_size), np.nan, np.float32)
    with jax.set_mesh(mesh):
        share = shares_prefixes(config.attention)
    packing = Packing.of(examples, share)

    def keep(rows: list[list[int]], scores: SegmentScores) -> None:
        for b, row in enumerate(rows):
            s = np.arange(len(row))
            n_targets_n[row] = scores.n_targets_bs[b, s]
            with np.errstate(invalid="ignore", divide="ignore"):  # no target: 0/0 is NaN, as promised
                loss_n[row] = scores.nll_sum_bs[b, s] / scores.n_targets_bs[b, s]
            embedding_nd[row] = scores.embedding_bsd[b, s]

    def static(bucket: Bucket) -> dict[str, Any]:
        return {
            "max_segments": bucket.length // MIN_LENGTH,
            "chunk": chunk,
            "prefix": packing.prefix,
            "longest": bucket.longest,
        }

    facts = sweep(
        score_batch,
        (graphdef, params),
        plan_buckets(
            packing.lengths(), batch_tokens, batch_divisor(mesh), prefix=packing.prefix, min_length=MIN_LENGTH
        ),
        packing.batch,
        keep,
        static=static,
        mesh=mesh,
        progress=progress or Silent(),
        name=name,
    )
    return ExampleScores(loss_n, n_targets_n, embedding_nd), facts


class Packing(NamedTuple):
    """Examples without what is not needed of them, and the tokens that all begin with, read once a row."""

    examples: Sequence[TokenizedExample]
    trees: Sequence[Tree]
    prefix: int

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], share_prefix: bool) -> Packing:
        """`share_prefix`: whether attention can."""
        trees = [Tree.line(e.tokens_n[: _needed(e)]) for e in examples]
        prefix = 0
        if share_prefix and len(examples) > 1:
            # Every example keeps a token of its own, and all whose hidden state counts.
            own = min(int(np.r_[_counts(e), True].argmax()) for e in examples)
            shortest = min(len(tree.tokens_n) for tree in trees)
            prefix = min(common_prefix([tree.tokens_n for tree in trees]), own, shortest - 1)
        return cls(examples, trees, prefix if prefix >= MIN_PREFIX else 0)

    def lengths(self) -> list[int]:
        """Tokens of each example behind the prefix."""
        return [len(tree.tokens_n) - self.prefix for tree in self.trees]

    def batch(self, bucket: Bucket, rows: list[list[int]]) -> Batch:
        """What `score_batch` reads."""
        planned = Rows(self.trees, rows, bucket.batch, bucket.length, self.prefix)

        def fill(values: Callable[[TokenizedExample], np.ndarray]) -> np.ndarray:
            return planned.fill(lambda i: values(self.examples[i])[: len(self.trees[i].tokens_n)])

        arrays = (
            fill(lambda e: e.tokens_n),
            planned.tree_bt(),
            planned.fill(lambda i: self.trees[i].positions_n),
            fill(lambda e: np.append(e.tokens_n[1:], np.int32(0))),
            fill(lambda e: np.append(e.is_target_n[1:], False)),
            fill(lambda e: e.in_prompt_n),
            planned.until_bt() if self.prefix else None,
        )
        real = sum(len(row) and self.prefix + sum(planned.sizes(row)) for row in rows)
        return Batch(arrays, real)


def _counts(example: TokenizedExample) -> np.ndarray:
    """bool [n]: its hidden state is read: the next token is a target, or it is of the prompt itself."""
    return example.in_prompt_n | np.append(example.is_target_n[1:], False)


def _needed(example: TokenizedExample) -> int:
    """Tokens up to the last position whose hidden state is read; all if none is."""
    return len(example) - int(_counts(example)[::-1].argmax()) if len(example) else 0
