"""The stages of a run, each with the function that runs it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

from middo_jax import stages
from middo_jax.config import Config
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.sources import count_reasons
from middo_jax.data.stored import Stored
from middo_jax.ending import best_stage
from middo_jax.exporting import own_shape, write_as_it_came
from middo_jax.parallel.coordination import barrier, from_first, is_first, on_each_disk
from middo_jax.rundir import RunError, write_jsonl
from middo_jax.rundir.link import Link
from middo_jax.session import Prepared
from middo_jax.starting import PREPARE, Plan

# Need no devices: process 0 runs them, the others read the results.
BY_ONE = (PREPARE, "select", "take_back", "merge", "best")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: its link (inputs, outputs, dependencies) and the function that runs it."""

    link: Link
    function: Callable[[Plan, Link], None]

    def is_done(self, config: Config) -> bool:
        """Whether the stage is recorded as done and is not stale."""
        return self.link.name in self.link.folder.stages() and self.link.why_stale(config) is None

    def do(self, plan: Plan) -> None:
        """Removes earlier results, then runs the stage in all processes or, for `BY_ONE`, in the first."""
        name, where = self.link.name, self.link.where
        on_each_disk(f"{where}: begin", self._remove_earlier)
        if name in BY_ONE:
            from_first(where, lambda: self.function(plan, self.link))
        else:
            self.function(plan, self.link)
        barrier(f"{where}: end")

    def _remove_earlier(self) -> None:
        """Removes results of an earlier start that could be mistaken for new ones."""
        folder, name = self.link.folder, self.link.name
        if name in folder.stages():
            if name == "train":
                stages.remove_training(folder)
            folder.forget(name)


def _prepare(plan: Plan, link: Link) -> None:
    began, facts = time.monotonic(), dict[str, Any]()
    if link.earlier is not None:
        begun = link.begin()
        kept = stages.merged(plan.session, link.earlier)
    else:
        # `check_start` read the data, because this stage is not done.
        assert plan.fresh is not None
        assert plan.fresh.data is not None
        begun, data = plan.fresh.begun, plan.fresh.data
        kept = data.kept
        repairs = {reason.reason: reason.n for reason in count_reasons(data.repairs)}
        facts = {
            "repairs": repairs,
            "format": data.format,
            "columns": data.columns,
            "id_columns": data.id_columns,
        }
        if spelling := data.spelling.to_json():
            facts["spelling"] = spelling
        write_jsonl(plan.run.rejected, (r.to_json() for r in data.rejections))
        write_jsonl(plan.run.heldout, (e.to_json() for e in plan.heldout))
        _forget_other_shapes(plan, data)
    write_jsonl(link.folder.dataset, (e.to_json() for e in kept))
    if link.folder.own_format in link.writes:
        link.folder.forget("best")  # of a run with `stop.patience`
        stored = Stored(link.folder.dataset)
        form = write_as_it_came(plan.run, stored, link.folder.own_format, plan.session.progress)
        facts = {"format": form, "shape": own_shape(plan.run).to_json()}
    begun.finish(plan.session.config, time.monotonic() - began, n=len(kept), **facts)


def _forget_other_shapes(plan: Plan, data: Prepared) -> None:
    """Makes `final` stale if its rows have the shape of other data than the run's."""
    settings = plan.session.config.data.model_dump(mode="json")
    own = OwnShape.of(data.format, data.columns, settings, data.spelling)
    for name in (PREPARE, "best"):
        written = plan.run.final.stages().get(name)
        if written is not None and written.get("shape") != own.to_json():
            plan.run.final.forget(name)


def _train(plan: Plan, link: Link) -> None:
    model = link.models["start"]
    assert model is not None  # `chain` was given the base
    stages.train_stage(plan.session, link.folder, model, plan.heldout, restart=True)


def _score(plan: Plan, link: Link) -> None:
    folder, pre_model = link.folder, link.models["pre_model"]
    stages.score_stage(plan.session, folder, folder.checkpoint, pre_model, earlier=link.earlier)


def _select(plan: Plan, link: Link) -> None:
    stages.select_stage(plan.session.config, link.folder)


def _refine(plan: Plan, link: Link) -> None:
    stages.check_learnt(plan.session.config, link.folder)
    if is_first():
        stages.refine_round(plan.session, link.folder)
    else:
        stages.follow_refinement(plan.session, link.folder)


def _merge(plan: Plan, link: Link) -> None:
    if plan.session.config.refine.wait_for_review:
        told = stages.waits_for_review(link.folder)
        if told is not None:
            raise RunError(told)
    began, begun = time.monotonic(), link.begin()
    stages.merge_stage(plan.session, link.folder)
    begun.finish(plan.session.config, time.monotonic() - began)


def _evaluate(plan: Plan, link: Link) -> None:
    began, begun = time.monotonic(), link.begin()
    models = {name: path for name, path in link.models.items() if path is not None}
    folder = plan.run if link.name == "evaluate" else link.folder
    losses = stages.measure_heldout(plan.session, folder, models, plan.heldout)
    begun.finish(plan.session.config, time.monotonic() - began, losses=losses)


def _benchmark(plan: Plan, link: Link) -> None:
    began, begun = time.monotonic(), link.begin()
    models = {name: path for name, path in link.models.items() if path is not None}
    scores = stages.benchmark_stage(plan.session, link.folder, models)
    begun.finish(plan.session.config, time.monotonic() - began, scores=scores)


def _export(plan: Plan, link: Link) -> None:
    began, begun, session = time.monotonic(), link.begin(), plan.session
    out, checkpoint, dtype = link.writes[0], link.folder.checkpoint, session.config.model.dtype
    # Removes the export of a run that was killed before the manifest recorded it.
    from_first(f"{link.where}: remove", lambda: shutil.rmtree(out, ignore_errors=True))
    base = session.config.model.path
    facts = stages.export_checkpoint(checkpoint, out, dtype, session.progress, mesh=session.mesh, base=base)
    begun.finish(session.config, time.monotonic() - began, **facts)


FUNCTIONS: dict[str, Callable[[Plan, Link], None]] = {
    PREPARE: _prepare,
    "train": _train,
    "score": _score,
    "select": _select,
    "take_back": lambda plan, link: stages.take_back_stage(plan.session.config, link, plan.session.progress),
    "refine": _refine,
    "merge": _merge,
    "heldout": _evaluate,
    "best": lambda plan, link: best_stage(plan.session, plan.run, link),
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "export": _export,
}
