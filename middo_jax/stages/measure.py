"""Measures the refiner's candidates under the model in training: one pass for all, and ratings if needed.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from middo_jax.data.example import Example
from middo_jax.data.tokenize import end_of_turn_token
from middo_jax.models.model import Model
from middo_jax.parallel.coordination import Together, alone
from middo_jax.refinement.acceptance.candidate import Measurement
from middo_jax.refinement.acceptance.measured import cosines
from middo_jax.refinement.acceptance.table import is_asked
from middo_jax.rundir import RoundDir, RunError
from middo_jax.session import Session, read_dataset
from middo_jax.signals.embeddings import read_embeddings, require_embeddings
from middo_jax.signals.ifd import ifd
from middo_jax.signals.judge.rubrics import quality
from middo_jax.signals.neighbours.search import nearest_neighbours
from middo_jax.signals.readings import end_nll, last_targets, pmi
from middo_jax.signals.table import read_scores
from middo_jax.stages.merge import rows_of
from middo_jax.stages.passes import Passes, conditioned, raw_prompts
from middo_jax.stages.ratings import ratings


def scored_model(directory: RoundDir) -> Path:
    """Returns the path of the model that a folder was scored with, from its manifest.

    Raises:
      RunError: the manifest has no such path, or the path no longer exists.
    """
    named = directory.stages().get("score", {}).get("model")
    if named is not None and Path(named).exists():
        return Path(named)
    missing = "the model that scored it is not in its manifest" if named is None else f"{named} is gone"
    raise RunError(
        f"{directory.path}: {missing}, and refine.accept=measured needs that model: run `middo score` again, "
        "or set refine.accept=sane"
    )


def scored_as(directory: RoundDir) -> str:
    """Returns 16 hex digits that identify a folder's scores: a hash of its rows, models and settings.

    A rewrite's measurement is valid only for scores with the same hash. The embeddings alone do not identify
    the scores: with diversity.embedder=pre they are the same for every trained model.
    """
    require_embeddings(directory.embeddings)
    record = directory.stages()["score"]
    inputs = {role: known["hash"] for role, known in record.get("inputs", {}).items()}
    decisive = [
        record["files"][directory.embeddings.name],
        record.get("reads", {}),
        inputs,
        record.get("settings", {}),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


class Rewrite(NamedTuple):
    """A rewrite to measure.

    Attributes:
      child: the rewritten sample.
      original_id: ID of the sample that it replaces or was synthesized from.
      op: op of the task.
    """

    child: Example
    original_id: str
    op: str

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object, to send to the other processes of a job."""
        return {"child": self.child.to_json(), "original_id": self.original_id, "op": self.op}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rewrite:
        """The inverse of `to_json`."""
        return cls(Example.from_json(row["child"]), row["original_id"], row["op"])


