"""The amounts of a run: rows and their lengths, batches of each pass, steps, and the refiner's tokens.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from middo_jax.config import Config, ConfigError, Threshold
from middo_jax.config.axes import Fraction
from middo_jax.config.axis_table import axis, scored_axes, threshold_of
from middo_jax.data.packing import Bucket, first_fit, plan_buckets
from middo_jax.data.trees import common_prefix, trie
from middo_jax.passes.loss_plan import MIN_LENGTH
from middo_jax.passes.ratings import MIN_TREE
from middo_jax.signals.judge.rubrics import DIMENSIONS, PARTS, judge_message

SAMPLE = 20_000  # rows that are packed; the others are assumed to be like them
TARGET_SHARE = 0.55  # of the tokens of Alpaca's rendered conversations
SIGMA = 0.7  # of log length: the 99th percentile of Alpaca's lengths is four times their mean
CHARACTERS = 4  # per token


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Rows of a dataset.

    Attributes:
      rows: number of rows.
      lengths_n: tokens of the rows, or of a sample of them.
      target_share: share of the tokens that are targets.
      source: where the numbers are from, for the user.
    """

    rows: int
    lengths_n: np.ndarray
    target_share: float
    source: str

    @classmethod
    def of_lengths(cls, lengths_n: np.ndarray, n_targets: int, source: str) -> Amounts:
        """The amounts of a tokenized dataset."""
        rows, total = len(lengths_n), int(lengths_n.sum())
        if rows > SAMPLE:
            lengths_n = np.random.default_rng(0).choice(lengths_n, SAMPLE, replace=False)
        return cls(rows, lengths_n, n_targets / max(total, 1), source)

    @classmethod
    def assumed(cls, rows: int, tokens: float, max_length: int) -> Amounts:
        """Log-normal lengths with a mean of `tokens`, cut at `max_length`."""
        ranks_n = (np.arange(min(rows, SAMPLE)) + 0.5) / min(rows, SAMPLE)
        sorted_n = np.sort(np.random.default_rng(0).standard_normal(len(ranks_n)))
        lengths_n = tokens * np.exp(SIGMA * sorted_n - SIGMA**2 / 2)
        cut_n = np.clip(np.round(lengths_n), 2, max_length).astype(np.int64)
        said = f"{rows} rows of {tokens:g} tokens on average, log-normal; {TARGET_SHARE:.0%} are targets"
        return cls(rows, cut_n, TARGET_SHARE, said)

    @property
    def scale(self) -> float:
        """Rows per row of the sample."""
        return self.rows / len(self.lengths_n)

    @property
    def tokens(self) -> float:
        """Tokens of all rows."""
        return float(self.lengths_n.sum()) * self.scale


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of one shape, and how many there are."""

    bucket: Bucket
    count: float


def batch_tokens_of(config: Config) -> int:
    """`scoring.batch_tokens` as a number.

    Raises:
      ConfigError: it is still `auto`.
    """
    if config.scoring.batch_tokens == "auto":
        raise ConfigError("config: scoring.batch_tokens=auto was not replaced by a number")
    return config.scoring.batch_tokens


def scoring_batches(amounts: Amounts, config: Config, ways: int) -> list[Batches]:
    """The batches of a scoring pass, most positions first."""
    return _batches(amounts.lengths_n.tolist(), amounts.scale, batch_tokens_of(config), ways, 0, MIN_LENGTH)


def rating_batches(amounts: Amounts, config: Config, ways: int) -> tuple[list[Batches], int]:
    """(the batches of the ratings, tokens of the prefix that all trees share)."""
    prefix, fixed, per_token = tree_size()
    trees_n = np.round(fixed + per_token * amounts.lengths_n).astype(np.int64)
    trees_n = np.minimum(trees_n, len(PARTS) * len(DIMENSIONS) * config.model.max_length)
    tokens = batch_tokens_of(config)
    return _batches(trees_n.tolist(), amounts.scale, tokens, ways, prefix, MIN_TREE), prefix


def _batches(
    lengths: Sequence[int], scale: float, batch_tokens: int, ways: int, prefix: int, min_length: int
) -> list[Batches]:
    buckets = plan_buckets(lengths, batch_tokens, ways, prefix=prefix, min_length=min_length)
    found = [Batches(bucket, scale * len(bucket.rows) / bucket.batch) for bucket in buckets]
    return sorted(found, key=lambda b: -b.count * b.bucket.batch * b.bucket.length)


def tree_size() -> tuple[int, float, float]:
    """The size of a tree of ratings, in tokens: of its prefix, of its other texts, and per sample's token.

    From the questions' text, at four characters per token; the sample is half prompt and half response.
    """

    def tree(characters: int) -> tuple[int, int]:
        prompt, response = "p" * (characters // 2), "r" * (characters // 2)
        texts = [
            np.frombuffer(judge_message(dimension, part, prompt, response).encode(), np.uint8)
            for part in PARTS
            for dimension in DIMENSIONS
        ]
        return len(trie(texts)[0].tokens_n), common_prefix(texts)

    small, large = 400, 4000
    (size, prefix), (larger, _) = tree(small), tree(large)
    per_character = (larger - size) / (large - small)
    prefix -= small // 2  # the prompt follows the opening, and is not shared by all rows
    fixed = size - per_character * small - prefix
    return max(0, prefix // CHARACTERS), fixed / CHARACTERS, per_character


def training_steps(amounts: Amounts, config: Config) -> int:
    """Optimizer steps of one training."""
    settings = config.train
    lengths = np.random.default_rng(0).permutation(amounts.lengths_n).tolist()
    length = config.model.max_length
    rows = len(first_fit(lengths, length, length)) * amounts.scale
    steps = math.ceil(rows / settings.batch_size)
    if settings.examples_per_step is not None:
        steps = max(steps, math.ceil(amounts.rows / settings.examples_per_step))
    return steps * settings.num_epochs


def selected_share(threshold: Threshold) -> float:
    """Share of the rows that an axis selects; with `m`, that of a normal distribution beyond m deviations."""
    if isinstance(threshold, Fraction):
        return threshold.fraction
    return 0.5 * math.erfc(threshold.m / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Refining:
    """The refiner's work in a round: rewritten rows, requests, prompt tokens and completion tokens."""

    rows: float
    requests: float
    prompt_tokens: float
    completion_tokens: float


def refining(amounts: Amounts, config: Config) -> Refining:
    """The first attempts of a round; a rewrite is assumed to be as long as its original.

    Each selected row takes two requests, one for the prompt and one for the response. The instructions are
    taken to have 400 tokens.
    """
    share = sum(
        selected_share(threshold_of(config, name))
        for name in scored_axes(config)
        if axis(name).op is not None
    )
    rows = amounts.rows * min(share, 1.0)
    length = amounts.tokens / max(amounts.rows, 1)
    shown = 2 if config.refine.show_response else 1
    return Refining(rows, 2 * rows, rows * (400 + shown * length), rows * length)
