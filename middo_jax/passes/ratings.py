"""Quality: the model rates its own training data; the expected rating, in one prefill, nothing decoded.

Six ratings a sample: three dimensions, each of the prompt and of the response. The six questions are one tree
of tokens (see `rating`): what they share is read once, and so, once a row, is what all samples' begin with.
Axes: b row, t position, s tree within a row, r reading (position whose next token is looked at), n sample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.example import Example
from middo_jax.data.packing import Bucket, plan_buckets
from middo_jax.data.trees import Rows, common_prefix
from middo_jax.models.decoder import Decoder
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.questions import RatingTokens, rating_tree
from middo_jax.passes.runner import Batch, PassFacts, sweep
from middo_jax.progress import Progress, Silent
from middo_jax.signals.judge.readout import EXPECTED, Readout
from middo_jax.signals.judge.rubrics import COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TREE = 128  # tokens a tree takes in the plan: its questions alone are longer


@functools.partial(jax.jit, static_argnames=("graphdef", "ratings", "readout", "prefix", "longest"))
def judge_batch(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    until_bt: jax.Array,
    reading_bsr: jax.Array,
    *,
    ratings: RatingTokens,
    readout: Readout,
    prefix: int,
    longest: int,
) -> jax.Array:
    """Ratings [b, s, column] in float32 of every tree; meaningless where there is none."""
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(
        tokens_bt, segment_ids_bt, positions_bt, until_bt, prefix=prefix, longest=longest
    )

    def one_tree(reading_br: jax.Array) -> jax.Array:
        hidden_brd = jnp.take_along_axis(hidden_btd, reading_br[..., None], axis=1)
        return readout(rating_log_p(model, hidden_brd, ratings))

    return jax.lax.map(one_tree, reading_bsr.swapaxes(0, 1)).swapaxes(0, 1)


def rating_log_p(model: Decoder, hidden_brd: jax.Array, ratings: RatingTokens) -> jax.Array:
    """The model's own log-probabilities of the ratings 0..10, up to a constant that these eleven share.

    Where "10" is the token of "1" and one more, P(10) = P("1") P(second | "1") and
    P(1) = P("1") (1 - P(second | "1")): exact, and all in one prefill, since the "1" was read too.

    Args:
      model: whose `unembed` is used.
      hidden_brd: of the readings: [b, columns, d], or with a two-token "10" [b, 2 columns, d].
      ratings: the tokens.

    Returns:
      [b, columns, 11] float32.
    """
    b, r, d = hidden_brd.shape
    logits_brv = model.unembed(hidden_brd.reshape(b * r, d)).reshape(b, r, -1)
    count = len(COLUMNS)
    log_p = logits_brv[:, :count, jnp.asarray(ratings.first)]
    if ratings.ten_second is not None:
        after_one = jax.nn.log_softmax(logits_brv[:, count:], axis=-1)[..., ratings.ten_second]
        log_p = log_p.at[..., 1].add(jnp.log1p(-jnp.exp(after_one))).at[..., 10].add(after_one)
    return log_p


def judge(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mesh: Mesh,
    max_length: int,
    batch_tokens: int,
    readout: Readout = EXPECTED,
    progress: Progress | None = None,
    name: str = "ratings",
) -> tuple[np.ndarray, PassFacts]:
    """Six ratings of every example: [n, 6] float32, columns as `rubrics.COLUMNS`."""
    ratings = RatingTokens.of(tokenizer)
    rated = [rating_tree(e, tokenizer, ratings, max_length) for e in examples]
    trees = [r.tree for r in rated]
    prefix = (
        min(common_prefix([tree.tokens_n for tree in trees]), *(tree.stem for tree in trees)) if trees else 0
    )
    rating_n6 = np.full((len(examples), len(COLUMNS)), np.nan, np.float32)

    def batch(bucket: Bucket, rows: list[list[int]]) -> Batch:
        planned = Rows(trees, rows, bucket.batch, bucket.length, prefix)
        readings = len(COLUMNS) * (1 if ratings.ten_second is None else 2)
        reading_bsr = np.zeros((bucket.batch, bucket.length // MIN_TREE, readings), np.int32)
        for b, row in enumerate(rows):
            for s, (i, start) in enumerate(zip(row, planned.starts(row), strict=True)):
                reading_bsr[b, s] = start + np.asarray(rated[i].readings)
        arrays = (
            planned.fill(lambda i: trees[i].tokens_n),
            planned.tree_bt(),
            planned.fill(lambda i: trees[i].positions_n),
            planned.until_bt(),
            reading_bsr,
        )
        return Batch(arrays, sum(prefix + sum(planned.sizes(row)) for row in rows))

    def keep(rows: list[list[int]], expected_bsc: np.ndarray) -> None:
        for b, row in enumerate(rows):
            rating_n6[row] = expected_bsc[b, : len(row)]

    def static(bucket: Bucket) -> dict[str, Any]:
        return {"ratings": ratings, "readout": readout, "prefix": prefix, "longest": bucket.longest}

    lengths = [len(tree.tokens_n) - prefix for tree in trees]
    buckets = plan_buckets(lengths, batch_tokens, batch_divisor(mesh), prefix=prefix, min_length=MIN_TREE)
    facts = sweep(
        judge_batch,
        (graphdef, params),
        buckets,
        batch,
        keep,
        static=static,
        mesh=mesh,
        progress=progress or Silent(),
        name=name,
    )
    return rating_n6, facts
