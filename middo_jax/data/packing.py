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

ATTENTION_LENGTH = 4096  # see `_cheapest`


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
      max_segments: examples a row may hold.
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
    """Examples of similar length, packed into rows of one length: one compiled shape.

    Attributes:
      length: tokens of a row.
      batch: rows of a batch.
      rows: the plan, indices into the lengths that were given.
    """

    length: int
    batch: int
    rows: list[list[int]]

    def batches(self) -> Iterator[list[list[int]]]:
        """The plan in batches; the last may be short."""
        for start in range(0, len(self.rows), self.batch):
            yield self.rows[start : start + self.batch]


def plan_buckets(
    lengths: Sequence[int], batch_tokens: int, divisor: int = 1, smallest: int = 256, min_length: int = 8
) -> list[Bucket]:
    """Packs examples for scoring, where order does not matter, into few shapes with little padding.

    A bucket takes the examples of up to `smallest`, 2 `smallest`, 4 `smallest`... tokens, so that short ones
    lie in short rows, where little attention is spent between strangers. Its row length is whichever costs
    least (see `_cheapest`). A bucket with less than a batch joins the next one. Longest first, which fills
    rows well and shows an out-of-memory at once.

    Args:
      lengths: tokens of each example.
      batch_tokens: tokens of a batch, all devices together.
      divisor: rows of a batch are a multiple of it (devices that share the batch).
      smallest: the shortest row.
      min_length: a row holds at most length / min_length examples.
    """
    buckets: list[Bucket] = []
    pending: list[int] = []
    remaining = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bound = smallest
    while remaining or pending:
        while remaining and lengths[remaining[-1]] <= bound:
            pending.append(remaining.pop())
        if pending:
            longest_first = pending[::-1]
            length, plan = _cheapest([lengths[i] for i in longest_first], bound, min_length)
            batch = divisor * max(1, batch_tokens // length // divisor)
            if not remaining or len(plan) >= batch:
                batches = -(-len(plan) // batch)
                batch = divisor * -(-len(plan) // batches // divisor)  # the last one is as full as the others
                buckets.append(Bucket(length, batch, [[longest_first[j] for j in row] for row in plan]))
                pending = []
        bound *= 2
    return buckets


def _cheapest(lengths: Sequence[int], bound: int, min_length: int) -> tuple[int, list[list[int]]]:
    """The row length, from `bound` to four times it, whose rows cost least, and the plan.

    Longer rows leave less room empty, but spend attention between strangers: a position costs as if a row of
    ATTENTION_LENGTH tokens doubled it, which is about what small models on a CPU measure.
    """

    def cost(length: int, plan: list[list[int]]) -> float:
        return len(plan) * length * (1 + length / ATTENTION_LENGTH)

    candidates = [bound * quarters // 4 for quarters in (4, 5, 6, 7, 8, 12, 16)]
    plans = [(length, best_fit(lengths, length, length // min_length)) for length in candidates]
    return min(plans, key=lambda candidate: cost(*candidate))


def best_fit(lengths: Sequence[int], capacity: int, max_segments: int) -> list[list[int]]:
    """Puts each length, in the given order, into the row that it leaves the least room in. O(N log N).

    lengths [5, 4, 3, 3], capacity 8  ->  [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(rooms, (length, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if room > length and len(rows[row]) < max_segments:
            bisect.insort(rooms, (room - length, row))
    return rows
