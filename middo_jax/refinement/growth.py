"""How much a dataset may grow, and which samples are dropped for additions. Pure functions."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from middo_jax.data.example import Example
from middo_jax.rundir.rows import DroppedRow

Neighbours = Mapping[str, Sequence[tuple[str, float]]]  # by id: (id, similarity), nearest first


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A sample of D_t, or an addition to it, that is not in D_{t+1}."""

    example: Example
    reason: str
    nearest_id: str | None = None
    similarity: float | None = None

    def to_json(self) -> DroppedRow:
        """A row of dropped.jsonl, with the sample and its lineage."""
        return {
            "id": self.example.id,
            "reason": self.reason,
            "nearest_id": self.nearest_id,
            "similarity": self.similarity,
            "example": self.example.to_json(),
        }


def max_size(count: int, growth: Literal["free", "keep"] | float) -> int | None:
    """The maximum size of a dataset of `count` samples after a round; None: any size.

    max_size(1000, "keep") = 1000, max_size(1000, 0.05) = 1050
    """
    if growth == "free":
        return None
    return count + (0 if growth == "keep" else math.floor(count * growth))


def fit(
    before: Sequence[Example],
    merged: Sequence[Example],
    size: int | None,
    selected: Collection[str],
    neighbours: Neighbours,
) -> tuple[list[Example], list[Dropped]]:
    """Reduces a merged dataset to its maximum size.

    The most redundant samples are dropped first: those with the highest similarity to a sample that stays.
    Ties are broken by id. A sample stays if all its known neighbours were dropped, since it represents them.
    Samples that an axis selected in this round and samples that the refiner wrote are not dropped. If there
    are too few others, additions are left out, the last one first.

    Args:
      before: D_t.
      merged: D_t with replacements and additions, additions last.
      size: as `max_size` returns it.
      selected: ids that an axis selected in this round.
      neighbours: of the samples of D_t.

    Returns:
      (the samples that stay, in order; the dropped ones).
    """
    excess = 0 if size is None else max(len(merged) - size, 0)
    known = {example.id for example in before}
    staying = {example.id for example in merged}
    droppable = [e.id for e in merged if e.id in known and e.id not in selected and e.lineage.op == "seed"]
    going = _most_redundant(droppable, excess, staying, neighbours)
    # A replacement does not change the size, so the excess is due to additions, which are at the end.
    refused = {e.id for e in merged[len(merged) - (excess - len(going)) :]} if excess > len(going) else set()
    kept, dropped = [], []
    for example in merged:
        if example.id in going:
            other, similarity = going[example.id]
            reason = f"redundant: {similarity:.3f} similar to {other}"
            dropped.append(Dropped(example, reason, other, similarity))
        elif example.id in refused:
            dropped.append(Dropped(example, "no room: too few redundant samples to drop for it"))
        else:
            kept.append(example)
    return kept, dropped


def _most_redundant(
    droppable: Sequence[str], count: int, staying: Collection[str], neighbours: Neighbours
) -> dict[str, tuple[str, float]]:
    """Up to `count` ids, each with the nearest sample that was not dropped before it."""
    gone: dict[str, tuple[str, float]] = {}

    def nearest(sample: str) -> tuple[str, float] | None:
        present = (pair for pair in neighbours.get(sample, ()) if pair[0] in staying and pair[0] not in gone)
        return next(present, None)

    queue = [(-found[1], sample, found[0]) for sample in droppable if (found := nearest(sample)) is not None]
    heapq.heapify(queue)
    while queue and len(gone) < count:
        similarity, sample, other = heapq.heappop(queue)
        if other not in gone:
            gone[sample] = (other, -similarity)
        elif (found := nearest(sample)) is not None:  # less redundant than before: back into the queue
            heapq.heappush(queue, (-found[1], sample, found[0]))
    return gone
