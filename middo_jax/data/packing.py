"""Examples -> fixed-shape packed batches in which every token still knows whose it is.

Planned on the host from the lengths alone, deterministically: a batch is a function of its index, not of how
many processes there are or what was read before. Axes: b row, t position, s segment within a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from middo_jax.data.tokenize import TokenizedExample

ROW = 1024  # tokens of a row for scoring: long enough to be filled well
SHORTEST_ROW = 256  # where there is little to score
SHORTEST_REACH = 128  # attention works in blocks of as many


class PackedBatch(NamedTuple):
    """Rows of several examples each.

    tokens [10 11 12 | 20 21 | 0]  ->  segment_ids [0 0 0 1 1 -1], positions [0 1 2 0 1 0]

    Attributes:
      tokens_bt: int32, 0 in the padding.
      segment_ids_bt: int32, the example's number within its row, -1 in the padding.
      positions_bt: int32, within the example.
      is_target_bt: bool; the NEXT token, of the same example, is learnt.
      in_prompt_bt: bool; this token is of the user's prompt.
      example_bs: int32, index of each segment's example in the list that was packed, -1 where there is none.
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
    """Puts each length, in the given order, into the first row that still has room for it.

    lengths [5, 3, 4, 2], capacity 8  ->  [[0, 1], [2, 3]]

    Args:
      lengths: tokens of each example; none may exceed the capacity.
      capacity: tokens of a row.
      max_segments: most examples of a row.
      open_rows: rows looked at; the oldest is closed when there are more, which keeps the plan O(N) and
        an example near where the order put it.

    Returns:
      Rows of indices into `lengths`, in the order in which they were opened.

    Raises:
      ValueError: a length is over the capacity.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []  # [row, tokens left] of the open rows, oldest first
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit a row of {capacity}")
        for slot in room:
            if slot[1] >= length and len(rows[slot[0]]) < max_segments:
                rows[slot[0]].append(index)
                slot[1] -= length
                break
        else:
            room.append([len(rows), capacity - length])
            rows.append([index])
            if len(room) > open_rows:
                room.pop(0)
    return rows


def pack(
    examples: Sequence[TokenizedExample],
    rows: Sequence[Sequence[int]],
    batch: int,
    length: int,
    max_segments: int,
) -> PackedBatch:
    """Fills one batch from planned rows; rows beyond the plan are all padding.

    Args:
      examples: what the plan's indices point to.
      rows: at most `batch` rows of indices.
      batch: rows of the batch.
      length: tokens of a row.
      max_segments: segments of a row, the static size of axis s.
    """

    def fill(values: Callable[[TokenizedExample], np.ndarray], padding: int = 0) -> np.ndarray:
        return fill_rows([[values(examples[i]) for i in row] for row in rows], batch, length, padding)

    return PackedBatch(
        tokens_bt=fill(lambda e: e.tokens_n),
        segment_ids_bt=segment_ids([[len(examples[i]) for i in row] for row in rows], batch, length),
        positions_bt=fill(lambda e: np.arange(len(e), dtype=np.int32)),
        is_target_bt=fill(lambda e: np.append(e.is_target_n[1:], False)),
        in_prompt_bt=fill(lambda e: e.in_prompt_n),
        example_bs=fill_rows([[np.asarray(row, np.int32)] for row in rows], batch, max_segments, -1),
    )


def fill_rows(rows: Sequence[Sequence[np.ndarray]], batch: int, length: int, padding: int = 0) -> np.ndarray:
    """Concatenates each row's arrays and pads it: [batch, length] of their dtype, else int32."""
    dtype = next((array.dtype for row in rows for array in row), np.dtype(np.int32))
    filled_bt = np.full((batch, length), padding, dtype)
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
    """Rows of one length whose examples are of similar length: one compiled shape.

    Attributes:
      length: tokens of a row.
      longest: no example of its rows is longer, which bounds how far back attention has to look.
      batch: rows of a batch.
      rows: the plan, indices into the lengths that were given.
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

    All lie in rows of ROW tokens, but for those that need longer ones; each in the row it leaves the least
    room in, longest first, so that short ones fill what long ones leave. Rows are then grouped by their
    longest example, to powers of two, and what is less than a batch joins the next longer group. The longest
    come first, which shows an out-of-memory at once.

    Args:
      lengths: tokens of each example, without the prefix.
      batch_tokens: tokens of a batch, all devices together.
      divisor: rows of a batch are a multiple of it (devices that share the batch).
      prefix: tokens that stand once at the start of every row, for all its examples.
      min_length: a row holds at most length / min_length examples.
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
    """The largest batch, from half of the largest to that, that leaves the fewest rows empty."""
    largest = min(most, divisor * -(-rows // divisor))
    candidates = range(largest, max(divisor, largest // 2) - 1, -divisor)
    return min(candidates, key=lambda batch: -rows % batch)


def _best_fit(lengths: Sequence[int], row: int, prefix: int, min_length: int) -> list[tuple[int, list[int]]]:
    """Puts each length, longest first, into the row that it leaves the least room in. O(N log N).

    What is too long for a row of `row` tokens opens one of twice the next power of two, which two or more
    such share.

    lengths [5, 4, 3, 3], row 8  ->  [(8, [0, 2]), (8, [1, 3])]

    Returns:
      Tokens of each row, and the indices of its examples.
    """
    rows: list[tuple[int, list[int]]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            total = row if length + prefix <= row else 2 * _power_of_two(length + prefix)
            room, number = total - prefix, len(rows)
            rows.append((total, []))
        else:
            room, number = rooms.pop(at)
        total, examples = rows[number]
        examples.append(index)
        if room > length and len(examples) < total // min_length:
            bisect.insort(rooms, (room - length, number))
    return rows


def _power_of_two(n: int) -> int:
    """The least that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
