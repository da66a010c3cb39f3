"""The six questions about a sample as one tree of tokens, and the positions where the ratings are read.

Axes: docs/contributing.md#axes; here n is a token of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.long_texts import both_ends
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.data.trees import Tree, common_prefix, trie
from middo_jax.signals.judge.rubrics import (
    ANSWER_STEM,
    DIMENSIONS,
    PARTS,
    SHIPPED,
    Part,
    Rubric,
    judge_message,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATINGS = np.arange(11)  # "0" .. "10"


class JudgeError(ValueError):
    """The ratings cannot be read in one pass: the tokenizer splits them, or a question is too long."""


@dataclasses.dataclass(frozen=True)
class RatingTokens:
    """How a tokenizer spells "0".."10" after the answer's first words.

    Attributes:
      stem: the tokens at the start of the answer that all ratings share.
      first: [11] the token after the stem. If "10" is two tokens, its first is that of "1".
      ten_second: the second token of "10"; None if "10" is one token.
    """

    stem: tuple[int, ...]
    first: tuple[int, ...]
    ten_second: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RatingTokens:
        """Finds the tokens by encoding all ratings.

        Raises:
          JudgeError: the ratings are neither eleven single tokens nor ten single tokens and a "10" of two.
        """
        spelt = [
            np.asarray(tokenizer(f"{ANSWER_STEM}{n}", add_special_tokens=False).input_ids) for n in RATINGS
        ]
        stem = common_prefix(spelt)
        tails = [ids[stem:].tolist() for ids in spelt]
        first = tuple(tail[0] for tail in tails if tail)
        shared = tuple(spelt[0][:stem].tolist())
        if all(len(tail) == 1 for tail in tails) and len(set(first)) == 11:
            return cls(shared, first, None)
        one_each = all(len(tail) == 1 for tail in tails[:10]) and len(set(first[:10])) == 10
        if one_each and len(tails[10]) == 2 and tails[10][0] == first[1]:
            return cls(shared, first, tails[10][1])
        raise JudgeError(
            "quality: this tokenizer spells the ratings 0..10 neither as one token each nor with a 10 of two "
            "tokens that starts as 1 does; set quality.method=sample"
        )


@dataclasses.dataclass(frozen=True)
class RatingTree:
    """The six questions about a sample. The next token at each read position is a rating.

    Attributes:
      tree: the questions with the first words of their answers.
      read_positions: for each column of `rubrics.COLUMNS` the index of the token before its rating. If "10"
        is two tokens, then for each column also the index of the "1".
    """

    tree: Tree
    read_positions: tuple[int, ...]


def rating_tree(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    ratings: RatingTokens,
    max_length: int,
    rubric: Rubric = SHIPPED,
) -> RatingTree:
    """The six questions about a sample as one tree: questions share all tokens up to their first difference.

    All six share the opening and usually the prompt; the three about one part share all of its text.

    Raises:
      JudgeError: a question without the sample exceeds `max_length`.
    """
    asked = {part: questions(example, part, tokenizer, ratings, max_length, rubric) for part in PARTS}
    tree, ends = trie([asked[part][i] for i in range(len(DIMENSIONS)) for part in PARTS])
    if ratings.ten_second is None:
        return RatingTree(tree, tuple(ends))
    before = [_parent(tree, end) for end in ends]
    return RatingTree(tree, (*before, *ends))


def _parent(tree: Tree, index: int) -> int:
    """The index of the token before the one at `index` in its text."""
    return int(np.flatnonzero(tree.positions_n[:index] == tree.positions_n[index] - 1)[-1])


def questions(
    example: Example,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    ratings: RatingTokens,
    max_length: int,
    rubric: Rubric = SHIPPED,
) -> list[np.ndarray]:
    """The tokens of the three questions about one part, each up to its rating, or including the "1".

    If a text exceeds `max_length`, the sample is shortened, never the question. Prompt and response share the
    tokens that are left, and each keeps its beginning and its end.

    Raises:
      JudgeError: a question without the sample exceeds `max_length`.
    """
    prompt = both_ends(example.prompt, max_length)
    response = both_ends(example.response, max_length) if part == "response" else ""
    one = ratings.first[1:2] if ratings.ten_second is not None else ()

    def asked() -> list[np.ndarray]:
        messages = [judge_message(dimension, part, prompt, response, rubric) for dimension in DIMENSIONS]
        tokens = [tokenize_prompt([Message("user", text)], tokenizer) for text in messages]
        return [np.r_[tokens_n, ratings.stem, one].astype(np.int32) for tokens_n in tokens]

    texts = asked()
    if max(map(len, texts)) <= max_length:
        return texts
    originals = [(text, _offsets(text, tokenizer)) for text in (prompt, response)]
    shorter_one = min(len(offsets) for _, offsets in originals)
    left = sum(len(offsets) for _, offsets in originals)
    while (excess := max(map(len, texts)) - max_length) > 0:
        left -= excess
        if left < 0:
            raise JudgeError(
                f"quality: a question takes {max(map(len, texts))} tokens, over model.max_length="
                f"{max_length}; raise it, or set quality.method=sample"
            )
        share = max(left // 2, left - shorter_one)  # of each text; a short text leaves its rest to the other
        prompt, response = (_shorten(text, offsets, share) for text, offsets in originals)
        texts = asked()
    return texts


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded.offset_mapping


def _shorten(text: str, offsets: Sequence[tuple[int, int]], kept: int) -> str:
    """Keeps about `kept` tokens of a text, from its beginning and its end."""
    if len(offsets) <= kept:
        return text
    head, tail = kept - kept // 2, kept // 2
    before = text[: offsets[head - 1][1]] if head else ""
    after = text[offsets[len(offsets) - tail][0] :] if tail else ""
    return f"{before} … {after}"
