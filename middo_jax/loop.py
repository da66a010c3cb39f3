"""The closed loop: train, score, select, refine and merge in each round; then a final training, evaluated.

Before the first stage, `assess` determines which stages are stale and why. These and the stages that depend
on them are redone. An interrupted run continues where it stopped, and a changed setting repeats only the
stages that depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax import stages, template_date
from middo_jax.config import RENAMED, Config
from middo_jax.config.axis_table import scored_axes
from middo_jax.controls import control_stages, write_summary
from middo_jax.data.example import Example
from middo_jax.data.files import inputs_of
from middo_jax.data.own_shape import OwnShape
from middo_jax.data.sources import count_reasons
from middo_jax.ending import best_stage
from middo_jax.exporting import own_shape, write_as_it_came
from middo_jax.parallel.coordination import agree, barrier, from_first, is_first, stop_point
from middo_jax.progress import Progress, duration
from middo_jax.report.build import build
from middo_jax.report.status import unreadable_events
from middo_jax.rundir import RunDir, RunError, held, read_jsonl, write_jsonl, write_text
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.chain import Begun, Link, State, assess, chain
from middo_jax.rundir.damage import damages, edited, put_aside, refuse_damaged
from middo_jax.rundir.events import read_events
from middo_jax.rundir.files import full_disk_named
from middo_jax.rundir.stopping import check_heldout, course, decide
from middo_jax.session import Prepared, Session, prepare, read_data, read_dataset
from middo_jax.version import __version__

PREPARE = "prepare"  # done before the first numbered stage of its folder, and not numbered itself
# Need no devices: process 0 runs them, the others read the results.
BY_ONE = (PREPARE, "select", "take_back", "merge", "best")


class FreshData(NamedTuple):
    """The user's data, just read.

    Attributes:
      begun: record of the started stage that read the data.
      data: the data.
    """

    begun: Begun
    data: Prepared


@dataclasses.dataclass(frozen=True)
class Plan:
    """Inputs of a run that are determined before its folder is changed.

    Attributes:
      run: the run.
      session: settings, tokenizer, mesh.
      heldout: examples that are never trained on.
      links: all stages, in order.
      fresh: the user's data, if it had to be read.
      data: files and folders of the user's data by role.
    """

    run: RunDir
    session: Session
    heldout: Sequence[Example]
    links: Sequence[Link]
    fresh: FreshData | None
    data: Mapping[str, Path]


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
        from_first(f"{where}: begin", self._remove_earlier)
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


def run_loop(config: Config, progress: Progress, repair: bool = False) -> RunDir:
    """Runs all rounds, or what is left of them; returns the run's folder with its report.

    Args:
      config: the settings.
      progress: shows how far the run is.
      repair: whether damaged files are put aside, so that what is missing then is done again.

    Raises:
      RunLocked: another process writes into the folder.
      RunError: the folder holds a run of the previous version, or a file that cannot be used.
      DiskFull: there is no room; what was finished is kept.
      ValueError, RuntimeError: a stage failed; the message says what to do, and finished stages stay
        finished. What can be checked before the first stage is checked before the folder is made or changed.
    """
    run = RunDir(Path(config.runs_dir) / config.name)
    with held(run.path, progress.say), full_disk_named(run.path):
        if repair:
            from_first("repair", lambda: _repair(run, config, progress))
        _run(run, Session(template_date.pin(config, [run.config]), progress))
    return run


def _repair(run: RunDir, config: Config, progress: Progress) -> None:
    """Puts damaged and edited files aside, so that the chain finds their stages stale."""
    links = [*chain(run, config), *(link for link, _ in control_links(run, config))]
    found = [*damages(run, links), *edited(links)]
    cache = Path(config.refine.cache or run.llm_cache)
    moved = put_aside(run, [damage.path for damage in found])
    for path, to in moved.items():
        progress.say(f"{path}: put aside as {to}")
    for link in links:  # a checkpoint that was put aside is not one that was removed to save space
        if moved.keys() & set(link.removable) and link.folder.path not in moved:
            link.folder.forget(link.name)
    if (saved := stages.save_answers(cache)) is not None:
        progress.say(saved)
    if not found and saved is None:
        progress.say(f"{run.path}: nothing to repair")


def _run(run: RunDir, session: Session) -> None:
    progress, began = session.progress, time.monotonic()
    session = session.settled()
    config = session.config
    with contextlib.ExitStack() as checked:
        checked.enter_context(session.stage())  # the first training reuses what the checks tokenize
        header = _Header(session)
        try:
            checked_plan = _checked(run, session, header)
        finally:
            header.say()  # before an error too
        agree(_facts(checked_plan))
        if run.config.exists() and run.round(0).stages():
            run.log("resume")
        write_text(run.config, config.to_yaml())
        number = 0
        for plan, stage in _stages(checked_plan):
            stop_point()
            numbered = sum(link.name != PREPARE for link in plan.links)
            is_done = from_first(f"{stage.link.where}: is done", functools.partial(stage.is_done, config))
            if stage.link.name == PREPARE:
                if not is_done:
                    stage.do(plan)
                continue
            number += 1
            where = f"[{number}/{numbered}] {stage.link.where}"
            if is_done:
                progress.say(f"{where}: done before")
                continue
            for removed in _removed(plan, stage.link):
                progress.say(
                    f"{removed.where}: again, {stage.link.where} needs its checkpoint, which was removed"
                )
                _do_logged(plan, removed)
            progress.say(where)
            _do_logged(plan, stage.link)
            checked.close()
    _run_controls(checked_plan)
    if is_first():
        build(run)
    run.log("report")
    barrier("report")
    progress.say(f"done in {duration(time.monotonic() - began)}")


def _run_controls(plan: Plan) -> None:
    """Does the stages of the control arms that are not done, and compares the arms."""
    if not plan.session.config.controls:
        return
    for name, link, config, function in control_stages(plan.session, plan.run, plan.heldout):
        stop_point()
        stage = Stage(link, lambda _, __, function=function: function())
        if from_first(f"{name}: is done", functools.partial(stage.is_done, config)):
            plan.session.progress.say(f"{name}: done before")
            continue
        plan.session.progress.say(name)
        plan.run.log("start", round=str(link.folder.path.relative_to(plan.run.path)), stage=link.name)
        stage.do(plan)
        plan.run.log("done", round=str(link.folder.path.relative_to(plan.run.path)), stage=link.name)
    if is_first():
        write_summary(plan.session, plan.run)
    barrier("controls")


def _stages(plan: Plan) -> Iterator[tuple[Plan, Stage]]:
    """The stages in order, each with the plan that contains it.

    With `stop.patience` each measurement decides which stages are left: process 0 reads them all.
    """
    run, session, config, done = plan.run, plan.session, plan.session.config, 0
    decides = {"heldout_loss": "heldout", "task": "benchmark"}[config.stop.metric]
    while done < len(plan.links):
        link = plan.links[done]
        yield plan, Stage(link, FUNCTIONS[link.name])
        done += 1
        if config.stop.patience is None or link.name != decides:
            continue
        values = from_first(f"{link.where}: course", lambda: list(course(run, config).values))
        found = decide(values, config.stop, config.rounds)
        session.progress.say(found.line())
        links = chain(run, config, session.base, plan.data, found)
        plan = dataclasses.replace(plan, links=links)


def _do_logged(plan: Plan, link: Link) -> None:
    event = {"round": link.folder.path.name, "stage": link.name}
    plan.run.log("start", **event)
    Stage(link, FUNCTIONS[link.name]).do(plan)
    plan.run.log("done", **event)


def _removed(plan: Plan, link: Link) -> list[Link]:
    """The stages whose checkpoints were removed and are needed now, the earliest first."""
    missing = from_first(f"{link.where}: models", lambda: [str(path) for path in link.missing_models])
    found: list[Link] = []
    for path in map(Path, missing):
        maker = next(other for other in plan.links if path in other.writes)
        found += [other for other in (*_removed(plan, maker), maker) if other not in found]
    return found


def _checked(run: RunDir, session: Session, header: _Header) -> Plan:
    """Says the first line and which stages are redone; runs all checks before the folder is changed."""
    config, first = session.config, run.round(0)
    data = inputs_of(config.data)
    links = chain(run, config, session.base, data)
    refuse_damaged(list(damages(run, links)))
    _refuse_previous_version(run)
    n_unreadable, states = read_events(run.events).n_unreadable, assess(links, config)
    _offer_choice(run, config, *states[0])
    fresh = None
    if states[0][1].is_fresh:
        heldout = [Example.from_json(row) for row in read_jsonl(run.heldout)]
        header.say(first.stages()[PREPARE]["n"] + len(heldout))
    else:
        begun, rows = links[0].begin(), read_data(session)
        header.say(len(rows.examples))
        fresh = FreshData(begun, prepare(session, rows))
        heldout = fresh.data.heldout
    if n_unreadable:
        session.progress.say(unreadable_events(n_unreadable))
    stages.check_own_texts(config)
    check_heldout(config, len(heldout))
    pending = {link.name for link, state in states if not state.is_fresh}
    if any(link.name == "train" and not state.is_fresh for link, state in states[:2]):
        stages.check_training(session, read_dataset(first) if fresh is None else fresh.data.kept, heldout)
    if "score" in pending and "quality" in scored_axes(config):
        stages.check_judge(session)
    if "refine" in pending:
        # Before a training only: later the stage itself waits for a server that is away.
        asks = "train" in pending
        for line in from_first("refiner: checks", lambda: stages.check_refiner(config, asks)):
            session.progress.say(line)
        stages.check_cache(Path(config.refine.cache or run.llm_cache))
    if "benchmark" in pending:
        stages.check_benchmarks(config)
    for line in redone(states):
        session.progress.say(line)
    return Plan(run, session, heldout, links, fresh, data)


def _offer_choice(run: RunDir, config: Config, link: Link, state: State) -> None:
    """Refuses to replace a run's results because its data was edited, unless `data.if_changed` is `redo`.

    Raises:
      RunError: the data has changed since the run read it.
    """
    if config.data.if_changed == "redo" or state.why is None:
        return
    if state.why.input in link.data:
        raise RunError(
            f"{run.path}: the data of this run was edited ({state.why}). name=NEW starts a new run and keeps "
            "this one; data.if_changed=redo goes on in this one and makes again what depends on the data"
        )


class _Header:
    """The first line of a run: version, devices, mesh, model, data and its usable rows. It is said once."""

    def __init__(self, session: Session) -> None:
        shape = ", ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
        devices = session.mesh.devices
        kinds = " and ".join(sorted({device.device_kind for device in devices.flat}))
        config = session.config
        self._text: str | None = (
            f"middo-jax {__version__} on {devices.size} {kinds} ({shape}), model {config.model.path}, "
            f"data {config.data.name}"
        )
        self._recorded = stages.recorded_line(config)
        self._progress = session.progress

    def say(self, n_rows: int | None = None) -> None:
        """Says it; without the rows if they are not known, because the run ends before they are."""
        if self._text is not None:
            rows = "" if n_rows is None else f" ({n_rows:,} rows)"
            self._progress.say(f"{self._text}{rows}{f'; {self._recorded}' if self._recorded else ''}")
            self._text = None


def _facts(plan: Plan) -> dict[str, str]:
    """Returns facts that must be equal in all processes of a job before any of them starts."""
    ids = [example.id for example in (*plan.heldout, *(plan.fresh.data.kept if plan.fresh else ()))]
    return {
        "version": __version__,
        "settings": _short_hash(plan.session.config.to_yaml()),
        "data": _short_hash("\n".join(ids)),
        "stages": _short_hash("\n".join(link.where for link in plan.links)),
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def redone(states: Sequence[tuple[Link, State]]) -> list[str]:
    """Returns one line per done stage that is stale, with the reason, and one for all dependent stages."""
    stale = [(link, state.why) for link, state in states if state.is_done and state.why is not None]
    lines = [f"{link.where} will be redone: {why}" for link, why in stale if not why.is_forecast]
    following = [link.where for link, why in stale if why.is_forecast]
    if following:
        lines.append(f"will also be redone if their inputs change: {', '.join(following)}")
    return lines


def _refuse_previous_version(run: RunDir) -> None:
    for directory in (*run.rounds(), run.final):
        for name, record in directory.stages().items():
            if "settings" not in record:
                why = "does not record the settings"
            elif old := sorted(RENAMED.keys() & record["settings"].keys()):
                why = f"names {old[0]}, which is now {RENAMED[old[0]]}"
            else:
                continue
            raise RunError(
                f"{run.path} was made by an earlier version of middo-jax: its record of "
                f"{directory.path.name} {name} {why}. `middo report`, `status` and `trace` still read it; "
                "give this run another name (name=...)"
            )


def _prepare(plan: Plan, link: Link) -> None:
    began, facts = time.monotonic(), dict[str, Any]()
    if link.earlier is not None:
        begun = link.begin()
        kept = stages.merged(plan.session, link.earlier)
    else:
        assert plan.fresh is not None  # `_checked` read the data, because this stage is not done
        begun, data = plan.fresh
        kept = data.kept
        repairs = {reason.reason: reason.n for reason in count_reasons(data.repairs)}
        facts = {"repairs": repairs, "format": data.format, "columns": data.columns}
        write_jsonl(plan.run.rejected, (r.to_json() for r in data.rejections))
        write_jsonl(plan.run.heldout, (e.to_json() for e in plan.heldout))
        _forget_other_shapes(plan, data)
    write_jsonl(link.folder.dataset, (e.to_json() for e in kept))
    if link.folder.own_format in link.writes:
        link.folder.forget("best")  # of a run with `stop.patience`
        rows = list(kept)
        form = write_as_it_came(plan.run, rows, link.folder.own_format, plan.session.progress)
        facts = {"format": form, "shape": own_shape(plan.run).to_json()}
    begun.finish(plan.session.config, time.monotonic() - began, n=len(kept), **facts)


def _forget_other_shapes(plan: Plan, data: Prepared) -> None:
    """Makes `final` stale if its rows have the shape of other data than the run's."""
    own = OwnShape.of(data.format, data.columns, plan.session.config.data.model_dump(mode="json"))
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
