"""A queue in which no group of items delays the others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Groups take turns, one item each, in the order in which they came; so do the items of a group.

    Items a1 a2 a3 of one group, then b1 of another: popped as a1 b1 a2 a3. Not safe for several threads.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def push(self, item: T, group: Hashable) -> None:
        """Adds an item at the end of its group."""
        self._groups.setdefault(group, deque()).append(item)

    def pop(self) -> T:
        """Removes the next item. Raises KeyError if there is none."""
        group, items = self._groups.popitem(last=False)
        item = items.popleft()
        if items:
            self._groups[group] = items
        return item

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __iter__(self) -> Iterator[T]:
        for items in self._groups.values():
            yield from items
