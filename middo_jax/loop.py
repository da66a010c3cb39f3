"""The closed loop: train, score, select, refine and merge in each round; then a final training, evaluated.

Before the first stage, `assess` determines which stages are stale and why. These and the stages that depend
on them are redone. An interrupted run continues where it stopped, and a changed setting repeats only the
stages that depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from middo_jax import stages, template_date
from middo_jax.config import Config
from middo_jax.controls import control_stages, write_summary
from middo_jax.parallel.coordination import barrier, from_first, is_first, stop_point
from middo_jax.progress import HeldBack, Progress, duration
from middo_jax.report.build import build
from middo_jax.rundir import RunDir, held, write_text
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.chain import chain
from middo_jax.rundir.damage import damages, edited, put_aside
from middo_jax.rundir.files import full_disk_named
from middo_jax.rundir.link import Link
from middo_jax.rundir.stopping import course, decide
from middo_jax.session import Session
from middo_jax.stage_functions import FUNCTIONS, Stage
from middo_jax.starting import PREPARE, Header, Plan, check_start


def run_loop(config: Config, progress: Progress, repair: bool = False, folder: Path | None = None) -> RunDir:
    """Runs all rounds, or what is left of them; returns the run's folder with its report.

    Args:
      config: the settings.
      progress: shows how far the run is.
      repair: whether damaged files are put aside, so that what is missing then is done again.
      folder: the copy of a run in a bucket; None: the settings name the folder.

    Raises:
      RunLocked: another process writes into the folder.
      RunError: the folder holds a run of the previous version, or a file that cannot be used.
      DiskFull: there is no room; what was finished is kept.
      ValueError, RuntimeError: a stage failed; the message says what to do, and finished stages stay
        finished. What can be checked before the first stage is checked before the folder is made or changed.
    """
    run = RunDir(folder or config.place)
    with HeldBack(progress) as opening, held(run.path, opening.say), full_disk_named(run.path):
        if repair:
            from_first("repair", lambda: _repair(run, config, opening.say))
        _run(run, Session(template_date.pin(config, [run.config]), progress), opening)
    return run


def _repair(run: RunDir, config: Config, say: Callable[[str], None]) -> None:
    """Puts damaged and edited files aside, so that the chain finds their stages stale."""
    links = [*chain(run, config), *(link for link, _ in control_links(run, config))]
    found = [*damages(run, links), *edited(links)]
    cache = Path(config.refine.cache or run.llm_cache)
    moved = put_aside(run, [damage.path for damage in found])
    for path, to in moved.items():
        say(f"{path}: put aside as {to}")
    for link in links:  # a checkpoint that was put aside is not one that was removed to save space
        if moved.keys() & set(link.removable) and link.folder.path not in moved:
            link.folder.forget(link.name)
    if (saved := stages.save_answers(cache)) is not None:
        say(saved)
    if not found and saved is None:
        say(f"{run.path}: nothing to repair")


def _run(run: RunDir, session: Session, opening: HeldBack) -> None:
    progress, began = session.progress, time.monotonic()
    session = session.settled()
    config = session.config
    with contextlib.ExitStack() as checked:
        checked.enter_context(session.stage())  # the first training reuses what the checks tokenize
        header = Header(session, opening)
        try:
            checked_plan = check_start(run, session, header)
        finally:
            header.say()  # before an error too
        if run.config.exists() and run.round(0).stages():
            run.log("resume")
        write_text(run.config, config.to_yaml())
        number = 0
        for plan, stage in _stages(checked_plan):
            stop_point()
            numbered = sum(link.name != PREPARE for link in plan.links)
            is_done = from_first(f"{stage.link.where}: is done", functools.partial(stage.is_done, config))
            if is_done and is_first():
                stage.link.adopt(config)
            if stage.link.name == PREPARE:
                if not is_done:
                    stage.do(plan)
                if plan.fresh is not None:
                    plan.fresh.data = None  # the other stages read the files
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
            if is_first():
                link.adopt(config)
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
