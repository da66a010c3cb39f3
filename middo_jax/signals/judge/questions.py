"""The six questions about a sample as one tree of tokens, and where in it the ratings are read.

Axes: n token of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import tokenize_prompt
from middo_jax.data.trees import Tree, common_prefix, trie
from middo_jax.signals.judge.rubrics import ANSWER_STEM, DIMENSIONS, PARTS, Part, judge_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RATINGS = np.arange(11)  # "0" .. "10"


class JudgeError(ValueError):
    """The tokenizer spells the ratings in a way that one prefill cannot read."""


@dataclasses.dataclass(frozen=True)
class RatingTokens:
    """How a tokenizer spells "0".."10" after the answer's first words.

    Attributes:
      stem: tokens of the answer that all ratings share.
      first: [11] the token that follows it; "10" has that of "1" where it is two tokens.
      ten_second: the second token of "10" where it has one, else None.
    """

    stem: tuple[int, ...]
    first: tuple[int, ...]
    ten_second: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RatingTokens:
        """Reads them off the tokenizer.

        Raises:
          JudgeError: the ratings are neither eleven single tokens nor ten and a two-token "10".
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
    """The six questions about a sample. Each reading is a place whose next token tells.

    Attributes:
      tree: of the questions, and of the answers' first words.
      readings: per column of `rubrics.COLUMNS` where its rating comes next; then, where "10" is two tokens,
        per column the place of the "1" after it.
    """

    tree: Tree
    readings: tuple[int, ...]


def rating_tree(
    example: Example, tokenizer: PreTrainedTokenizerBase, ratings: RatingTokens, max_length: int
) -> RatingTree:
    """The six questions about a sample, sharing every token up to where they differ.

    They share the opening, the three about a part all of its text, and as a rule all six the prompt's.

    Raises:
      JudgeError: the questions alone are over `max_length`.
    """
    asked = {part: questions(example, part, tokenizer, ratings, max_length) for part in PARTS}
    tree, ends = trie([asked[part][i] for i in range(len(DIMENSIONS)) for part in PARTS])
    if ratings.ten_second is None:
        return RatingTree(tree, tuple(ends))
    before = [_parent(tree, end) for end in ends]
    return RatingTree(tree, (*before, *ends))


def _parent(tree: Tree, place: int) -> int:
    """Place of the token before the one at `place` in its text."""
    return int(np.flatnonzero(tree.positions_n[:place] == tree.positions_n[place] - 1)[-1])


def questions(
    example: Example,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    ratings: RatingTokens,
    max_length: int,
) -> list[np.ndarray]:
    """The tokens of the three questions about one part, each up to where the rating, or its "1", comes last.

    A text too long for `max_length` is shortened in the sample, never in the question; prompt and response
    share the room, and each keeps its beginning and end.

    Raises:
      JudgeError: the questions alone are over `max_length`.
    """
    prompt, response = example.prompt, example.response if part == "response" else ""
    one = ratings.first[1:2] if ratings.ten_second is not None else ()

    def asked() -> list[np.ndarray]:
        messages = [judge_message(dimension, part, prompt, response) for dimension in DIMENSIONS]
        tokens = [tokenize_prompt([Message("user", text)], tokenizer) for text in messages]
        return [np.r_[tokens_n, ratings.stem, one].astype(np.int32) for tokens_n in tokens]

    texts = asked()
    if max(map(len, texts)) <= max_length:
        return texts
    originals = [(text, _offsets(text, tokenizer)) for text in (prompt, response)]
    shorter_one = min(len(offsets) for _, offsets in originals)
    room = sum(len(offsets) for _, offsets in originals)
    while (excess := max(map(len, texts)) - max_length) > 0:
        room -= excess
        if room < 0:
            raise JudgeError(
                f"quality: a question takes {max(map(len, texts))} tokens, over model.max_length="
                f"{max_length}; raise it, or leave this axis out"
            )
        share = max(room // 2, room - shorter_one)  # of each text; what one does not need goes to the other
        prompt, response = (_shorten(text, offsets, share) for text, offsets in originals)
        texts = asked()
    return texts


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded.offset_mapping


def _shorten(text: str, offsets: Sequence[tuple[int, int]], kept: int) -> str:
    """Keeps some `kept` tokens of a text: beginning and end, which say most about it."""
    if len(offsets) <= kept:
        return text
    head, tail = kept - kept // 2, kept // 2
    before = text[: offsets[head - 1][1]] if head else ""
    after = text[offsets[len(offsets) - tail][0] :] if tail else ""
    return f"{before} … {after}"
