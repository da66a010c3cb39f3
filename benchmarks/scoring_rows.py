"""What `scoring.py` measures on: rows of wanted lengths, and the least arithmetic that scoring them takes."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.models.config import DecoderConfig
from middo_jax.models.parameters import parameters

SEPARATOR = "\n\n"  # between the texts of joined rows
JOINT = 2  # tokens that a further text adds: a separator in the prompt, one in the response


def join_to(pool: Sequence[Example], sizes: Sequence[int], targets: Sequence[int]) -> list[Example]:
    """Single-turn rows of about the wanted sizes, each the texts of one or several of the pool's rows.

    sizes [5, 3, 2], targets [6, 7]  ->  rows of [5] and [3, 2]

    A row starts with the largest that fits, then the largest that fits the rest, and so on. No text is taken
    twice: rows with a common beginning could be scored for less.

    Args:
      pool: single-turn rows.
      sizes: tokens of their prompts and responses.
      targets: the same of the rows that are made; one smaller than all that is left gets the smallest.

    Raises:
      ValueError: the pool is used up.
    """
    left = sorted(range(len(pool)), key=lambda i: sizes[i])
    rows = []
    for target in targets:
        parts, room = [], target
        while left and (fits := bisect.bisect_right(left, room, key=lambda i: sizes[i]) or int(not parts)):
            parts.append(left.pop(fits - 1))
            room -= sizes[parts[-1]] + JOINT
        if not parts:
            raise ValueError(f"{len(pool)} rows of data are too few for {len(targets)} of these sizes")
        prompt = SEPARATOR.join(pool[i].prompt for i in parts)
        response = SEPARATOR.join(pool[i].response for i in parts)
        rows.append(Example((Message("user", prompt), Message("assistant", response))))
    return rows


def log_normal(count: int, median: float, p99: float) -> np.ndarray:
    """[count] int sizes whose median and 99th percentile are those of a log-normal distribution, shuffled.

    They are its own quantiles, so that few rows have its tail too; the ends, which it has not, are drawn in.
    Fewer than a hundred have no 99th percentile, and miss it.
    """
    normal = statistics.NormalDist()
    sigma = np.log(p99 / median) / normal.inv_cdf(0.99)
    at_n = np.linspace(0, 1, count).clip(0.5 / count, 1 - 0.5 / count)
    sizes = np.rint(median * np.exp(sigma * np.vectorize(normal.inv_cdf)(at_n))).astype(int)
    return np.random.default_rng(0).permutation(sizes)


def forward_flops(config: DecoderConfig, tokens: int, targets: int) -> int:
    """Multiplications and additions of a forward pass over one row, those of matrix products only.

    2 x the layers' matrix elements a token, 4 x query width a pair of positions that attend to each other,
    2 x vocabulary x width a target. Norms, rotations and the like are not counted, nor is padding.
    """
    matrices = sum(spec.size(config) for spec in parameters(config) if len(spec.axes) == 3)
    kinds = [config.kinds[i] for i in config.kind_of_layer] or [config.kinds[0]] * config.num_layers
    pairs = 0
    for kind in kinds:
        seen = min(tokens, kind.window or tokens)  # positions that the last one sees, itself included
        pairs += seen * (seen + 1) // 2 + (tokens - seen) * seen
    attention = 4 * config.num_heads * config.head_dim * pairs
    return 2 * matrices * tokens + attention + 2 * config.vocab_size * config.hidden_size * targets
