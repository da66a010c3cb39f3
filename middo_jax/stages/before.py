"""Measures a dataset under the model before training. If that model is frozen, reuses an earlier round.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from middo_jax.config import affecting
from middo_jax.data.templates import template_arguments
from middo_jax.models.model import Model
from middo_jax.rundir import RoundDir, fingerprint
from middo_jax.session import Session
from middo_jax.signals.neighbours.incremental import Earlier
from middo_jax.stages.passes import Passes, Texts
from middo_jax.stages.standing import Standing
from middo_jax.training.identity import values_of


class Wanted(NamedTuple):
    """Which quantities to measure under the model before training."""

    loss: bool
    embeddings: bool


class Before(NamedTuple):
    """Measurements of n samples under the model before training.

    Attributes:
      loss_n: mean NLL of the targets; None if not wanted.
      embedding_nd: embeddings of the prompts; None if not wanted.
      earlier: rows of the samples in the earlier round, and their neighbours there; empty without embeddings.
      n_kept: number of samples whose measurements were reused.
      identity: identity of the measurements, for the manifest.
    """

    loss_n: np.ndarray | None
    embedding_nd: np.ndarray | None
    earlier: Earlier
    n_kept: int
    identity: str


def measure_before(
    session: Session,
    model: Model,
    path: Path,
    texts: Texts,
    wanted: Wanted,
    earlier: RoundDir | None,
    passes: Passes,
) -> Before:
    """Measures the samples that are new since an earlier round; reads the others from that round's files.

    A sample is unchanged if both its ID, a hash of its text, and the hash of its prompt's tokens are. The
    earlier round is used only if its manifest has the same identity and the hashes of its present files.

    Args:
      session: settings and tokenizer.
      model: the model before training.
      path: path that the model was loaded from.
      texts: the samples.
      wanted: losses, embeddings or both.
      earlier: the earlier round's folder, if there is one.
      passes: runs the passes and keeps their facts.
    """
    identity = _identity(session, path, model, wanted)
    standing = _standing(session, texts, wanted, earlier, identity)
    k = session.config.diversity.k
    known = standing.earlier(k) if wanted.embeddings else Earlier.nothing(len(texts.examples), k)
    loss_n = embedding_nd = None
    if wanted.loss or texts.raw is None:
        scores = passes("loss before training", model, texts.tokenized.chosen(standing.new))
        embedding_nd = scores.embedding_nd
        if wanted.loss:
            loss_n = standing.column("loss_pre", scores.loss_n)
    if not wanted.embeddings:
        return Before(loss_n, None, known, standing.n_kept, identity)
    if texts.raw is not None:
        new = texts.raw.chosen(standing.new)
        embedding_nd = passes("embeddings of raw prompts", model, new).embedding_nd
    assert embedding_nd is not None  # one of the two passes above has run
    embedding_nd = standing.of_all(embedding_nd, standing.embedding_od)
    return Before(loss_n, embedding_nd, known, standing.n_kept, identity)


def _standing(
    session: Session, texts: Texts, wanted: Wanted, earlier: RoundDir | None, identity: str
) -> Standing:
    """Returns and reports the reusable measurements. Embeddings are read only if they are wanted."""
    nothing = Standing.nothing(len(texts.examples))
    if earlier is None:
        return nothing
    if not _was_measured_under(earlier, identity):
        session.progress.say(f"under the model before training: nothing of {earlier.path.name} is reusable")
        return nothing
    standing = Standing.of(earlier, texts, wanted.embeddings)
    session.progress.say(
        f"under the model before training: {standing.n_kept:,} of {len(texts.examples):,} samples are reused "
        f"from {earlier.path.name}"
    )
    return standing


def _identity(session: Session, path: Path, model: Model, wanted: Wanted) -> str:
    """Returns the SHA-256 of all inputs of losses, embeddings and neighbours, except the samples.

    These are the model's path, config and weights; the tokenizer, the template and the date in it; the
    settings that turn rows into text; and those of embeddings and neighbours. The mesh and the attention
    kernel are left out, because they change only the rounding.
    """
    config, tokenizer = session.config, session.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # `load_tokenizer` returns no other
    neighbours = affecting(config.diversity, {"scores"})
    decisive = [
        str(path.resolve()),
        repr(dataclasses.replace(model.config, attention="auto")),
        values_of(model),
        tokenizer.chat_template,
        template_arguments(tokenizer).get("pinned_day"),
        tokenizer.backend_tokenizer.to_str(),
        affecting(config, {"text"}),
        wanted.loss,
        neighbours if wanted.embeddings else config.diversity.text,
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _was_measured_under(earlier: RoundDir, identity: str) -> bool:
    """Whether a round's manifest has this identity and the hashes of its present scores and embeddings."""
    record = earlier.stages().get("score", {})
    if record.get("pre_identity") != identity:
        return False
    files = record["files"]
    return all(
        path.exists() and fingerprint(path) == files.get(path.name)
        for path in (earlier.scores, earlier.embeddings)
    )
