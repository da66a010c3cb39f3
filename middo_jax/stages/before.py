"""What the model before training says of a dataset. Where it is frozen, what an earlier round measured holds.

Axes: n sample, e sample of the earlier round, d width.
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
from middo_jax.parallel.hosts import to_host
from middo_jax.rundir import RoundDir, fingerprint
from middo_jax.session import Session
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.neighbours.incremental import Earlier, rows_before
from middo_jax.signals.table import as_floats, neighbours_of, read_scores
from middo_jax.stages.passes import Passes, Texts
from middo_jax.training.identity import checksums


class Wanted(NamedTuple):
    """What is measured under the model before training."""

    loss: bool
    embeddings: bool


class Before(NamedTuple):
    """What the model before training says of N samples.

    Attributes:
      loss_n: mean NLL of the targets; None if not asked for.
      embedding_nd: of the prompts; None if not asked for.
      earlier: if embeddings were: which sample of the earlier round each one is, and the neighbours there.
      n_kept: samples that were not measured again.
      identity: of what was measured, for the manifest.
    """

    loss_n: np.ndarray | None
    embedding_nd: np.ndarray | None
    earlier: Earlier
    n_kept: int
    identity: str


class _Standing(NamedTuple):
    """What holds of an earlier round.

    Attributes:
      table: its scores; None if nothing holds.
      embedding_ed: its embeddings, the table's rows; None if nothing holds.
      row_n: which of the e samples each one is, -1 where it is new or changed.
    """

    table: pa.Table | None
    embedding_ed: np.ndarray | None
    row_n: np.ndarray

    @property
    def new(self) -> list[int]:
        """The samples that are to be measured."""
        return np.flatnonzero(self.row_n < 0).tolist()

    @property
    def n_kept(self) -> int:
        """How many are not."""
        return int((self.row_n >= 0).sum())

    def of_all(self, of_new: np.ndarray, of_earlier: np.ndarray | None) -> np.ndarray:
        """[n, ...] of what was measured now, and what was before."""
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
    """Measures what is new since an earlier round; the rest is taken from its files.

    A sample is the same if its id, which is a hash of its text, and the hash of its prompt's tokens are. The
    earlier round counts only if its manifest names the same identity, and its files are those it names.

    Args:
      session: settings, tokenizer.
      model: the model before training.
      path: where it was loaded from.
      texts: the samples.
      wanted: losses, embeddings or both.
      earlier: the earlier round's folder, if there is one.
      passes: runs a pass under a name.
    """
    identity = _identity(session, path, model, wanted)
    standing = _standing(session, texts, wanted, earlier, identity)
    known = Earlier.nothing(len(texts.examples), session.config.diversity.k)
    if standing.table is not None and wanted.embeddings:
        known = Earlier(neighbours_of(standing.table, session.config.diversity.k), standing.row_n)
    loss_n = embedding_nd = None
    if wanted.loss or texts.raw is None:
        scores = passes("loss before training", model, [texts.tokenized[i] for i in standing.new])
        embedding_nd = scores.embedding_nd
        if wanted.loss:
            was = None if standing.table is None else as_floats(standing.table, "loss_pre")
            loss_n = standing.of_all(scores.loss_n, was)
    if not wanted.embeddings:
        return Before(loss_n, None, known, standing.n_kept, identity)
    if texts.raw is not None:
        new = [texts.raw[i] for i in standing.new]
        embedding_nd = passes("embeddings of raw prompts", model, new).embedding_nd
    assert embedding_nd is not None  # of one pass or the other
    embedding_nd = standing.of_all(embedding_nd, standing.embedding_ed)
    return Before(loss_n, embedding_nd, known, standing.n_kept, identity)


def _standing(
    session: Session, texts: Texts, wanted: Wanted, earlier: RoundDir | None, identity: str
) -> _Standing:
    """What holds of an earlier round, and says so. Its embeddings are read only if they are wanted."""
    nothing = _Standing(None, None, np.full(len(texts.examples), -1))
    if earlier is None:
        return nothing
    if not _was_measured_under(earlier, identity):
        session.progress.say(f"under the model before training: of {earlier.path.name} nothing stands")
        return nothing
    table = read_scores(earlier.scores)
    ids = table["id"].to_pylist()
    keys = list(zip(ids, table["prompt_hash"].to_pylist(), strict=True))
    row_n = rows_before(list(zip(texts.ids, texts.hashes, strict=True)), keys)
    standing = _Standing(
        table, read_embeddings(earlier.embeddings, ids) if wanted.embeddings else None, row_n
    )
    session.progress.say(
        f"under the model before training: of {earlier.path.name} {standing.n_kept:,} of "
        f"{len(texts.examples):,} samples stand"
    )
    return standing


def _identity(session: Session, path: Path, model: Model, wanted: Wanted) -> str:
    """SHA-256 of all but the samples that the losses, embeddings and neighbours depend on.

    The model's place, shape and weights; the tokenizer, the template and the day it prints, how rows become
    text; what is embedded and which neighbours are sought. The mesh and the attention kernel change rounding
    alone.
    """
    config, tokenizer = session.config, session.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # `load_tokenizer` gives no other
    neighbours = affecting(config.diversity, {"scores"})
    decisive = [
        str(path.resolve()),
        repr(dataclasses.replace(model.config, attention="auto")),
        np.stack(to_host(checksums(model.params))).tolist(),
        tokenizer.chat_template,
        template_arguments(tokenizer).get("pinned_day"),
        tokenizer.backend_tokenizer.to_str(),
        affecting(config, {"text"}),
        wanted.loss,
        neighbours if wanted.embeddings else config.diversity.text,
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _was_measured_under(earlier: RoundDir, identity: str) -> bool:
    """Whether a round's scores and embeddings are of this identity, and those that its manifest names."""
    record = earlier.stages().get("score", {})
    if record.get("pre_identity") != identity:
        return False
    files = record["files"]
    return all(
        path.exists() and fingerprint(path) == files.get(path.name)
        for path in (earlier.scores, earlier.embeddings)
    )
