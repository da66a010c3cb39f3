"""Packs examples into batches of a fixed shape; each token keeps the number of its example.

The plan is made on the host from the lengths alone. A batch depends on its index only, not on the number of
processes or on the batches before it. Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.tokenize import TokenizedExample

ROW = 1024  # tokens per row for scoring: long enough to be filled well
SHORTEST_ROW = 256  # for datasets with few tokens
SHORTEST_REACH = 128  # the block size of attention


class PackedBatch(NamedTuple):
    """Rows of several examples each.

    tokens [10 11 12 | 20 21 | 0]  ->  segment_ids [0 0 0 1 1 -1], positions [0 1 2 0 1 0]

    Attributes:
      tokens_bt: int32, 0 in the padding.
      segment_ids_bt: int32, the number of the example within its row, -1 in the padding.
      positions_bt: int32, the position within the example.
      is_target_bt: bool; the NEXT token, of the same example, is learnt.
      in_prompt_bt: bool; this token belongs to the user's prompt.
      example_bs: int32, index of each segment's example in the list of examples, -1 for no segment.
    """

    tokens_bt: np.ndarray
    segment_ids_bt: np.ndarray
    positions_bt: np.ndarray
    is_target_bt: np.ndarray
    in_prompt_bt: np.ndarray
    example_bs: np.ndarray


def first_fit(
    lengths: Sequence[int], capacity: int, max_segments: int, open_rows: int = 64
) -> list[list[int]]:
    """Puts each length, in the given order, into the first row that can still take it.

    lengths [5, 3, 4, 2], capacity 8  ->  [[0, 1], [2, 3]]

    Args:
      lengths: tokens of each example; none may exceed the capacity.
      capacity: tokens per row.
      max_segments: maximum number of examples per row.
      open_rows: maximum number of open rows; beyond it the oldest is closed. This keeps the plan O(N) and
        each example near its place in the given order.

    Returns:
      Rows of indices into `lengths`, in the order in which they were opened.

    Raises:
      ValueError: a length exceeds the capacity.
    """
    rows: list[list[int]] = []
    open_slots: list[list[int]] = []  # [row, tokens left] of the open rows, oldest first
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit a row of {capacity}")
        for slot in open_slots:
            if slot[1] >= length and len(rows[slot[0]]) < max_segments:
                rows[slot[0]].append(index)
                slot[1] -= length
                break
        else:
            open_slots.append([len(rows), capacity - length])
            rows.append([index])
            if len(open_slots) > open_rows:
                open_slots.pop(0)
    return rows


def pack(
    examples: Sequence[TokenizedExample],
    rows: Sequence[Sequence[int]],
    batch: int,
    length: int,
    max_segments: int,
) -> PackedBatch:
    """Fills one batch from planned rows; rows beyond the plan are padding only.

    Args:
      examples: the examples to which the plan's indices refer.
      rows: at most `batch` rows of indices.
      batch: rows per batch.
      length: tokens per row.
      max_segments: segments per row, the static size of axis s.
    """

    def fill(values: Callable[[TokenizedExample], np.ndarray], dtype: type = np.int32) -> np.ndarray:
        of_rows = [[values(examples[i]) for i in row] for row in rows]
        return fill_rows(of_rows, batch, length, dtype=np.dtype(dtype))

    return PackedBatch(
        tokens_bt=fill(lambda e: e.tokens_n),
        segment_ids_bt=segment_ids([[len(examples[i]) for i in row] for row in rows], batch, length),
        positions_bt=fill(lambda e: np.arange(len(e), dtype=np.int32)),
        is_target_bt=fill(lambda e: np.append(e.is_target_n[1:], False), bool),
        in_prompt_bt=fill(lambda e: e.in_prompt_n, bool),
        example_bs=fill_rows([[np.asarray(row, np.int32)] for row in rows], batch, max_segments, -1),
    )


def fill_rows(
    rows: Sequence[Sequence[np.ndarray]],
    batch: int,
    length: int,
    padding: int = 0,
    dtype: np.dtype | None = None,
) -> np.ndarray:
    """Concatenates and pads each row's arrays: [batch, length] of their dtype.

    Without any array it is of `dtype`; None is int32.
    """
    found = next((array.dtype for row in rows for array in row), dtype or np.dtype(np.int32))
    filled_bt = np.full((batch, length), padding, found)
    for b, row in enumerate(rows):
        start = 0
        for array in row:
            filled_bt[b, start : start + len(array)] = array
            start += len(array)
    return filled_bt


def segment_ids(rows: Sequence[Sequence[int]], batch: int, length: int) -> np.ndarray:
    """[batch, length] int32 from the lengths of each row's segments: 0, 1, ... and -1 in the padding."""
    parts = [[np.full(n, s, np.int32) for s, n in enumerate(row)] for row in rows]
    return fill_rows(parts, batch, length, -1)


