"""The pass of ratings: a model's rating for each question about an example, from one prefill, no decoding.

The questions about an example form one tree of tokens (see `signals.judge.questions`). Their common parts are
computed once per example, and the common prefix of all trees once per row.
Axes: docs/contributing.md#axes; r position whose next-token logits are used, c column (a rating of an
example).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.data.lazy import Lazy
from middo_jax.data.packing import Bucket
from middo_jax.data.trees import PackedTrees, Tree, common_prefix
from middo_jax.models.decoder import Decoder
from middo_jax.models.model import Model, Params, Structure, bound
from middo_jax.parallel.coordination import gather
from middo_jax.parallel.hosts import gather_rows
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.parts import Parts, Saved, digests
from middo_jax.passes.runner import Pass, PassFacts, PassPlan
from middo_jax.progress import Progress, Silent

MIN_TREE = 128  # a tree counts at least 128 tokens in the plan; its questions alone are longer

Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program

# [..., 11] float32 log-probabilities of the ratings 0..10, up to a constant -> [...] float32.
Readout = Callable[[jax.Array], jax.Array]


class RatingSpelling(Protocol):
    """How a tokenizer spells the ratings; hashable, as `signals.judge.questions.RatingTokens` is."""

    @property
    def first(self) -> tuple[int, ...]:
        """[11], the token of each rating; "10" has the token of "1" if it is two tokens."""
        ...

    @property
    def ten_second(self) -> int | None:
        """The second token of "10"; None if "10" is one token."""
        ...


class QuestionTree(Protocol):
    """The questions about one example, such as a `signals.judge.questions.RatingTree`."""

    @property
    def tree(self) -> Tree:
        """The tokens of the questions and of the beginning of each answer."""
        ...

    @property
    def read_positions(self) -> tuple[int, ...]:
        """Position per column whose next token is the rating; then, if "10" is two tokens, those of "1"."""
        ...


@dataclasses.dataclass(frozen=True)
class RatingScale:
    """The ratings and their readout; hashable.

    Attributes:
      spelling: the tokens of the ratings.
      readout: function from the ratings' log-probabilities to one number; hashable.
      columns: number of ratings per example.
    """

    spelling: RatingSpelling
    readout: Readout
    columns: int

    @property
    def n_positions(self) -> int:
        """Number of positions per tree whose next-token logits are used."""
        return self.columns if self.spelling.ten_second is None else 2 * self.columns


class RatingInputs(NamedTuple, Generic[Array]):
    """Inputs of `judge_batch`.

    Attributes:
      tokens_bt: int32 token IDs.
      segment_ids_bt: int32, tree of each position; -1 means none.
      positions_bt: int32, position within its text.
      until_bt: int32; see `models.attention.Packing`.
      reading_bsr: int32, positions of each tree whose next-token logits are used.
    """

    tokens_bt: Array
    segment_ids_bt: Array
    positions_bt: Array
    until_bt: Array
    reading_bsr: Array


@functools.partial(jax.jit, static_argnames=("graphdef", "scale", "prefix", "longest"))
def judge_batch(
    graphdef: Structure,
    params: Params,
    batch: RatingInputs[jax.Array],
    *,
    scale: RatingScale,
    prefix: int,
    longest: int,
) -> jax.Array:
    """Returns the ratings of every tree, float32 [b, s, c]; meaningless where a row has no such tree."""
    model = bound(graphdef, params)
    places = batch.segment_ids_bt, batch.positions_bt, batch.until_bt
    hidden_btd = model.hidden(batch.tokens_bt, *places, prefix=prefix, longest=longest)

    def one_tree(reading_br: jax.Array) -> jax.Array:
        hidden_brd = jnp.take_along_axis(hidden_btd, reading_br[..., None], axis=1)
        return scale.readout(rating_log_p(model, hidden_brd, scale.spelling))

    return jax.lax.map(one_tree, batch.reading_bsr.swapaxes(0, 1)).swapaxes(0, 1)


def rating_log_p(model: Decoder, hidden_brd: jax.Array, spelling: RatingSpelling) -> jax.Array:
    """Returns the model's log-probabilities of the ratings 0..10, up to a constant common to all eleven.

    If "10" is the token of "1" and a second one, P(10) = P("1") P(second | "1") and
    P(1) = P("1") (1 - P(second | "1")). This is exact and needs one prefill, since the tree contains the "1".

    Args:
      model: the decoder; its `unembed` is used.
      hidden_brd: hidden states at the read positions: [b, c, d], or [b, 2 c, d] with a two-token "10".
      spelling: the tokens of the ratings.

    Returns:
      [b, c, 11] float32.
    """
    b, r, d = hidden_brd.shape
    logits_brv = model.unembed(hidden_brd.reshape(b * r, d)).reshape(b, r, -1)
    count = r if spelling.ten_second is None else r // 2
    log_p = logits_brv[:, :count, jnp.asarray(spelling.first)]
    if spelling.ten_second is not None:
        after_one = jax.nn.log_softmax(logits_brv[:, count:], axis=-1)[..., spelling.ten_second]
        log_p = log_p.at[..., 1].add(jnp.log1p(-jnp.exp(after_one))).at[..., 10].add(after_one)
    return log_p


def rate(
    model: Model,
    asked: Sequence[QuestionTree],
    scale: RatingScale,
    *,
    batch_tokens: int,
    progress: Progress | None = None,
    name: str = "ratings",
    parts: Parts | None = None,
) -> tuple[np.ndarray, PassFacts]:
    """Returns the ratings of every example, [n, c] float32, and the facts of the pass.

    Args:
      model: the rating model; runs on its mesh.
      asked: the questions about each example. Of `Lazy` ones, a process makes its share and the rows of its
        devices.
      scale: the number of ratings, their tokens and their readout.
      batch_tokens: tokens per batch, all devices together.
      progress: progress display.
      name: name of the pass in the progress display.
      parts: results of an earlier start of this pass, see `passes.parts`.
    """
    lengths, prefix = _outline(asked)
    trees = _Trees(asked)
    rating_nc = np.full((len(asked), scale.columns), np.nan, np.float32)

    def inputs(packed: PackedTrees) -> RatingInputs[np.ndarray]:
        if isinstance(asked, Lazy):
            asked.bring(i for row in packed.rows for i in row)
        reading_bsr = np.zeros((packed.batch, packed.length // MIN_TREE, scale.n_positions), np.int32)
        for b, row in enumerate(packed.rows):
            for s, (i, start) in enumerate(zip(row, packed.starts(row), strict=True)):
                reading_bsr[b, s] = start + np.asarray(asked[i].read_positions)
        return RatingInputs(
            tokens_bt=packed.fill(lambda i: trees[i].tokens_n),
            segment_ids_bt=packed.tree_bt(),
            positions_bt=packed.fill(lambda i: trees[i].positions_n),
            until_bt=packed.until_bt(),
            reading_bsr=reading_bsr,
        )

    def content(i: int) -> tuple[Tree, np.ndarray]:
        return trees[i], np.asarray(asked[i].read_positions)

    def keep(index_m: np.ndarray, rating_mc: np.ndarray) -> None:
        rating_nc[index_m] = rating_mc

    def static(bucket: Bucket) -> dict[str, Any]:
        return {"scale": scale, "prefix": prefix, "longest": bucket.longest}

    plan = PassPlan.of(trees, prefix, batch_tokens, batch_divisor(model.mesh), MIN_TREE, lengths)
    own = asked.own if isinstance(asked, Lazy) else None
    saved = None if parts is None else Saved(parts, digests(len(asked), content, own))
    facts = Pass(judge_batch, plan, inputs, static).run(model, keep, progress or Silent(), name, saved)
    return rating_nc, facts


class _Trees(Sequence[Tree]):
    """The trees of questions, which are read one at a time."""

    def __init__(self, asked: Sequence[QuestionTree]) -> None:
        self._asked = asked

    def __len__(self) -> int:
        return len(self._asked)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [one.tree for one in self._asked[index]]
        return self._asked[index].tree


def _outline(asked: Sequence[QuestionTree]) -> tuple[list[int], int]:
    """The number of tokens of each tree, and the length of the prefix that all share."""
    is_shared = isinstance(asked, Lazy)
    trees = [one.tree for one in (asked.share if is_shared else asked)]
    lengths_n = np.array([len(tree.tokens_n) for tree in trees], np.int32)
    begins = [tree.tokens_n[: tree.stem] for tree in trees]
    begin_n = begins[0][: common_prefix(begins)] if begins else None
    if is_shared:
        lengths_n = gather_rows("tokens of questions", asked.own, lengths_n[:, None], len(asked))[:, 0]
        told = gather("beginning of questions", None if begin_n is None else begin_n.tolist())
        begins = [np.asarray(one, np.int32) for one in told if one is not None]
        begin_n = begins[0][: common_prefix(begins)] if begins else None
    return lengths_n.tolist(), 0 if begin_n is None else len(begin_n)
