"""Instruction-following difficulty (Li et al. 2024, arXiv 2308.12032): how much a prompt helps its response.

  IFD(Q, A) = s(A | Q) / s(A)       s: mean NLL of the response's tokens, with and without the prompt

With a value near 1 the prompt does not help, above 1 it misleads. The authors select high values below 1.
Axes: docs/contributing.md#axes; r response of a conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from middo_jax.data.tokenize import TokenizedExample


def responses_alone(example: TokenizedExample, header_n: np.ndarray) -> list[TokenizedExample]:
    """Each response of a conversation without its prompt, after the template's header of an assistant's turn.

    The header (see `tokenize.response_header`) corresponds to the authors' "### Response:". The tokens of the
    response are those of the conversation, with its end of turn, so both losses are over the same tokens.

      tokens    [1, 5, 10, 11, 6, 20, 21, 2]  header [1, 6]  ->  [1, 6, 20, 21, 2]
      is_target [0, 0,  0,  0, 0,  1,  1, 1]                     [0, 0,  1,  1, 1]
    """
    edges = np.flatnonzero(np.diff(np.r_[False, example.is_target_n, False]))
    alone = []
    for start, stop in edges.reshape(-1, 2):
        tokens_n = np.concatenate([header_n, example.tokens_n[start:stop]])
        is_target_n = np.arange(len(tokens_n)) >= len(header_n)
        alone.append(
            dataclasses.replace(
                example, tokens_n=tokens_n, is_target_n=is_target_n, in_prompt_n=np.zeros_like(is_target_n)
            )
        )
    return alone


def mean_by_example(counts: Sequence[int], loss_r: np.ndarray, n_targets_r: np.ndarray) -> np.ndarray:
    """[n] float32: the mean NLL per target over all responses of each example; NaN without any target.

    Args:
      counts: the number of responses of each of the n examples. Responses are ordered by example.
      loss_r: mean NLL of each response's targets.
      n_targets_r: number of each response's targets.
    """
    example_r, n = np.repeat(np.arange(len(counts)), counts), len(counts)
    has_targets_r = n_targets_r > 0
    weights_r = np.where(has_targets_r, n_targets_r, 0).astype(np.float64)
    nll_r = weights_r * np.where(has_targets_r, loss_r, 0.0)
    with np.errstate(invalid="ignore"):
        mean_n = np.bincount(example_r, nll_r, n) / np.bincount(example_r, weights_r, n)
    return mean_n.astype(np.float32)


def ifd(loss_n: np.ndarray, loss_unconditional_n: np.ndarray) -> np.ndarray:
    """[n] IFD from the mean NLLs with and without the other text; NaN or infinite without a ratio."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return loss_n / loss_unconditional_n
