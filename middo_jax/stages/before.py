"""Measures a dataset under the model before training. If that model is frozen, reuses an earlier round.

Axes: docs/contributing.md#axes; o sample of the earlier round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from middo_jax.config import affecting
from middo_jax.data.templates import template_arguments
from middo_jax.models.model import Model
from middo_jax.rundir import RoundDir, fingerprint
from middo_jax.session import Session
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.neighbours.incremental import Earlier, rows_before
from middo_jax.signals.table import as_floats, neighbours_of, read_scores
from middo_jax.stages.passes import Passes, Texts
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


class _Standing(NamedTuple):
    """The reusable measurements of an earlier round.

    Attributes:
      table: its scores; None if nothing is reusable.
      embedding_od: its embeddings, one row per row of the table; None if nothing is reusable or wanted.
      row_n: row of each sample in the earlier round, -1 if it is new or changed.
    """

    table: pa.Table | None
    embedding_od: np.ndarray | None
    row_n: np.ndarray

    @property
    def new(self) -> list[int]:
        """Indices of the samples to measure."""
        return np.flatnonzero(self.row_n < 0).tolist()

    @property
    def n_kept(self) -> int:
        """Number of samples whose measurements are reused."""
        return int((self.row_n >= 0).sum())

    def of_all(self, of_new: np.ndarray, of_earlier: np.ndarray | None) -> np.ndarray:
        """Returns [n, ...]: new measurements and, for all other samples, those of the earlier round."""
        values = np.empty((len(self.row_n), *of_new.shape[1:]), of_new.dtype)
        values[self.row_n < 0] = of_new
        if of_earlier is not None:
            kept_n = self.row_n >= 0
            values[kept_n] = of_earlier[self.row_n[kept_n]]
        return values


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
    known = Earlier.nothing(len(texts.examples), session.config.diversity.k)
    if standing.table is not None and wanted.embeddings:
        known = Earlier(neighbours_of(standing.table, session.config.diversity.k), standing.row_n)
    loss_n = embedding_nd = None
    if wanted.loss or texts.raw is None:
        scores = passes("loss before training", model, texts.tokenized.chosen(standing.new))
        embedding_nd = scores.embedding_nd
        if wanted.loss:
            was = None if standing.table is None else as_floats(standing.table, "loss_pre")
            loss_n = standing.of_all(scores.loss_n, was)
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
) -> _Standing:
    """Returns and reports the reusable measurements. Embeddings are read only if they are wanted."""
    nothing = _Standing(None, None, np.full(len(texts.examples), -1))
    if earlier is None:
        return nothing
    if not _was_measured_under(earlier, identity):
        session.progress.say(f"under the model before training: nothing of {earlier.path.name} is reusable")
        return nothing
    table = read_scores(earlier.scores)
    ids = table["id"].to_pylist()
    keys = list(zip(ids, table["prompt_hash"].to_pylist(), strict=True))
    row_n = rows_before(list(zip(texts.ids, texts.hashes, strict=True)), keys)
    standing = _Standing(
        table, read_embeddings(earlier.embeddings, ids) if wanted.embeddings else None, row_n
    )
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
