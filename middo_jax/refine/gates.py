"""Accepted by measurement: what the model under training says of a candidate, against what must improve.

Pure functions over plain numbers; who measures them is not known here. A gate answers with a reason or None;
a reason's kind, what stands before its colon, is the key of GATE_OF. All cosines are compared with
similarities in the same dataset and never with a fixed number: the mean states of a language model lie in a
narrow cone, so that strangers already reach 0.8 and more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.config import GateSettings
from middo_jax.data.example import Example

if TYPE_CHECKING:
    from middo_jax.refine.rewrite import Task

# Every kind of reason by the gate that gives it, gates in the order in which a candidate meets them. What is
# not here, a request that failed or a budget that is spent, says nothing of a candidate.
GATE_OF = {
    "unparsable": "readable",
    "truncated prompt": "readable",
    "empty prompt": "readable",
    "empty answer": "readable",
    "control token": "readable",
    "refused": "sane",
    "truncated answer": "sane",
    "echo": "sane",
    "answer repeats the prompt": "sane",
    "unchanged": "sane",
    "numbers": "numbers",
    "code": "code",
    "language": "language",
    "length": "length",
    "duplicate": "duplicate",
    "context": "context",
    "loss": "loss",
    "coverage": "coverage",
    "novelty": "novelty",
    "distribution": "distribution",
    "quality": "quality",
}
PAIRS = 100_000  # of samples stand for all: their 95th percentile is then known to 0.1 % of the pairs
PAIR_BLOCK = 8192  # pairs whose embeddings are in memory at a time


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the model under training, M_t, says of one candidate. None is a number that is not finite.

    Attributes:
      loss: mean NLL of its response's tokens, in nats.
      similarity: cosine of its prompt's embedding and that of the sample it was made of.
      nearest: cosine to the nearest sample of the dataset; one that it replaces is left out.
      knn_similarity: mean cosine to the k nearest, likewise: its own s.
      core_similarity: the s that a sparse sample would have with this one beside it.
      truncated: whether it is over the model's length.
      quality: the judge's q, None where nobody asked for it.
    """

    loss: float | None
    similarity: float | None
    nearest: float | None
    knn_similarity: float | None
    core_similarity: float | None
    truncated: bool = False
    quality: float | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a round's dataset sets as bars; None is no bar.

    Attributes:
      loss: over it a sample is called hard.
      context: similarity that only a small share of pairs of samples reach.
      novelty: similarity that only a small share of samples have to their nearest neighbour.
      prompt_chars: (fewest, most) characters of a prompt; `response_chars` of a response.
    """

    loss: float | None = None
    context: float | None = None
    novelty: float | None = None
    prompt_chars: tuple[float, float] | None = None
    response_chars: tuple[float, float] | None = None


def check_length(candidate: Example, limits: Limits) -> str | None:
    """Whether prompt and response are about as long as the dataset's."""
    parts = (
        ("prompt", candidate.prompt, limits.prompt_chars),
        ("response", candidate.response, limits.response_chars),
    )
    for name, text, bounds in parts:
        if bounds is not None and not bounds[0] <= len(text) <= bounds[1]:
            return f"length: {name} of {len(text):,} characters, {bounds[0]:,.0f} to {bounds[1]:,.0f} wanted"
    return None


def check_measured(task: Task, measured: Measurement, limits: Limits, gates: GateSettings) -> str | None:
    """Every gate that needs the model but not its rating, by what was asked of the refiner."""
    if gates.length is not None and measured.truncated:
        return "length: over model.max_length"
    if task.op != "synthesize":
        if limits.context is not None and not _at_least(measured.similarity, limits.context):
            return (
                f"context: {_shown(measured.similarity)} similar to the original, {limits.context:.3f} wanted"
            )
        if gates.loss and "complexity" in task.axes:
            return _check_loss(task, measured, limits)
        return None
    if gates.coverage and not _above(measured.core_similarity, task.scores.get("knn_mean_sim")):
        return f"coverage: {_shown(measured.similarity)} similar to its core, no nearer than its neighbours"
    if limits.novelty is not None and not _at_most(measured.nearest, limits.novelty):
        return f"novelty: {_shown(measured.nearest)} similar to a sample, at most {limits.novelty:.3f} wanted"
    if gates.distribution:
        before = task.scores.get("knn_mean_sim")
        if before is not None and not _at_least(measured.knn_similarity, before):
            return f"distribution: farther out than its core, {_change(before, measured.knn_similarity)}"
        if limits.loss is not None and not _at_most(measured.loss, limits.loss):
            return f"distribution: loss {_shown(measured.loss)}, hard from {limits.loss:.3f} on"
    return None


def check_quality(task: Task, measured: Measurement, gates: GateSettings) -> str | None:
    """Whether the judge's rating rose. To be asked last: only what passes the other gates is rated."""
    if not needs_rating(task, gates) or _above(measured.quality, task.scores.get("quality")):
        return None
    return f"quality: {_change(task.scores.get('quality'), measured.quality)}, a rise wanted"


def needs_rating(task: Task, gates: GateSettings) -> bool:
    """Whether the judge has to be asked."""
    return gates.quality and "quality" in task.axes


def gate_of(reason: str) -> str | None:
    """The gate that gave a reason; None where no gate did, since there was no answer."""
    return GATE_OF.get(reason.partition(":")[0])


def length_bounds(lengths_n: np.ndarray, factor: float) -> tuple[float, float]:
    """From the 1st percentile over `factor` to the 99th times `factor`."""
    low, high = np.percentile(lengths_n, [1, 99])
    return float(low / factor), float(high * factor)


def pair_similarity(embedding_nd: np.ndarray, quantile: float) -> float | None:
    """The similarity that this share of all pairs of samples do not reach; None without two directions.

    Some PAIRS pairs stand for all, evenly spread: i and i + shift (modulo n), for as many shifts as it takes.

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
    """Cosine of each row with its fellow, [n] float32; NaN where one is zero or not finite."""
    norms_n = np.linalg.norm(one_nd, axis=1) * np.linalg.norm(other_nd, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("nd,nd->n", one_nd, other_nd) / norms_n


def after_scores(measured: Measurement) -> Mapping[str, float | None]:
    """A measurement under the names that lineage and scores.parquet use."""
    return {
        "loss_pre": None,
        "loss_post": measured.loss,
        "knn_mean_sim": measured.knn_similarity,
        "quality": measured.quality,
    }


def _check_loss(task: Task, measured: Measurement, limits: Limits) -> str | None:
    before = task.scores.get("loss_post")
    falls = _above(before, measured.loss)
    if falls and (limits.loss is None or _at_most(measured.loss, limits.loss)):
        return None
    wanted = "a fall wanted" if limits.loss is None else f"at most {limits.loss:.3f} wanted"
    return f"loss: {_change(before, measured.loss)}, {wanted}"


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
