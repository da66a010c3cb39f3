"""The gates that depend on the dataset and on the model under training, and their limits. Pure functions.

Cosines are compared with similarities in the same dataset, never with a fixed number: the mean hidden
states of a language model are in a narrow cone, so even unrelated prompts have cosines of 0.8 and more.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from middo_jax.refinement.acceptance.candidate import Candidate, Finding, Measurement

PAIRS = (
    100_000  # pairs of samples that represent all pairs; their 95th percentile is exact to 0.1 % of the pairs
)
PAIR_BLOCK = 8192  # pairs whose embeddings are in memory at the same time
# Shares of the samples whose quantile is the bar; docs/validity.md says what these and the next let pass.
ENDING, FLOOR = 0.95, 0.1
PMI_LOST, REVERSE_RISE = 0.1, 0.02  # shares of the original's value that a rewrite may lose, or exceed
NOTHING = Measurement(None, None, None, None, None)


def length(candidate: Candidate, _: Any) -> Finding | None:
    """Whether prompt and response have lengths like those in the dataset, and fit into model.max_length."""
    example, limits = candidate.example, candidate.limits
    if example is None:
        return None
    for name, text, bounds in (
        ("prompt", example.prompt, limits.prompt_chars),
        ("response", example.response, limits.response_chars),
    ):
        if bounds is not None and not bounds[0] <= len(text) <= bounds[1]:
            return Finding(f"{name} of {len(text):,} characters, {bounds[0]:,.0f} to {bounds[1]:,.0f} wanted")
    return Finding("over model.max_length") if candidate.truncated else None


def context(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the prompt is similar to its original."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.context
    if limit is None or _at_least(measured.similarity, limit):
        return None
    return Finding(f"{_shown(measured.similarity)} similar to the original, {limit:.3f} wanted")


def information(candidate: Candidate, _: Any) -> Finding | None:
    """Whether prompt and answer tell each other about as much as the original's, in one direction or both."""
    if not candidate.task.original.is_single_turn:
        return None  # its losses are over several answers, and a rewrite has one
    measured = candidate.measured or NOTHING
    told, before = measured.pmi, measured.original_pmi
    guessed, guessed_before = measured.reverse_ifd, measured.original_reverse_ifd
    if told is not None and before is not None and told >= before - PMI_LOST * abs(before):
        return None
    if guessed is not None and guessed_before is not None and guessed <= guessed_before * (1 + REVERSE_RISE):
        return None
    return Finding(f"PMI {_change(before, told)}, reverse IFD {_change(guessed_before, guessed)}")


def ending(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the answer's turn ends where the model expects an end."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.end_nll
    if limit is None or _at_most(measured.end_nll, limit):
        return None
    return Finding(f"the end's loss is {_shown(measured.end_nll)}, at most {limit:.3f} wanted")


def floor(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the loss is not suspiciously low."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.floor
    if limit is None or _at_least(measured.loss, limit):
        return None
    return Finding(f"loss {_shown(measured.loss)}, at least {limit:.3f} wanted")


def loss(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the loss fell, and to at most the limit."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.loss
    before = candidate.task.scores.get("loss_post")
    if _above(before, measured.loss) and (limit is None or _at_most(measured.loss, limit)):
        return None
    wanted = "a fall wanted" if limit is None else f"at most {limit:.3f} wanted"
    return Finding(f"{_change(before, measured.loss)}, {wanted}")


def coverage(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the sparse core has nearer neighbours than before."""
    measured = candidate.measured or NOTHING
    if _above(measured.core_similarity, candidate.task.scores.get("knn_mean_sim")):
        return None
    return Finding(f"{_shown(measured.similarity)} similar to its core, no nearer than its neighbours")


def novelty(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the candidate is not a paraphrase of a sample."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.novelty
    if limit is None or _at_most(measured.nearest, limit):
        return None
    return Finding(f"{_shown(measured.nearest)} similar to a sample, at most {limit:.3f} wanted")


def distribution(candidate: Candidate, _: Any) -> Finding | None:
    """Whether a new sample is within the dataset's distribution: no sparser than its core, and not hard."""
    measured, limit = candidate.measured or NOTHING, candidate.limits.loss
    before = candidate.task.scores.get("knn_mean_sim")
    if before is not None and not _at_least(measured.knn_similarity, before):
        return Finding(f"farther out than its core, {_change(before, measured.knn_similarity)}")
    if limit is not None and not _at_most(measured.loss, limit):
        return Finding(f"loss {_shown(measured.loss)}, hard from {limit:.3f} on")
    return None


def quality(candidate: Candidate, _: Any) -> Finding | None:
    """Whether the judge's rating rose."""
    measured, before = candidate.measured or NOTHING, candidate.task.scores.get("quality")
    if _above(measured.quality, before):
        return None
    return Finding(f"{_change(before, measured.quality)}, a rise wanted")


def length_bounds(lengths_n: np.ndarray, factor: float) -> tuple[float, float]:
    """(1st percentile / factor, 99th percentile x factor)."""
    low, high = np.percentile(lengths_n, [1, 99])
    return float(low / factor), float(high * factor)


def pair_similarity(embedding_nd: np.ndarray, quantile: float) -> float | None:
    """A quantile of the similarities of all pairs of samples; None if no pair of samples has a similarity.

    About PAIRS pairs represent all pairs: i and i + shift (modulo n), for evenly spaced shifts.

    Args:
      embedding_nd: float32, any norm; may be a memory map.
      quantile: 0..1.
    """
    n = len(embedding_nd)
    if n < 2:
        return None
    shifts = np.unique(np.linspace(1, n - 1, min(n - 1, -(-PAIRS // n))).astype(int))
    first = np.unique(np.linspace(0, n - 1, min(n, PAIRS)).astype(int))
    one, other = (a.ravel() for a in np.broadcast_arrays(first, (first + shifts[:, None]) % n))
    similarity = np.empty(len(one), np.float32)
    for start in range(0, len(one), PAIR_BLOCK):
        at = slice(start, start + PAIR_BLOCK)
        similarity[at] = cosines(embedding_nd[one[at]], embedding_nd[other[at]])
    known = similarity[np.isfinite(similarity)]
    return float(np.quantile(known, quantile)) if known.size else None


def cosines(one_nd: np.ndarray, other_nd: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows, [n] float32; NaN if a row is zero or not finite."""
    norms_n = np.linalg.norm(one_nd, axis=1) * np.linalg.norm(other_nd, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("nd,nd->n", one_nd, other_nd) / norms_n


def after_scores(measured: Measurement) -> Mapping[str, float | None]:
    """A measurement under the column names of scores.parquet, as lineage records it."""
    return {
        "loss_pre": None,
        "loss_post": measured.loss,
        "knn_mean_sim": measured.knn_similarity,
        "quality": measured.quality,
    }


def _above(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one > other


def _at_least(value: float | None, limit: float) -> bool:
    return value is not None and value >= limit


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _change(before: float | None, after: float | None) -> str:
    return f"{_shown(before)} -> {_shown(after)}"