class UnderTraining:
    """The round's model, M_t, loaded on first use. Delete the object to free its memory."""

    def __init__(
        self, session: Session, directory: RoundDir, model: Path, together: Together = alone
    ) -> None:
        """Does not load the model yet.

        Args:
          session: settings, tokenizer, mesh.
          directory: folder with scores and embeddings of the round's dataset under `model`.
          model: path of M_t.
          together: value that `lead` yields, if other processes follow; they take part in each measurement.
        """
        self._together = together
        self._session, self._directory, self._model = session, directory, model
        self._scored = Passes(session)

    @functools.cached_property
    def _loaded(self) -> Model:
        return self._session.load_model(self._model)

    @functools.cached_property
    def _embedder(self) -> Model | None:
        """The model that computed the dataset's embeddings; None if it is M_t."""
        record = self._directory.stages()["score"]
        named = record.get("embedder", record["model"])
        return None if named == record["model"] else self._session.load_model(Path(named))

    def measure(self, rewrites: Sequence[Rewrite]) -> list[Measurement]:
        """Measures all but the ratings: losses and embeddings in one pass, then neighbours."""
        with self._with_others("measure", [rewrite.to_json() for rewrite in rewrites]):
            return self._measure(rewrites)

    def rate(self, examples: Sequence[Example]) -> list[float | None]:
        """Returns the judge's quality of each example; None where it cannot be parsed."""
        with self._with_others("rate", [example.to_json() for example in examples]):
            return self._rate(examples)

    def _with_others(self, what: str, rows: list[Any]) -> contextlib.AbstractContextManager[None]:
        """Also tells followers whether to load the model: reading a checkpoint is a collective operation."""
        return self._together({what: rows, "loads": "_loaded" not in vars(self)})

    def follow(self, told: Mapping[str, Any]) -> None:
        """Takes part in a measurement that process 0 leads."""
        if "measure" in told:
            self._measure([Rewrite.from_json(row) for row in told["measure"]])
        else:
            self._rate([Example.from_json(row) for row in told["rate"]])

    def _measure(self, rewrites: Sequence[Rewrite]) -> list[Measurement]:
        children = [rewrite.child for rewrite in rewrites]
        table = read_scores(self._directory.scores)
        place = {id_: i for i, id_ in enumerate(table["id"].to_pylist())}
        lengths = pc.call_function("list_value_length", [table["knn_ids"]])
        k = pc.call_function("max", [lengths]).as_py() or 0
        sources = rows_of(table, {rewrite.original_id for rewrite in rewrites})
        rows = {row["id"]: row for row in sources}
        tokenized = self._session.tokenize(children)
        scores = self._scored("rewrites measured", self._loaded, tokenized)
        end_q = end_nll(
            scores.last_nll_n, last_targets(tokenized), end_of_turn_token(self._session.tokenizer)
        )
        informed = self._informed(rewrites)
        embedding_qd = scores.embedding_nd
        is_raw = self._session.config.diversity.text == "raw"
        if k and (is_raw or self._embedder):  # the dataset's embeddings were computed in this way too
            embedded = raw_prompts(self._session, children) if is_raw else tokenized
            model = self._embedder or self._loaded
            embedding_qd = self._scored("embeddings of rewrites", model, embedded).embedding_nd
        k = k or self._session.config.diversity.k
        dataset_nd = read_embeddings(self._directory.embeddings, list(place))
        source_q = np.array([place[rewrite.original_id] for rewrite in rewrites])
        similarity_q = cosines(embedding_qd, dataset_nd[source_q])
        # k + 1, because the original that a rewrite replaces does not count as its neighbour.
        found = nearest_neighbours(dataset_nd, k + 1, self._session.mesh, query_qd=embedding_qd)
        measured = []
        for i, rewrite in enumerate(rewrites):
            replaces, core = rewrite.op != "synthesize", rows[rewrite.original_id]
            near = found.similarity_nj[i][(found.index_nj[i] != source_q[i]) | (not replaces)][:k]
            similarity = _finite(similarity_q[i])
            measured.append(
                Measurement(
                    loss=_finite(scores.loss_n[i]),
                    similarity=similarity,
                    nearest=_finite(near[0]),
                    knn_similarity=_finite(near.mean()),
                    core_similarity=None if replaces else _raised(core, similarity),
                    truncated=tokenized[i].truncated,
                    end_nll=_finite(end_q[i]),
                    **informed.get(i, {}),
                )
            )
        return measured

    def _informed(self, rewrites: Sequence[Rewrite]) -> dict[int, dict[str, float | None]]:
        """The values that the gate `information` compares, by index of the replacement; empty if it is open.

        The originals are measured with their rewrites, so that scoring need not measure all samples.
        """
        if not is_asked("information", self._session.config.refine):
            return {}
        places = [i for i, rewrite in enumerate(rewrites) if rewrite.op != "synthesize"]
        originals = {example.id: example for example in read_dataset(self._directory)}
        texts = [rewrites[i].child for i in places] + [originals[rewrites[i].original_id] for i in places]
        if not texts:
            return {}
        tokenized = self._session.tokenize(texts)
        scores = self._scored("with their originals", self._loaded, tokenized, prompts=True)
        readings = ("pmi", "reverse_ifd")
        more = conditioned(self._session, self._scored, self._loaded, texts, tokenized, readings)
        assert scores.prompt_nll_n is not None
        assert more.response_alone_n is not None
        assert more.prompt_behind_response_n is not None
        pmi_n = pmi(scores.loss_n, more.response_alone_n, scores.n_targets_n)
        reverse_n = ifd(more.prompt_behind_response_n, scores.prompt_nll_n)
        return {
            i: {
                "pmi": _finite(pmi_n[at]),
                "reverse_ifd": _finite(reverse_n[at]),
                "original_pmi": _finite(pmi_n[at + len(places)]),
                "original_reverse_ifd": _finite(reverse_n[at + len(places)]),
            }
            for at, i in enumerate(places)
        }

    def _rate(self, examples: Sequence[Example]) -> list[float | None]:
        return [_finite(q) for q in quality(ratings(self._session, self._loaded, examples)[0])]


def _raised(core: dict[str, Any], similarity: float | None) -> float | None:
    """Returns a sparse sample's mean similarity to its k nearest neighbours after adding a similar sample."""
    sims = core["knn_sims"]
    if not sims or similarity is None:
        return None
    return core["knn_mean_sim"] + max(similarity - sims[-1], 0.0) / len(sims)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
