"""Examples that are tokenized when they are read, so that a process has only those that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

from middo_jax.data.tokenize import TokenizedExample


class LazyTokens(Sequence[TokenizedExample]):
    """Tokenized examples, each of which is tokenized once, when it is first read.

    Attributes:
      ids: IDs of the examples, which are known without their tokens.
      own: indices of the share of this process, which it reads in any case. Each example is in one share.
    """

    def __init__(
        self,
        ids: Sequence[str],
        tokenize: Callable[[Sequence[int]], Sequence[TokenizedExample]],
        own: Sequence[int],
    ) -> None:
        """Tokenizes nothing yet.

        Args:
          ids: see the class.
          tokenize: returns the examples with some indices; many at a time are faster than one by one.
          own: see the class.
        """
        self.ids, self._tokenize, self.own = ids, tokenize, own
        self._here: dict[int, TokenizedExample] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        places = range(len(self.ids))[index]  # raises IndexError
        if isinstance(places, range):
            self.bring(places)
            return [self._here[i] for i in places]
        self.bring([places])
        return self._here[places]

    def bring(self, indices: Iterable[int]) -> None:
        """Tokenizes those of some examples that have not been read yet."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._here]
        if missing:
            self._here.update(zip(missing, self._tokenize(missing), strict=True))
