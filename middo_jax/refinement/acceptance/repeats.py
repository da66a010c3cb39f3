"""Candidates that repeat a known conversation or an accepted candidate, exactly or nearly.

Conversations with equal ids are equal. Near-duplicates are found by their prompts, see overlap.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from middo_jax.data.example import Example
from middo_jax.data.stored import Examples
from middo_jax.refinement.acceptance.overlap import Overlaps, jaccard, shingles
from middo_jax.refinement.tasks import Task


class KnownTexts:
    """The conversations that no rewrite may repeat: the dataset, the held-out samples, the accepted rewrites.

    A replacement may resemble its original, and any other sample as much as its original does, since prompts
    that share a long text all resemble each other. No rewrite may resemble a held-out prompt.
    """

    def __init__(self, training: Examples, heldout: Sequence[Example], threshold: float | None) -> None:
        """Iterates `training` now and once per call of `near`.

        `threshold`: see `Overlaps`; None: only equal conversations count as repeats.
        """
        self._training, self._heldout, self._threshold = training, heldout, threshold
        self._ids = {example.id for example in itertools.chain(training, heldout)}
        self._accepted = None if threshold is None else Overlaps(threshold)
        self._accepted_ids: list[str] = []

    def near(self, children: Sequence[tuple[Task, Example]]) -> list[str | None]:
        """The training or held-out prompt that each child resembles most, in words; None: none.

        The index contains the children, and the corpus is read once for all of them.
        """
        if self._threshold is None or not children:
            return [None] * len(children)
        index, worst = Overlaps(self._threshold), dict[int, tuple[float, str]]()
        for _, child in children:
            index.add(child.prompt)
        parts: tuple[tuple[str, Iterable[Example], bool], ...] = (
            ("", self._training, True),
            ("held-out ", self._heldout, False),
        )
        for name, known, is_training in parts:
            for example in known:
                for number, overlap in index.matches(example.prompt):
                    task = children[number][0]
                    replaces = is_training and task.op != "synthesize"
                    if (
                        replaces
                        and jaccard(shingles(task.original.prompt), shingles(example.prompt)) >= overlap
                    ):
                        continue
                    if number not in worst or overlap > worst[number][0]:
                        worst[number] = overlap, f"{overlap:.2f} like {name}{example.id}"
        return [worst[number][1] if number in worst else None for number in range(len(children))]

    def repeated_by(self, child: Example, near: str | None) -> str | None:
        """The known conversation that a child repeats, in words; None: none.

        Args:
          child: the candidate's conversation.
          near: the child's value as `near` returns it.
        """
        if child.id in self._ids:
            return f"equals {child.id}"
        if near is not None or self._accepted is None:
            return near
        found = max(self._accepted.matches(child.prompt), key=lambda match: match[1], default=None)
        return None if found is None else f"{found[1]:.2f} like {self._accepted_ids[found[0]]}"

    def take_in(self, child: Example) -> None:
        """Adds an accepted rewrite, which later ones may not repeat."""
        self._ids.add(child.id)
        if self._accepted is not None:
            self._accepted.add(child.prompt)
            self._accepted_ids.append(child.id)
