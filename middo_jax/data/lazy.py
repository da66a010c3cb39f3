"""Sequences whose values are made when they are read, so that a process has only those that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """What is made of examples, such as their tokens, each value when it is first read.

    Attributes:
      ids: IDs of the examples.
      own: indices of the share of this process, which it reads in any case. Each example is in one share.
    """

    def __init__(
        self, ids: Sequence[str], make: Callable[[Sequence[int]], Sequence[T]], own: Sequence[int]
    ) -> None:
        """Makes nothing yet.

        Args:
          ids: see the class.
          make: returns the values of some indices; many at a time are faster than one by one.
          own: see the class.
        """
        self.ids, self._make, self.own = ids, make, own
        self._here: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self.ids))[index]  # raises IndexError
        if isinstance(places, range):
            self.bring(places)
            return [self._here[i] for i in places]
        self.bring([places])
        return self._here[places]

    def bring(self, indices: Iterable[int]) -> None:
        """Makes those of some values that have not been read yet."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._here]
        if missing:
            self._here.update(zip(missing, self._make(missing), strict=True))

    @property
    def share(self) -> list[T]:
        """The values of this process's share."""
        self.bring(self.own)
        return [self._here[i] for i in self.own]
