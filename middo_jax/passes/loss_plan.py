"""Plans the scoring pass over losses and embeddings, from the lengths of the examples and how they begin.

Axes: docs/contributing.md#axes; here t is a token of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np

from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import Tree, common_prefix
from middo_jax.passes.runner import PassPlan

MIN_LENGTH = 8  # an example counts at least 8 tokens in the plan: a row of 1,024 has at most 128 segments
MIN_PREFIX = 8  # tokens; sharing a shorter prefix is not worth its positions in every row


class Outline(NamedTuple):
    """What the plan of a pass needs to know of its examples.

    Attributes:
      needed_n: int32, tokens of each example up to the last needed hidden state.
      common_n: int32, the tokens with which all examples begin.
      own_from: the first index at which any example needs a hidden state of its own.
    """

    needed_n: np.ndarray
    common_n: np.ndarray
    own_from: int

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], *, prompts: bool) -> Outline:
        """The outline of some examples; see `plan_losses`."""
        needed = [_needed(example) for example in examples]
        begins = [example.tokens_n[:n] for example, n in zip(examples, needed, strict=True)]
        common_n = begins[0][: common_prefix(begins)] if begins else np.zeros(0, np.int32)
        own_from = min((_own_from(example, prompts) for example in examples), default=0)
        return cls(np.asarray(needed, np.int32), common_n, own_from)

    @property
    def prefix(self) -> int:
        """Length of the prefix that rows can share: examples keep what counts, and a token of their own."""
        if len(self.needed_n) < 2:
            return 0
        prefix = min(len(self.common_n), self.own_from, int(self.needed_n.min()) - 1)
        return prefix if prefix >= MIN_PREFIX else 0


def plan_losses(
    examples: Sequence[TokenizedExample],
    share_prefix: bool,
    ways: int,
    batch_tokens: int,
    *,
    prompts: bool = False,
    outline: Outline | None = None,
) -> PassPlan:
    """Plans the batches of a pass. Tokens that no loss and no embedding needs are left out.

    Args:
      examples: what to score.
      share_prefix: whether attention can share what all examples begin with, so that a row reads it once.
      ways: into how many parts the mesh splits a batch, see `batch_divisor`.
      batch_tokens: tokens of a batch, all devices together.
      prompts: whether the prompts' losses are wanted too.
      outline: of the examples, if the plan must not read them, because this process does not have all tokens.
    """
    outline = outline or Outline.of(examples, prompts=prompts)
    lengths, prefix = outline.needed_n.tolist(), outline.prefix if share_prefix else 0
    trees = _Lines(examples, lengths)
    return PassPlan.of(trees, prefix, batch_tokens, ways, MIN_LENGTH, lengths)


class _Lines(Sequence[Tree]):
    """The trees of single texts, made when they are read: the first tokens of each example."""

    def __init__(self, examples: Sequence[TokenizedExample], lengths: Sequence[int]) -> None:
        self._examples, self._lengths = examples, lengths
        self._at_t = np.arange(max(lengths, default=0), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        n = self._lengths[index]
        return Tree(self._examples[index].tokens_n[:n], self._at_t[:n], np.full(n, n, np.int32))


def follows(chosen_n: np.ndarray) -> np.ndarray:
    """bool [n]: the next token is one of those chosen."""
    return np.append(chosen_n[1:], False)


def _counts(example: TokenizedExample) -> np.ndarray:
    """Returns bool [t], whether a hidden state is needed: it predicts a target or belongs to the prompt."""
    return example.in_prompt_n | follows(example.is_target_n)


def _own_from(example: TokenizedExample, prompts: bool) -> int:
    """Returns the index of the first hidden state that is needed; the number of tokens if none is."""
    counts_n = _counts(example) | follows(example.in_prompt_n) if prompts else _counts(example)
    return int(np.r_[counts_n, True].argmax())


def _needed(example: TokenizedExample) -> int:
    """Returns the number of tokens up to the last needed hidden state; all tokens if none is needed."""
    return len(example) - int(_counts(example)[::-1].argmax()) if len(example) else 0
