"""Datasets that are read one example at a time, as often as they are needed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from middo_jax.data.example import Example
from middo_jax.rundir.files import each_jsonl


class Examples(Protocol):
    """Examples that can be iterated several times: a list, or a dataset in a file."""

    def __iter__(self) -> Iterator[Example]:
        """Starts with the first one."""
        ...

    def __len__(self) -> int:
        """Their number."""
        ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """The examples of a dataset.jsonl. Each iteration reads the file, one example at a time."""

    path: Path

    def __iter__(self) -> Iterator[Example]:
        """The examples in the file's order."""
        return map(Example.from_json, each_jsonl(self.path))

    def __len__(self) -> int:
        """Their number."""
        return self._n

    @functools.cached_property
    def _n(self) -> int:
        with self.path.open("rb") as file:
            return sum(not line.isspace() for line in file)


@dataclasses.dataclass(frozen=True)
class Changed:
    """Examples that are changed one at a time, while they are iterated."""

    examples: Examples
    change: Callable[[Example], Example]

    def __iter__(self) -> Iterator[Example]:
        """The changed examples."""
        return map(self.change, self.examples)

    def __len__(self) -> int:
        """Their number."""
        return len(self.examples)


@dataclasses.dataclass(frozen=True)
class Joined:
    """The examples of two datasets, as one."""

    first: Examples
    second: Examples

    def __iter__(self) -> Iterator[Example]:
        """Those of the first one, then those of the second one."""
        return itertools.chain(self.first, self.second)

    def __len__(self) -> int:
        """Their number."""
        return len(self.first) + len(self.second)
