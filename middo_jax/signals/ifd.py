"""Instruction-following difficulty (Li et al. 2024, arXiv 2308.12032): how much a prompt helps its response.

  IFD(Q, A) = s(A | Q) / s(A)       s: mean NLL of the response's tokens, with and without the prompt

Near 1 the prompt is of no help, above 1 it misleads; the authors select high values below 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from middo_jax.data.tokenize import TokenizedExample


def responses_alone(example: TokenizedExample, header_n: np.ndarray) -> list[TokenizedExample]:
    """Each response of a conversation behind the template's header of an assistant's turn, and nothing else.

    The header (see `tokenize.response_header`) is what the authors' "### Response:" is. The response's tokens
    are the conversation's own, its end of turn among them, so that both losses are of the same tokens, cut
    alike.

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
    """[n] float32: sum of NLLs over number of targets, over all responses of an example; NaN without any.

    Args:
      counts: how many responses each of the n examples has, one example after the other.
      loss_r: mean NLL of each response's targets.
      n_targets_r: how many these are.
    """
    example_r, n = np.repeat(np.arange(len(counts)), counts), len(counts)
    has_targets_r = n_targets_r > 0
    weights_r = np.where(has_targets_r, n_targets_r, 0).astype(np.float64)
    nll_r = weights_r * np.where(has_targets_r, loss_r, 0.0)
    with np.errstate(invalid="ignore"):
        mean_n = np.bincount(example_r, nll_r, n) / np.bincount(example_r, weights_r, n)
    return mean_n.astype(np.float32)


def ifd(loss_n: np.ndarray, loss_unconditional_n: np.ndarray) -> np.ndarray:
    """[n] IFD of mean NLLs with and without the prompt; NaN or infinite where there is no ratio."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return loss_n / loss_unconditional_n
