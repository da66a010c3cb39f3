"""Quality: the model rates its own training data; the expected rating, in one prefill, nothing decoded.

Six ratings a sample: three dimensions, each of the prompt and of the response. The three ratings of one text
are one tree: the text is the stem, read once, and each question is a branch that sees stem and itself only.
Axes: b row, t position, s tree within a row, r reading (position whose next token is looked at), n sample.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from middo_jax.data.example import Example, Message
from middo_jax.data.packing import fill_rows, plan_buckets, segment_ids
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.diagnose.rubrics import ANSWER_STEM, COLUMNS, DIMENSIONS, PARTS, Part, judge_message
from middo_jax.models.decoder import Decoder
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.parallel.mesh import batch_divisor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATINGS = np.arange(11)  # "0" .. "10"
MIN_TREE = 64  # tokens a tree takes in the plan: its questions alone are longer


class JudgeError(ValueError):
    """The tokenizer spells the ratings in a way that one prefill cannot read."""


@dataclasses.dataclass(frozen=True)
class RatingTokens:
    """How a tokenizer spells "0".."10" after the answer's first words.

    Attributes:
      stem: tokens of the answer that all ratings share.
      first: [11] the token that follows it; "10" has that of "1" where it is two tokens.
      ten_second: the second token of "10" where it has one, else None.
    """

    stem: tuple[int, ...]
    first: tuple[int, ...]
    ten_second: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RatingTokens:
        """Reads them off the tokenizer.

        Raises:
          JudgeError: the ratings are neither eleven single tokens nor ten and a two-token "10".
        """
        spelt = [tokenizer(f"{ANSWER_STEM}{n}", add_special_tokens=False).input_ids for n in RATINGS]
        stem = _common_prefix(spelt)
        tails = [ids[len(stem) :] for ids in spelt]
        first = tuple(tail[0] for tail in tails if tail)
        if all(len(tail) == 1 for tail in tails) and len(set(first)) == 11:
            return cls(tuple(stem), first, None)
        one_each = all(len(tail) == 1 for tail in tails[:10]) and len(set(first[:10])) == 10
        if one_each and len(tails[10]) == 2 and tails[10][0] == first[1]:
            return cls(tuple(stem), first, tails[10][1])
        raise JudgeError(
            "quality: this tokenizer spells the ratings 0..10 neither as one token each nor with a 10 of two "
            "tokens that starts as 1 does; set quality.method=sample"
        )


@dataclasses.dataclass(frozen=True)
class RatingTree:
    """One text and its three questions. Each reading is a position whose next token tells.

    Attributes:
      tokens_n: stem, then the branches one after the other.
      branch_ids_n: 0 for the stem, 1.. for the branches.
      positions_n: every branch goes on where the stem ends.
      readings: per dimension where the rating comes next; then, where "10" is two tokens, per dimension the
        position of the "1" after it.
    """

    tokens_n: np.ndarray
    branch_ids_n: np.ndarray
    positions_n: np.ndarray
    readings: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens_n)


def rating_tree(
    example: Example,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    ratings: RatingTokens,
    max_length: int,
) -> RatingTree:
    """The three questions about one part of a sample, sharing every token up to where they differ.

    A text too long for `max_length` is shortened in the sample, never in the question; prompt and response
    share the room, and each keeps its beginning and end.

    Raises:
      JudgeError: the questions alone are over `max_length`.
    """
    prompt, response = example.prompt, example.response if part == "response" else ""
    one = ratings.first[1:2] if ratings.ten_second is not None else ()

    def branches() -> list[np.ndarray]:
        messages = [judge_message(dimension, part, prompt, response) for dimension in DIMENSIONS]
        asked = [tokenize_prompt([Message("user", text)], tokenizer) for text in messages]
        return [np.r_[tokens, ratings.stem, one].astype(np.int32) for tokens in asked]

    sequences = branches()
    originals = [(text, _offsets(text, tokenizer)) for text in (prompt, response)]
    shorter_one = min(len(offsets) for _, offsets in originals)
    room = sum(len(offsets) for _, offsets in originals)
    while (excess := max(map(len, sequences)) - max_length) > 0:
        room -= excess
        if room < 0:
            raise JudgeError(
                f"quality: a question takes {max(map(len, sequences))} tokens, over model.max_length="
                f"{max_length}; raise it, or leave this axis out"
            )
        share = max(room // 2, room - shorter_one)  # of each text; what one does not need goes to the other
        prompt, response = (_shorten(text, offsets, share) for text, offsets in originals)
        sequences = branches()

    stem = len(_common_prefix([sequence.tolist() for sequence in sequences]))
    stem = min(stem, *(len(s) - len(one) - 1 for s in sequences))  # readings lie in the branches
    tails = [sequence[stem:] for sequence in sequences]
    last = (stem + np.cumsum([len(tail) for tail in tails]) - 1).tolist()
    positions = [np.arange(stem), *(np.arange(stem, len(sequence)) for sequence in sequences)]
    return RatingTree(
        tokens_n=np.concatenate([sequences[0][:stem], *tails]),
        branch_ids_n=np.repeat(np.arange(len(tails) + 1, dtype=np.int32), [stem, *map(len, tails)]),
        positions_n=np.concatenate(positions).astype(np.int32),
        readings=tuple([i - 1 for i in last] + last if one else last),
    )


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded.offset_mapping


def _shorten(text: str, offsets: Sequence[tuple[int, int]], kept: int) -> str:
    """Keeps some `kept` tokens of a text: beginning and end, which say most about it."""
    if len(offsets) <= kept:
        return text
    head, tail = kept - kept // 2, kept // 2
    before = text[: offsets[head - 1][1]] if head else ""
    after = text[offsets[len(offsets) - tail][0] :] if tail else ""
    return f"{before} … {after}"


class JudgeBatch(NamedTuple):
    """Packed trees; `reading_bsr` holds positions within the row, 0 where there is no tree."""

    tokens_bt: np.ndarray
    segment_ids_bt: np.ndarray
    positions_bt: np.ndarray
    branch_ids_bt: np.ndarray
    reading_bsr: np.ndarray


def pack_trees(
    trees: Sequence[RatingTree], rows: Sequence[Sequence[int]], batch: int, length: int, max_trees: int
) -> JudgeBatch:
    """Fills one batch from planned rows of tree indices."""

    def fill(values: Callable[[RatingTree], np.ndarray]) -> np.ndarray:
        return fill_rows([[values(trees[i]) for i in row] for row in rows], batch, length)

    reading_bsr = np.zeros((batch, max_trees, len(trees[0].readings)), np.int32)
    for b, row in enumerate(rows):
        starts = np.cumsum([0, *(len(trees[i]) for i in row)])
        for s, i in enumerate(row):
            reading_bsr[b, s] = starts[s] + np.asarray(trees[i].readings)
    return JudgeBatch(
        fill(lambda tree: tree.tokens_n),
        segment_ids([[len(trees[i]) for i in row] for row in rows], batch, length),
        fill(lambda tree: tree.positions_n),
        fill(lambda tree: tree.branch_ids_n),
        reading_bsr,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "ratings"))
def judge_batch(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array,
    positions_bt: jax.Array,
    branch_ids_bt: jax.Array,
    reading_bsr: jax.Array,
    *,
    ratings: RatingTokens,
) -> jax.Array:
    """Expected rating [b, s, dimension] in float32 of every tree; meaningless where there is none."""
    model = nnx.merge(graphdef, params)
    hidden_btd = model.hidden(tokens_bt, segment_ids_bt, positions_bt, branch_ids_bt)

    def one_tree(reading_br: jax.Array) -> jax.Array:
        hidden_brd = jnp.take_along_axis(hidden_btd, reading_br[..., None], axis=1)
        return expected_rating(model, hidden_brd, ratings)

    return jax.lax.map(one_tree, reading_bsr.swapaxes(0, 1)).swapaxes(0, 1)


def expected_rating(model: Decoder, hidden_brd: jax.Array, ratings: RatingTokens) -> jax.Array:
    """Sum of n P(n) over the ratings 0..10 under the model's own probabilities, normalised over these eleven.

    Where "10" is the token of "1" and one more, P(10) = P("1") P(second | "1") and
    P(1) = P("1") (1 - P(second | "1")): exact, and all in one prefill, since the "1" was read too.

    Args:
      model: whose `unembed` is used.
      hidden_brd: of the readings: [b, dimensions, d], or with a two-token "10" [b, 2 dimensions, d].
      ratings: the tokens.

    Returns:
      [b, dimensions] float32.
    """
    b, r, d = hidden_brd.shape
    logits_brv = model.unembed(hidden_brd.reshape(b * r, d)).reshape(b, r, -1)
    count = len(DIMENSIONS)
    log_p = logits_brv[:, :count, jnp.asarray(ratings.first)]  # up to the constant that the mean divides out
    if ratings.ten_second is not None:
        after_one = jax.nn.log_softmax(logits_brv[:, count:], axis=-1)[..., ratings.ten_second]
        log_p = log_p.at[..., 1].add(jnp.log1p(-jnp.exp(after_one))).at[..., 10].add(after_one)
    return jax.nn.softmax(log_p, axis=-1) @ jnp.asarray(RATINGS, jnp.float32)


def judge(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mesh: Mesh,
    max_length: int,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Six expected ratings of every example: [n, 6] float32, columns as `rubrics.COLUMNS`."""
    ratings = RatingTokens.of(tokenizer)
    trees = [rating_tree(e, part, tokenizer, ratings, max_length) for e in examples for part in PARTS]
    score_np = np.full((len(trees), len(DIMENSIONS)), np.nan, np.float32)
    done = 0

    def keep(rows: list[list[int]], expected: jax.Array) -> None:
        nonlocal done
        expected_bsd = to_host(expected)
        for b, row in enumerate(rows):
            score_np[row] = expected_bsd[b, : len(row)]
            done += len(row)
        if on_progress is not None:
            on_progress(done // len(PARTS), len(examples))

    running: tuple[list[list[int]], jax.Array] | None = None
    buckets = plan_buckets(list(map(len, trees)), batch_tokens, batch_divisor(mesh), min_length=MIN_TREE)
    with jax.set_mesh(mesh):
        for bucket in buckets:
            for rows in bucket.batches():
                batch = pack_trees(trees, rows, bucket.batch, bucket.length, bucket.length // MIN_TREE)
                arrays = [to_mesh(mesh, array, "batch", *(None,) * (array.ndim - 1)) for array in batch]
                expected = judge_batch(graphdef, params, *arrays, ratings=ratings)
                if running is not None:
                    keep(*running)
                running = rows, expected
        if running is not None:
            keep(*running)
    score_npd = score_np.reshape(len(examples), len(PARTS), len(DIMENSIONS))
    return score_npd.swapaxes(1, 2).reshape(len(examples), len(COLUMNS))  # dimension by part, as COLUMNS


def quality(ratings_n6: np.ndarray) -> np.ndarray:
    """q_n: mean over the dimensions of (prompt + response) / 2, hence the mean of all six."""
    return ratings_n6.mean(axis=1)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    prefix = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return prefix
