"""In a job each process tokenizes a share of the samples, and what its devices read. All learn the rest.

A plan needs the length of every sample, which only its tokens show. So each process first tokenizes a share,
and tells the others what the plan and the table of scores need. Then it tokenizes the samples in the rows of
its own devices. So it tokenizes and holds at most 2 / processes of all samples, and every process makes the
plan that one process alone would make.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.lazy import Lazy
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import common_prefix
from middo_jax.parallel.coordination import gather
from middo_jax.parallel.hosts import gather_rows, share_of
from middo_jax.passes.loss_plan import Outline
from middo_jax.session import Session


class SharedTokens(Lazy[TokenizedExample]):
    """Samples of which this process tokenizes its share first. All processes must call the same methods."""

    def __init__(
        self,
        ids: Sequence[str],
        make: Callable[[Sequence[int]], Sequence[TokenizedExample]],
        own: Sequence[int] | None = None,
    ) -> None:
        """Tokenizes nothing yet.

        Args:
          ids, make: see `Lazy`.
          own: indices of this process's share; None: every so many-th sample.
        """
        super().__init__(ids, make, share_of(len(ids)) if own is None else own)

    @classmethod
    def of(cls, session: Session, examples: Sequence[Example]) -> SharedTokens:
        """Samples by the settings; reports what `Session.tell_of_tokens` does."""
        ids = [example.id for example in examples]
        tokens = cls(ids, lambda some: session.tokenize([examples[i] for i in some], tells=False))
        n_cut = sum(gather("cut", sum(example.truncated for example in tokens.share)))
        learns_end = any(gather("learns an end", session.learns_end(tokens.share)))
        session.tell_of_tokens(len(examples), n_cut, learns_end)
        return tokens

    def of_all(self, name: str, k: int, facts: Callable[[TokenizedExample], Sequence[int]]) -> np.ndarray:
        """Returns int32 [n, k], k facts about each sample; each process computes those of its share."""
        rows = np.array([facts(example) for example in self.share], np.int32).reshape(len(self.own), k)
        return gather_rows(name, self.own, rows, len(self))

    def outline(self, *, prompts: bool) -> Outline:
        """What the plan of a pass needs to know; equal to that of one process with all tokens."""
        own = Outline.of(self.share, prompts=prompts)
        needed_n = gather_rows("tokens needed", self.own, own.needed_n[:, None], len(self))[:, 0]
        told = gather("outline", [own.common_n.tolist(), own.own_from] if self.own else None)
        begins = [np.asarray(one[0], np.int32) for one in told if one is not None]
        common_n = begins[0][: common_prefix(begins)] if begins else own.common_n
        return Outline(needed_n, common_n, min((one[1] for one in told if one is not None), default=0))

    def chosen(self, indices: Sequence[int]) -> SharedTokens:
        """Some of the samples, in this order; what is tokenized here is tokenized there."""
        return self.derived(indices, lambda places: [self[indices[place]] for place in places])

    def derived(
        self, sources: Sequence[int], make: Callable[[Sequence[int]], Sequence[TokenizedExample]]
    ) -> SharedTokens:
        """Texts that are made of the samples, each by the process that has its sample in its share.

        Args:
          sources: index of the sample of each text.
          make: returns the texts with some indices into `sources`; their samples are tokenized before.
        """

        def made(places: Sequence[int]) -> Sequence[TokenizedExample]:
            self.bring(sources[place] for place in places)
            return make(places)

        own = set(self.own)
        mine = [place for place, i in enumerate(sources) if i in own]
        return SharedTokens([self.ids[i] for i in sources], made, mine)
