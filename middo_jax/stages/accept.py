"""Which of the refiner's candidates are accepted: the gates in order, and candidates.jsonl, which tells it.

What the text tells is asked first, then what the model under training measures in one pass over all
candidates of an attempt, and last the rating, of those that have passed all else.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.example import Example
from middo_jax.run_dir import RoundDir, read_jsonl, write_jsonl
from middo_jax.stages.measure import UnderTraining, scored_model
from middo_jax.workshop import Workshop, read_dataset

if TYPE_CHECKING:
    from middo_jax.refine import Outcome
    from middo_jax.refine.gates import Limits, Measurement


class Acceptance:
    """Decides a round's candidates, attempt after attempt.

    A measurement is kept as soon as its attempt is decided, under the hash of the embeddings it was compared
    with: a second start measures nothing twice, and a dataset that was scored anew invalidates all of them.
    """

    def __init__(
        self, workshop: Workshop, directory: RoundDir, heldout: Sequence[Example], model: Path | None
    ) -> None:
        """Reads what the gates compare with.

        Args:
          workshop: settings and all that loads a model.
          directory: holds the round's dataset, scores, embeddings and selection.
          heldout: what no candidate may repeat.
          model: M_t; None takes the one that the folder's manifest names.

        Raises:
          RunError: `refine.accept` is `measured` and that model cannot be found.
          ConfigError: a gate needs a package that is not installed.
        """
        from middo_jax.refine.language import load_identifier

        self._workshop, self._directory, self._heldout = workshop, directory, heldout
        self._settings = workshop.config.refine
        self._examples = read_dataset(directory)
        self._model = (model or scored_model(directory)) if self._settings.accept == "measured" else None
        if self._settings.accept != "none" and self._settings.gates.language:
            load_identifier()  # that it is missing should be known before anything is paid for
        self.limits = self._read_limits()
        self._under = directory.stages()["score"]["files"][directory.embeddings.name][:16]
        self._stored = self._read_stored()
        self._rows: list[dict[str, Any]] = []
        self._accepted: list[Example] = []

    def decide(self, asked: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes of one attempt, in order, with those rejected that a gate does not let pass."""
        from middo_jax.refine.duplicates import reject_alike, reject_duplicates, reject_near_duplicates

        gates, sane = self._settings.gates, self._settings.accept != "none"
        known = {example.id for example in (*self._examples, *self._heldout)}
        outcomes = _rejected(asked, lambda _, e: f"duplicate: equals {e.id}" if e.id in known else None)
        if sane:
            outcomes = self._check_lengths(outcomes)
        if sane and gates.duplicate is not None:
            outcomes = reject_near_duplicates(self._examples, self._heldout, outcomes, gates.duplicate)
        measured: dict[str, Measurement] = {}
        if self._model is not None:
            outcomes, measured = self._check_measured(outcomes, self._model)
        outcomes = reject_duplicates(self._accepted, outcomes)
        if sane and gates.duplicate is not None:
            outcomes = reject_alike(self._accepted, outcomes, gates.duplicate)
        decided = [_with_scores(o, measured.get(o.task.task_id)) for o in outcomes]
        self._accepted += [o.example for o in decided if o.example is not None]
        candidates = {o.task.task_id: o.example for o in asked}
        self._rows += [
            self._row(o, candidates[o.task.task_id], measured.get(o.task.task_id)) for o in decided
        ]
        write_jsonl(self._directory.candidates, self._rows)
        return decided

    def _check_lengths(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        from middo_jax.refine.gates import check_length

        return _rejected(outcomes, lambda outcome, child: check_length(child, self.limits))

    def _check_measured(
        self, outcomes: Sequence[Outcome], path: Path
    ) -> tuple[list[Outcome], dict[str, Measurement]]:
        from middo_jax.refine.gates import check_measured, check_quality, needs_rating

        gates, model = self._settings.gates, UnderTraining(self._workshop, self._directory, path)
        keys = {(o.task.task_id, o.example.id): o for o in outcomes if o.example is not None}
        measured = {key[0]: self._stored[key] for key in keys if key in self._stored}
        new = [o for key, o in keys.items() if key not in self._stored]
        if new:
            measured |= zip((o.task.task_id for o in new), model.measure(new), strict=True)
        outcomes = _rejected(
            outcomes, lambda o, _: check_measured(o.task, measured[o.task.task_id], self.limits, gates)
        )
        unrated = [
            (o.task.task_id, o.example)
            for o in outcomes
            if o.example and needs_rating(o.task, gates) and measured[o.task.task_id].quality is None
        ]
        if unrated:
            for (task_id, _), quality in zip(unrated, model.rate([e for _, e in unrated]), strict=True):
                measured[task_id] = dataclasses.replace(measured[task_id], quality=quality)
        del model
        gc.collect()
        # A later attempt that writes the same again is not measured again either: in another batch its last
        # digits would be others, and a second start could not tell which were whose.
        self._stored |= {key: measured[key[0]] for key in keys}
        return _rejected(
            outcomes, lambda o, _: check_quality(o.task, measured[o.task.task_id], gates)
        ), measured

    def _read_limits(self) -> Limits:
        import numpy as np

        from middo_jax.diagnose.table import read_scores
        from middo_jax.refine.gates import Limits, length_bounds, pair_similarity

        gates, limits = self._settings.gates, Limits()
        if self._settings.accept != "none" and gates.length is not None:
            prompts = np.array([len(example.prompt) for example in self._examples])
            responses = np.array([len(example.response) for example in self._examples])
            limits = Limits(
                prompt_chars=length_bounds(prompts, gates.length),
                response_chars=length_bounds(responses, gates.length),
            )
        if self._model is None:
            return limits
        axes = json.loads(self._directory.selection.read_text(encoding="utf-8"))["axes"]
        embedding_nd = np.load(self._directory.embeddings, mmap_mode="r", allow_pickle=False)
        nearest = [sims[0] for sims in read_scores(self._directory.scores)["knn_sims"].to_pylist() if sims]
        return dataclasses.replace(
            limits,
            loss=axes.get("complexity", {}).get("threshold", {}).get("loss_post"),
            context=None if gates.context is None else pair_similarity(embedding_nd, gates.context),
            novelty=float(np.quantile(nearest, gates.novelty)) if gates.novelty and nearest else None,
        )

    def _read_stored(self) -> dict[tuple[str, str], Measurement]:
        from middo_jax.refine.gates import Measurement

        if self._model is None or not self._directory.candidates.exists():
            return {}
        return {
            (row["task_id"], row["candidate_id"]): Measurement(**row["measured"])
            for row in read_jsonl(self._directory.candidates)
            if row["measured"] and row["measured_under"] == self._under
        }

    def _row(
        self, outcome: Outcome, candidate: Example | None, measured: Measurement | None
    ) -> dict[str, Any]:
        from middo_jax.refine.gates import gate_of

        task, reason = outcome.task, outcome.reject_reason
        return {
            "task_id": task.task_id,
            "attempt": task.attempt,
            "op": task.op,
            "axes": list(task.axes),
            "source_id": task.source.id,
            "candidate_id": None if candidate is None else candidate.id,
            "accepted": outcome.example is not None,
            "gate": None if reason is None else gate_of(reason),
            "reason": reason,
            "before": dict(task.scores),
            "measured": None if measured is None else dataclasses.asdict(measured),
            "measured_under": None if measured is None else self._under,
        }


def _rejected(outcomes: Sequence[Outcome], check: Callable[[Outcome, Example], str | None]) -> list[Outcome]:
    """The outcomes with those rejected whose child a gate has a reason against."""
    kept = []
    for outcome in outcomes:
        reason = None if outcome.example is None else check(outcome, outcome.example)
        kept.append(outcome if reason is None else outcome.rejected(reason))
    return kept


def _with_scores(outcome: Outcome, measured: Measurement | None) -> Outcome:
    """The outcome with what was measured of its child in the child's lineage."""
    from middo_jax.refine.gates import after_scores

    if outcome.example is None or measured is None:
        return outcome
    lineage = dataclasses.replace(outcome.example.lineage, scores_after=dict(after_scores(measured)))
    return dataclasses.replace(outcome, example=dataclasses.replace(outcome.example, lineage=lineage))
