"""What a training needs to know of all its examples, also in a process that does not have all tokens.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.lazy import Lazy
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.parallel.hosts import gather_rows

_DIGEST_BYTES = 16
_NUMBERS = 4  # besides the digest


class ExampleFacts(NamedTuple):
    """Facts of n examples, in their order.

    Attributes:
      ids: IDs of the examples.
      length_n: int32, number of tokens.
      n_targets_n: int32, number of tokens to learn. The first token is none: nothing precedes it.
      highest_n: int32, highest token ID; -1 without tokens.
      truncated_n: bool, whether tokens were left out.
      digests: hash of each example's tokens and targets.
    """

    ids: Sequence[str]
    length_n: np.ndarray
    n_targets_n: np.ndarray
    highest_n: np.ndarray
    truncated_n: np.ndarray
    digests: Sequence[bytes]

    @classmethod
    def of(cls, tokenized: Sequence[TokenizedExample]) -> ExampleFacts:
        """The facts of examples. Of `Lazy` ones each process reads its share, so all must call it."""
        own = tokenized.share if isinstance(tokenized, Lazy) else tokenized
        rows = np.array([_row(example) for example in own], np.int32)
        rows = rows.reshape(len(own), _NUMBERS + _DIGEST_BYTES // 4)
        if isinstance(tokenized, Lazy):
            ids, rows = tokenized.ids, gather_rows("facts", tokenized.own, rows, len(tokenized))
        else:
            ids = [example.id for example in tokenized]
        length_n, n_targets_n, highest_n, truncated_n = rows[:, :_NUMBERS].T
        digests = [row.tobytes() for row in rows[:, _NUMBERS:].astype("<i4")]
        return cls(ids, length_n, n_targets_n, highest_n, truncated_n > 0, digests)


def _row(example: TokenizedExample) -> list[int]:
    digest = hashlib.blake2b(example.tokens_n.astype("<i4").tobytes(), digest_size=_DIGEST_BYTES)
    digest.update(np.packbits(example.is_target_n).tobytes())
    highest = int(example.tokens_n.max(initial=-1))
    numbers = [len(example), int(example.is_target_n[1:].sum()), highest, int(example.truncated)]
    return [*numbers, *np.frombuffer(digest.digest(), "<i4").tolist()]
