"""Accepts or rejects the refiner's candidates, and records it in candidates.jsonl.

The gates on the text have run already, when the candidate was written. This module runs the other gates, in
the order of the table: lengths compared with the dataset; measurements by the model under training, in one
pass over all candidates of an attempt; its ratings of the candidates that passed so far; repetitions of other
samples.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from middo_jax.config.gates import Needs
from middo_jax.data.example import Example
from middo_jax.data.stored import Stored
from middo_jax.parallel.coordination import Together, alone
from middo_jax.refinement import Outcome, Task
from middo_jax.refinement.acceptance.candidate import Candidate, Limits, Measurement
from middo_jax.refinement.acceptance.language import load_identifier
from middo_jax.refinement.acceptance.measured import (
    ENDING,
    FLOOR,
    after_scores,
    length_bounds,
    pair_similarity,
)
from middo_jax.refinement.acceptance.repeats import KnownTexts
from middo_jax.refinement.acceptance.table import asked, first_verdict, is_asked
from middo_jax.rundir import RoundDir, read_jsonl, write_jsonl
from middo_jax.rundir.files import read_json
from middo_jax.rundir.rows import CandidateRow
from middo_jax.session import Session
from middo_jax.signals.embeddings import read_embeddings
from middo_jax.signals.table import as_floats, read_scores
from middo_jax.stages.endpoint import refines_itself
from middo_jax.stages.measure import Rewrite, UnderTraining, scored_as, scored_model


@dataclasses.dataclass
class _Case:
    """A candidate during acceptance: its outcome so far, and the input of the gates."""

    outcome: Outcome
    child: Example
    candidate: Candidate

    @property
    def key(self) -> tuple[str, str]:
        """The key of its stored measurement."""
        return self.outcome.task.task_id, self.child.id

    @property
    def rewrite(self) -> Rewrite:
        """The input of `UnderTraining.measure`."""
        return Rewrite(self.child, self.outcome.task.original.id, self.outcome.task.op)

    @property
    def is_open(self) -> bool:
        """Whether no gate has rejected it."""
        return self.outcome.example is not None

    def learn(self, **facts: Any) -> None:
        """Adds facts that the next gates need."""
        self.candidate = dataclasses.replace(self.candidate, **facts)


class Acceptance:
    """Accepts or rejects a round's candidates, one attempt after the other.

    Measurements are stored after each attempt, with `scored_as` of the folder. A restart therefore repeats no
    measurement, and new scores invalidate all measurements.
    """

    def __init__(
        self,
        session: Session,
        directory: RoundDir,
        heldout: Sequence[Example],
        model: Path | None,
        together: Together = alone,
    ) -> None:
        """Reads the files that the gates compare candidates with.

        Args:
          session: settings, tokenizer, mesh.
          directory: folder with the round's dataset, scores, embeddings and selection.
          heldout: held-out examples, which no candidate may repeat.
          model: M_t; None takes the model that the folder's manifest names.
          together: value that `lead` yields, if other processes of the job follow.

        Raises:
          RunError: `refine.accept` is `measured` and the model cannot be found.
          ConfigError: a gate needs a package that is not installed.
        """

        self._together = together
        self._session, self._directory = session, directory
        self._settings = session.config.refine
        gates, by_text = self._settings.gates, self._settings.accept != "none"
        self._examples = Stored(directory.dataset)
        self._model = (model or scored_model(directory)) if self._settings.accept == "measured" else None
        if by_text and gates.value("language"):
            load_identifier()  # raises if the package is missing, before any request is paid for
        self._known = KnownTexts(self._examples, heldout, gates.value("duplicate") if by_text else None)
        self.limits = self._read_limits()
        self._under = scored_as(directory)
        self._stored = self._read_stored()
        self._rows: list[CandidateRow] = []

    def decide(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Returns the outcomes of one attempt, in order, after all gates."""
        cases = {
            place: _Case(outcome, outcome.example, self._candidate(outcome.task, outcome.example))
            for place, outcome in enumerate(outcomes)
            if outcome.example is not None
        }
        self._ask_dataset(list(cases.values()))
        if self._model is not None:
            self._ask_model(list(cases.values()), self._model)
        self._ask_accepted(list(cases.values()))
        decided = []
        for place, outcome in enumerate(outcomes):
            case = cases.get(place)
            measured = None if case is None else case.candidate.measured
            decided.append(outcome if case is None else _with_scores(case.outcome, measured))
            self._rows.append(self._row(decided[-1], outcome.example, measured))
        write_jsonl(self._directory.candidates, self._rows)
        return decided

    def _candidate(self, task: Task, child: Example) -> Candidate:
        """Returns the input of the gates for a child that passed the gates on its text."""

        return Candidate(
            task, prompt=child.prompt, response=child.response, example=child, limits=self.limits
        )

    def _has_gates(self, needs: Needs, case: _Case) -> bool:
        """Whether a case meets a gate in this phase."""
        itself = self.limits.refines_itself
        return bool(asked(needs, case.outcome.task.axes, self._settings, refines_itself=itself))

    def _ask(self, cases: Sequence[_Case], needs: Needs) -> None:
        """Runs the gates of one phase on all cases that are still open."""

        for case in cases:
            if case.is_open and (verdict := first_verdict(case.candidate, needs, self._settings)):
                case.outcome = case.outcome.rejected(verdict)

    def _ask_dataset(self, cases: Sequence[_Case]) -> None:

        wanted = [case for case in cases if self._has_gates("dataset", case)]
        for case, tokenized in zip(wanted, self._session.tokenize([c.child for c in wanted]), strict=True):
            case.learn(truncated=tokenized.truncated)
        self._ask(cases, "dataset")

    def _ask_model(self, cases: Sequence[_Case], path: Path) -> None:

        model = UnderTraining(self._session, self._directory, path, self._together)
        still = [case for case in cases if case.is_open]
        new = [case for case in still if case.key not in self._stored]
        # A task has one candidate per attempt, so no key is measured twice.
        if new:
            for case, measured in zip(new, model.measure([c.rewrite for c in new]), strict=True):
                case.learn(measured=measured)
        for case in still:
            case.learn(measured=case.candidate.measured or self._stored[case.key])
        self._ask(still, "measurement")
        rated = [case for case in still if case.is_open and self._has_gates("rating", case)]
        unrated = [c for c in rated if c.candidate.measured and c.candidate.measured.quality is None]
        if unrated:
            for case, quality in zip(unrated, model.rate([c.child for c in unrated]), strict=True):
                assert case.candidate.measured is not None
                case.learn(measured=dataclasses.replace(case.candidate.measured, quality=quality))
        del model
        gc.collect()
        # If a later attempt returns the same text, the first measurement is used again: in another batch its
        # last digits would differ, and a restart could not tell the two measurements apart.
        self._stored |= {case.key: case.candidate.measured for case in still if case.candidate.measured}
        self._ask(rated, "rating")

    def _ask_accepted(self, cases: Sequence[_Case]) -> None:
        """Runs the last gates on one candidate after the other: later ones must not repeat accepted ones."""
        still = [case for case in cases if case.is_open]
        near = self._known.near([(case.outcome.task, case.child) for case in still])
        for case, like in zip(still, near, strict=True):
            case.learn(repeats=self._known.repeated_by(case.child, like))
            self._ask([case], "accepted")
            if case.is_open:
                self._known.take_in(case.child)

    def _read_limits(self) -> Limits:

        gates, limits = self._settings.gates, Limits()
        length, context, novelty = (gates.value(name) for name in ("length", "context", "novelty"))
        if self._settings.accept != "none" and length is not None:
            sizes = [(len(example.prompt), len(example.response)) for example in self._examples]
            prompts, responses = np.array(sizes).T
            limits = Limits(
                prompt_chars=length_bounds(prompts, length),
                response_chars=length_bounds(responses, length),
            )
        if self._model is None:
            return limits
        axes = read_json(self._directory.selection)["axes"]
        table = read_scores(self._directory.scores)
        first = pc.call_function("list_slice", [table["knn_sims"]], pc.ListSliceOptions(0, 1))
        nearest_n = pc.call_function("list_flatten", [first]).to_numpy().astype(np.float64)
        similarity = None
        if context is not None:
            embedding_nd = read_embeddings(self._directory.embeddings, table["id"].to_pylist())
            similarity = pair_similarity(embedding_nd, context)
        return dataclasses.replace(
            limits,
            loss=axes.get("complexity", {}).get("threshold", {}).get("loss_post"),
            context=similarity,
            novelty=float(np.quantile(nearest_n, novelty)) if novelty and len(nearest_n) else None,
            end_nll=_quantile(as_floats(table, "end_nll"), ENDING),
            floor=_quantile(as_floats(table, "loss_post"), FLOOR),
            refines_itself=refines_itself(self._session),
        )

    def _read_stored(self) -> dict[tuple[str, str], Measurement]:

        if self._model is None or not self._directory.candidates.exists():
            return {}
        return {
            (row["task_id"], row["candidate_id"]): Measurement(**row["measured"])
            for row in read_jsonl(self._directory.candidates)
            if row["measured"]
            and row["measured_under"] == self._under
            and (
                row["op"] == "synthesize" or not is_asked("information", self._settings) or _is_informed(row)
            )
        }

    def _row(self, outcome: Outcome, candidate: Example | None, measured: Measurement | None) -> CandidateRow:
        task, verdict = outcome.task, outcome.verdict
        return {
            "task_id": task.task_id,
            "attempt": task.attempt,
            "op": task.op,
            "axes": list(task.axes),
            "source_id": task.original.id,
            "candidate_id": None if candidate is None else candidate.id,
            "accepted": outcome.example is not None,
            "gate": None if verdict is None else verdict.gate,
            "detail": None if verdict is None else verdict.detail,
            "before": dict(task.scores),
            "measured": None if measured is None else measured.to_json(),
            "measured_under": None if measured is None else self._under,
        }


def _quantile(values_n: np.ndarray, share: float) -> float | None:
    """A quantile of the finite ones; None if none is finite, as in scores of an earlier version."""
    finite = values_n[np.isfinite(values_n)]
    return float(np.quantile(finite, share)) if len(finite) else None


def _is_informed(row: Mapping[str, Any]) -> bool:
    """Whether the values that the gate `information` compares were measured."""
    return row["measured"].get("original_pmi") is not None


def _with_scores(outcome: Outcome, measured: Measurement | None) -> Outcome:
    """Returns the outcome with the measurement added to its child's lineage."""

    if outcome.example is None or measured is None:
        return outcome
    lineage = dataclasses.replace(outcome.example.lineage, scores_after=dict(after_scores(measured)))
    return dataclasses.replace(outcome, example=dataclasses.replace(outcome.example, lineage=lineage))
