"""Log-likelihoods of continuations, each given its context; texts that begin alike are read once.

The texts are sorted and joined into trees: the answers of a question share the question, and questions with
the same examples before them share these. One forward of packed trees scores all of them.
Axes: docs/contributing.md#axes; x text of a tree, r target of a tree or of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.data.packing import ROW, Bucket
from middo_jax.data.trees import PackedTrees, Tree, common_prefix, forest
from middo_jax.models.model import Model, Params, Structure, bound
from middo_jax.models.nll import target_scores
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.runner import Pass, PassFacts, PassPlan
from middo_jax.progress import Progress, Silent

MIN_LENGTH = 8  # tokens a tree takes in the plan: a row of 1,024 holds at most 128
MIN_SHARED = 8  # tokens: texts with a shorter common beginning go into trees of their own
SHARED_FACTOR = 4  # a tree is at most so many times as long as what its texts share: a longer beginning pays

MAX_TEXTS = 128  # of a tree: single-token answers to one question would otherwise fill it without end

Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class Continuation(NamedTuple):
    """A text of tokens whose last part is scored.

    Attributes:
      context: at least one token.
      continuation: at least one token; each is predicted from all tokens before it.
    """

    context: Sequence[int]
    continuation: Sequence[int]


class ContinuationScores(NamedTuple):
    """What a pass gives for each text, in the order in which they came.

    Attributes:
      log_likelihood_n: float64, sum of the log-probabilities of the continuation's tokens, in nats; each sum
        is computed in float32.
      is_greedy_n: bool; every token of the continuation is the likeliest one at its place.
    """

    log_likelihood_n: np.ndarray
    is_greedy_n: np.ndarray


class ContinuationInputs(NamedTuple, Generic[Array]):
    """What `continuation_batch` reads.

    Attributes:
      tokens_bt: int32 token ids.
      segment_ids_bt: int32, the tree of each position; -1 is in none.
      positions_bt: int32, the position within its text.
      until_bt: int32; see `models.attention.Packing`.
      source_br: int32, the place in the row from which a target is predicted.
      target_br: int32, the predicted token.
      text_br: int32, s * (texts per tree) + x of the target's text; -1 is no target.
    """

    tokens_bt: Array
    segment_ids_bt: Array
    positions_bt: Array
    until_bt: Array
    source_br: Array
    target_br: Array
    text_br: Array


class TextSums(NamedTuple):
    """What a batch gives for each text of each tree, [b, s, x]: sums over its targets."""

    nll_bsx: jax.Array
    n_other_bsx: jax.Array  # targets that are not the likeliest token


@functools.partial(jax.jit, static_argnames=("graphdef", "max_trees", "max_texts", "chunk", "longest"))
def continuation_batch(
    graphdef: Structure,
    params: Params,
    batch: ContinuationInputs[jax.Array],
    *,
    max_trees: int,
    max_texts: int,
    chunk: int,
    longest: int,
) -> TextSums:
    """Sums over the targets of all texts of a packed batch.

    Args:
      graphdef: the decoder's structure.
      params: its parameters.
      batch: packed rows.
      max_trees: trees of a row at most: the size of axis s.
      max_texts: texts of a tree at most: the size of axis x.
      chunk: targets of a device whose logits exist at one time.
      longest: see `models.attention.Packing`.
    """
    model = bound(graphdef, params)
    places = batch.segment_ids_bt, batch.positions_bt, batch.until_bt
    hidden_btd = model.hidden(batch.tokens_bt, *places, prefix=0, longest=longest)
    hidden_brd = jnp.take_along_axis(hidden_btd, batch.source_br[..., None], axis=1)
    found = target_scores(model, hidden_brd, batch.target_br, batch.text_br >= 0, chunk)
    size = max_trees * max_texts

    def sums(text_r: jax.Array, value_r: jax.Array) -> jax.Array:
        total = jax.ops.segment_sum(value_r, jnp.where(text_r < 0, size, text_r), size + 1)
        return total[:size].reshape(max_trees, max_texts)

    return TextSums(
        nll_bsx=jax.vmap(sums)(batch.text_br, found.nll_bt),
        n_other_bsx=jax.vmap(sums)(batch.text_br, (~found.is_likeliest_bt).astype(jnp.int32)),
    )


class SharedTexts(NamedTuple):
    """A tree of some texts, and where their targets are predicted.

    Attributes:
      tree: all tokens of the texts but their last ones, which no target is predicted from.
      texts: which texts, as indices into those of the pass.
      source_r: the place in the tree from which each target is predicted.
      target_r: the predicted token.
      text_r: the target's text, as an index into `texts`.
    """

    tree: Tree
    texts: Sequence[int]
    source_r: np.ndarray
    target_r: np.ndarray
    text_r: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Continuation], members: Sequence[int]) -> SharedTexts:
        """The tree of some of the texts, which are sorted."""
        tree, places = forest([_read(texts[i]) for i in members])
        counts = [len(texts[i].continuation) for i in members]
        sources = [at[len(at) - n :] for at, n in zip(places, counts, strict=True)]
        targets = [np.asarray(texts[i].continuation, np.int32) for i in members]
        text_r = np.repeat(np.arange(len(members), dtype=np.int32), counts)
        return cls(tree, members, np.concatenate(sources), np.concatenate(targets), text_r)


def _read(text: Continuation) -> np.ndarray:
    return np.asarray([*text.context, *text.continuation[:-1]], np.int32)


def shared_texts(texts: Sequence[Continuation]) -> list[SharedTexts]:
    """All texts in trees; each tree has few enough tokens for a row, unless a single text has more.

    Raises:
      ValueError: a context or a continuation is empty.
    """
    for i, text in enumerate(texts):
        if not len(text.context) or not len(text.continuation):
            raise ValueError(f"text {i}: context and continuation must have at least one token each")
    reads = {i: _read(text) for i, text in enumerate(texts)}
    order = sorted(reads, key=lambda i: (reads[i].tolist(), i))
    groups: list[list[int]] = []
    size = 0
    for at, i in enumerate(order):
        shared = common_prefix([reads[order[at - 1]], reads[i]]) if at else 0
        new = len(reads[i]) - shared
        fits = new == 0 or (shared >= MIN_SHARED and size + new <= max(ROW, SHARED_FACTOR * shared))
        if at and fits and len(groups[-1]) < MAX_TEXTS:
            groups[-1].append(i)
            size += new
        else:
            groups.append([i])
            size = len(reads[i])
    return [SharedTexts.of(texts, members) for members in groups]


def score_continuations(
    model: Model,
    texts: Sequence[Continuation],
    *,
    batch_tokens: int,
    chunk: int,
    progress: Progress | None = None,
    name: str = "log-likelihoods",
) -> tuple[ContinuationScores, PassFacts]:
    """Scores every text; the result depends on neither the sharing nor the packing nor the mesh.

    Args:
      model: whose log-likelihoods are wanted, on its mesh.
      texts: what to score.
      batch_tokens: tokens of a batch, all devices together.
      chunk: targets of a device whose logits exist at one time.
      progress: is told how far the pass is, under this name.
      name: of the pass.

    Raises:
      ValueError: a context or a continuation is empty.
    """
    shared = shared_texts(texts)
    plan = PassPlan.of([one.tree for one in shared], 0, batch_tokens, batch_divisor(model.mesh), MIN_LENGTH)
    max_texts = max((len(one.texts) for one in shared), default=1)
    capacity = _capacity(plan, shared)
    log_likelihood_n = np.full(len(texts), np.nan)
    is_greedy_n = np.zeros(len(texts), bool)

    def static(bucket: Bucket) -> dict[str, Any]:
        trees = bucket.length // MIN_LENGTH
        return {"max_trees": trees, "max_texts": max_texts, "chunk": chunk, "longest": bucket.longest}

    def keep(index_m: np.ndarray, sums: TextSums) -> None:
        for i, nll_x, n_other_x in zip(index_m, sums.nll_bsx, sums.n_other_bsx, strict=True):
            members = shared[i].texts
            log_likelihood_n[members] = -nll_x[: len(members)].astype(np.float64)
            is_greedy_n[members] = n_other_x[: len(members)] == 0

    inputs = functools.partial(_inputs, shared, max_texts, capacity)
    facts = Pass(continuation_batch, plan, inputs, static).run(model, keep, progress or Silent(), name)
    return ContinuationScores(log_likelihood_n, is_greedy_n), facts


def _capacity(plan: PassPlan, shared: Sequence[SharedTexts]) -> dict[int, int]:
    """The most targets of a row, by the row's length; a power of two, so that few programs are compiled."""
    most: dict[int, int] = {}
    for bucket in plan.buckets:
        for row in bucket.rows:
            count = sum(len(shared[i].source_r) for i in row)
            most[bucket.length] = max(most.get(bucket.length, 1), count)
    return {length: 1 << (count - 1).bit_length() for length, count in most.items()}


def _inputs(
    shared: Sequence[SharedTexts], max_texts: int, capacity: dict[int, int], packed: PackedTrees
) -> ContinuationInputs[np.ndarray]:
    """What `continuation_batch` reads of a batch."""
    shape = packed.batch, capacity[packed.length]
    source_br, target_br, text_br = (np.full(shape, value, np.int32) for value in (0, 0, -1))
    for b, row in enumerate(packed.rows):
        end = 0
        for s, (i, start) in enumerate(zip(row, packed.starts(row), strict=True)):
            begin, end = end, end + len(shared[i].source_r)
            source_br[b, begin:end] = start + shared[i].source_r
            target_br[b, begin:end] = shared[i].target_r
            text_br[b, begin:end] = s * max_texts + shared[i].text_r
    return ContinuationInputs(
        tokens_bt=packed.fill(lambda i: packed.trees[i].tokens_n),
        segment_ids_bt=packed.tree_bt(),
        positions_bt=packed.fill(lambda i: packed.trees[i].positions_n),
        until_bt=packed.until_bt(),
        source_br=source_br,
        target_br=target_br,
        text_br=text_br,
    )