class Bucket(NamedTuple):
    """Rows of one length whose examples have similar lengths: one compiled shape.

    Attributes:
      length: tokens per row.
      longest: upper bound of the length of an example, and hence of how far back attention looks.
      batch: rows per batch.
      rows: the plan: indices into the given lengths.
    """

    length: int
    longest: int
    batch: int
    rows: list[list[int]]

    def batches(self) -> Iterator[list[list[int]]]:
        """The plan in batches; the last may be short."""
        for start in range(0, len(self.rows), self.batch):
            yield self.rows[start : start + self.batch]


def plan_buckets(
    lengths: Sequence[int], batch_tokens: int, divisor: int = 1, *, prefix: int = 0, min_length: int = 8
) -> list[Bucket]:
    """Packs examples for scoring, where order does not matter, into few shapes with little padding.

    Rows have ROW tokens; only examples that do not fit get longer rows. Best fit, longest examples first, so
    that short examples fill the ends of rows. Rows are then grouped by the length of their longest example,
    rounded up to a power of two; less than a batch of rows joins the next longer group. The longest group
    comes first, so that an out-of-memory error appears at once.

    Args:
      lengths: tokens of each example, without the prefix.
      batch_tokens: tokens per batch, over all devices.
      divisor: the number of rows per batch is a multiple of it (the devices that share a batch).
      prefix: tokens at the start of every row that all its examples share.
      min_length: a row contains at most length / min_length examples.
    """
    row = max(ROW, 8 * _power_of_two(prefix))
    while row > max(SHORTEST_ROW, 2 * prefix) and divisor * row > min(batch_tokens, sum(lengths)):
        row //= 2
    groups: dict[int, dict[int, list[list[int]]]] = {}  # by length, by longest example
    for length, examples in _best_fit(lengths, row, prefix, min_length):
        longest = max(SHORTEST_REACH, _power_of_two(max(lengths[i] for i in examples)))
        groups.setdefault(length, {}).setdefault(longest, []).append(examples)
    buckets: list[Bucket] = []
    for length, by_longest in sorted(groups.items()):
        most = divisor * max(1, batch_tokens // length // divisor)
        left: list[list[int]] = []
        for longest, rows in sorted(by_longest.items()):
            rows = rows + left
            left = [] if longest == max(by_longest) else rows[len(rows) // most * most :]
            if rows := rows[: len(rows) - len(left)]:
                buckets.append(Bucket(length, longest, _batch(len(rows), most, divisor), rows))
    return buckets[::-1]


def _batch(rows: int, most: int, divisor: int) -> int:
    """The batch size between half the maximum and the maximum that leaves the fewest rows empty."""
    largest = min(most, divisor * -(-rows // divisor))
    candidates = range(largest, max(divisor, largest // 2) - 1, -divisor)
    return min(candidates, key=lambda batch: -rows % batch)


def _best_fit(lengths: Sequence[int], row: int, prefix: int, min_length: int) -> list[tuple[int, list[int]]]:
    """Best fit: puts each length, longest first, into the row that it fills best. O(N log N).

    A length over `row` tokens opens a row of twice the next power of two, so that two or more can share it.

    lengths [5, 4, 3, 3], row 8  ->  [(8, [0, 2]), (8, [1, 3])]

    Returns:
      Tokens of each row, and the indices of its examples.
    """
    rows: list[tuple[int, list[int]]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            total = row if length + prefix <= row else 2 * _power_of_two(length + prefix)
            left, number = total - prefix, len(rows)
            rows.append((total, []))
        else:
            left, number = free.pop(at)
        total, examples = rows[number]
        examples.append(index)
        if left > length and len(examples) < total // min_length:
            bisect.insort(free, (left - length, number))
    return rows


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
