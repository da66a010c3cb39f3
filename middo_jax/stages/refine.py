"""The refinement stage: a round's selected samples -> requests, candidates, refined samples."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from middo_jax.config import Config, RefineSettings, replayed_file
from middo_jax.config.refine import Turns
from middo_jax.data.example import Example
from middo_jax.data.stored import Stored
from middo_jax.data.tokenize import steering_tokens
from middo_jax.parallel.coordination import Together, follow, lead
from middo_jax.refinement import (
    AnswerCache,
    BatchClient,
    ChatClient,
    Ledger,
    Outcome,
    Task,
    plan_tasks,
    prompts,
    run,
)
from middo_jax.refinement.endpoint.recording import read_recording
from middo_jax.refinement.meter import Meter
from middo_jax.refinement.taking_back import still_asked
from middo_jax.refinement.tasks import why_kept
from middo_jax.refinement.words import read_words
from middo_jax.rundir import RoundDir, RunError, chain, write_jsonl
from middo_jax.rundir.files import read_json
from middo_jax.rundir.records import RecordedRow
from middo_jax.session import Session
from middo_jax.signals.embeddings import require_embeddings
from middo_jax.signals.table import as_floats, read_scores
from middo_jax.stages.accept import Acceptance
from middo_jax.stages.endpoint import SERVE, STOP, embedded_name, endpoint, refines_itself, serving
from middo_jax.stages.measure import UnderTraining, scored_model
from middo_jax.stages.merge import lineage_scores, rows_of
from middo_jax.stages.replaying import attributed
from middo_jax.stages.surroundings import answer_cache, heldout_file, heldout_of, id_columns_of, model_of
from middo_jax.stages.taking_back import taken_back
from middo_jax.training.metrics import wrecked_from

FOLLOWED = "refine"  # the name of what process 0 leads
EMBEDDED_TIMEOUT_S = 3600.0  # of a request; an engine that fails says so itself
ITSELF = (
    "warning: the refiner is the model under training, which also measures the rewrites. It finds its own "
    "answers easy, good or bad. Name a stronger one: refine.base_url and refine.model; see docs/refine.md"
)
Ask = Callable[[Sequence[Task]], list[Outcome]]


def plan_refinement(directory: RoundDir, settings: RefineSettings | None = None) -> list[Task]:
    """Returns the refiner's tasks, planned from the folder's dataset, scores and selection.

    Of the settings, `refine.turns`, `refine.prompts` and `refine.take_back` are used.

    Raises:
      RunError: the folder has no selection.
      ConfigError: the file of `refine.prompts` cannot be used.
    """
    settings = settings or RefineSettings()
    own_words = read_words(settings.prompts)
    if not directory.is_done("select"):
        raise RunError(f"{directory.path}: no selection from its scores there; run `middo select` first")
    axes = read_json(directory.selection)["axes"]
    table = read_scores(directory.scores)
    selected = {id_ for facts in axes.values() for id_ in facts["ids"]}
    rows = rows_of(table, selected)
    # Without the other samples, of which there may be millions.
    shown = selected | {hint for row in rows for hint in row["knn_ids"] or ()}
    planned = plan_tasks(
        [example for example in Stored(directory.dataset) if example.id in shown],
        {axis: facts["ids"] for axis, facts in axes.items()},
        knn_ids={row["id"]: row["knn_ids"] or () for row in rows},
        scores=lineage_scores(table, rows),
        faults={row["id"]: row["fault"] for row in rows},
        turns=settings.turns,
    )
    asked = still_asked(planned, taken_back(directory, settings.take_back), directory.index)
    return [dataclasses.replace(task, words=own_words) for task in asked]


def check_learnt(config: Config, directory: RoundDir) -> None:
    """Raises RunError if training made the losses of the round's own samples far worse than they were before.

    A training of a few steps may end before its own losses show that. Nothing is checked outside of a run,
    whose two models may be any, and where `train.on_bad_step` has no number.
    """
    if directory.run is None:
        return
    table = read_scores(directory.scores)
    before, after = (float(np.nanmean(as_floats(table, name))) for name in ("loss_pre", "loss_post"))
    if config.train.on_bad_step.spike_factor is not None and after > wrecked_from(before):
        raise RunError(
            f"{directory.path}: training made the model worse on what it learnt, from {before:.4f} to "
            f"{after:.4f} nats per token; no rewrite is asked for. Lower train.learning_rate or look at the "
            "data; train.on_bad_step=stop or skip, without a number, lets this pass"
        )


def kept_samples(directory: RoundDir, turns: Turns) -> dict[str, int]:
    """Returns the number of selected samples without a task, by reason."""
    axes = read_json(directory.selection)["axes"]
    selected = {id_ for axis in axes.values() for id_ in axis["ids"]}
    reasons = (why_kept(e, turns) for e in Stored(directory.dataset) if e.id in selected)
    return dict(Counter(reason for reason in reasons if reason is not None))


def refine_round(session: Session, directory: RoundDir) -> Ledger:
    """Runs `refine_stage` with the held-out rows, cache, round index and model of the folder's run.

    Raises:
      RunError: see `check_learnt`.
    """
    check_learnt(session.config, directory)
    with answer_cache(session, directory) as cache:
        return refine_stage(
            session, directory, directory.index, cache, heldout_of(directory), model_of(directory)
        )


def refine_stage(
    session: Session,
    directory: RoundDir,
    round_index: int,
    cache: AnswerCache,
    heldout: Sequence[Example] = (),
    model: Path | None = None,
    batch: BatchClient | None = None,
) -> Ledger:
    """Rewrites the selected samples with the refiner and accepts or rejects the rewrites. Returns the cost.

    Writes requests.jsonl, refined.jsonl and candidates.jsonl. A rejected task is attempted up to
    `refine.max_attempts` times, with feedback from the gate. Each answer is cached when it arrives, so a
    restart pays for no request twice.

    Args:
      session: settings, tokenizer, mesh.
      directory: folder with dataset, scores and selection.
      round_index: index of the round, counted from 0.
      cache: cache of the refiner's answers.
      heldout: held-out examples, which no rewrite may repeat.
      model: M_t, which measures the rewrites; None takes the model that the folder's manifest names.
      batch: source of answers instead of an endpoint.

    Raises:
      NotAnswered: `batch` has unanswered requests; no file is written.
      RefinerError: the endpoint fails for every request; earlier answers stay in the cache.
    """
    config, began = session.config, time.monotonic()
    tasks = plan_refinement(directory, config.refine)
    kept = kept_samples(directory, config.refine.turns)
    for why, n in kept.items():
        session.progress.say(f"{n:,} selected samples stay as they are: {why}")
    measuring = None
    if config.refine.accept == "measured":
        measuring = model or scored_model(directory)
        require_embeddings(directory.embeddings)
    taken, files = chain.taken_back_file(directory, config), chain.refiner_files(config)
    begun = chain.refine(directory, heldout_file(directory), measuring, session.base, files, taken).begin()
    ledger = Ledger(cache, config.name, round_index) if batch is None else batch.ledger
    around = Around(round_index, cache, ledger, heldout, model, batch)
    outcomes, facts = ask_refiner(session, directory, tasks, around)
    write_outcomes(directory, outcomes)
    begun.finish(config, time.monotonic() - began, kept=kept, **facts)
    return ledger


class Around(NamedTuple):
    """What surrounds the tasks of one refinement; see `refine_stage`."""

    round_index: int
    cache: AnswerCache
    ledger: Ledger
    heldout: Sequence[Example] = ()
    model: Path | None = None
    batch: BatchClient | None = None


def ask_refiner(
    session: Session, directory: RoundDir, tasks: Sequence[Task], around: Around
) -> tuple[list[Outcome], dict[str, Any]]:
    """Returns the outcomes in the order of the tasks, and facts for the record; writes candidates.jsonl."""
    ids = id_columns_of(directory)
    tasks = [dataclasses.replace(task, id_columns=ids) for task in tasks]
    if tasks and refines_itself(session):
        session.progress.say(ITSELF)
    with session.stage(), lead(FOLLOWED) as together:
        refiner = _refiner(session, around, together)
        acceptance = Acceptance(session, directory, around.heldout, around.model, together)
        outcomes = _attempts(tasks, refiner, acceptance, session.config.refine.max_attempts)
    outcomes, recorded = _recorded(session, outcomes, around.cache)
    facts = {
        "n": len(outcomes),
        "accepted": sum(o.example is not None for o in outcomes),
        "usage": around.ledger.to_json(),
        "limits": dataclasses.asdict(acceptance.limits),
    }
    return outcomes, facts | ({} if recorded is None else {"recorded": recorded})


def write_outcomes(directory: RoundDir, outcomes: Sequence[Outcome]) -> None:
    """Writes requests.jsonl and refined.jsonl."""
    write_jsonl(directory.requests, (row for o in outcomes for row in o.request_rows()))
    write_jsonl(directory.refined, (o.to_json() for o in outcomes))


def _recorded(
    session: Session, outcomes: list[Outcome], cache: AnswerCache
) -> tuple[list[Outcome], RecordedRow | None]:
    """The outcomes with their writers, and where recorded answers came from; None if none were replayed."""
    file = replayed_file(session.config.refine.base_url)
    if file is None:
        return outcomes, None
    found, facts = attributed(outcomes, cache, read_recording(file), embedded_name(session.config))
    n, misses = facts["answers"], facts["misses"]
    others = f"; {misses:,} were missing and came from {facts['embedded']}" if misses else ""
    session.progress.say(f"{n - misses:,} of {n:,} answers are recorded, from {facts['model']}{others}")
    return found, facts


def follow_refinement(session: Session, directory: RoundDir) -> None:
    """Serves and measures with the first process. Called by all others."""
    model, under = model_of(directory) or scored_model(directory), None
    with session.stage(), contextlib.ExitStack() as servers:
        for told in follow(FOLLOWED):
            if SERVE in told:
                servers.enter_context(serving(session))
                continue
            if STOP in told:
                servers.close()
                gc.collect()
                continue
            if told["loads"] or under is None:  # process 0 loads the model for each attempt
                under = None
                gc.collect()
                under = UnderTraining(session, directory, model)
            under.follow(told)


def _attempts(
    tasks: Sequence[Task],
    refiner: contextlib.AbstractContextManager[Ask],
    acceptance: Acceptance,
    most: int,
) -> list[Outcome]:
    """Returns the final outcome of each task, in order, after at most `most` attempts."""
    if not tasks:
        return acceptance.decide([])
    ended: dict[str, Outcome] = {}
    left = list(tasks)
    with contextlib.ExitStack() as stack:
        ask = stack.enter_context(refiner)
        for attempt in range(1, most + 1):
            asked = ask(left)
            if attempt == most:  # frees an embedded model's memory before the last measurement
                stack.close()
            decided = acceptance.decide(asked)
            for outcome in decided:
                earlier = ended.get(outcome.task.task_id)
                ended[outcome.task.task_id] = outcome.after(earlier) if earlier else outcome
            left = [again for outcome in decided if (again := outcome.next_attempt()) is not None]
            if not left:
                break
    return [ended[task.task_id] for task in tasks]


@contextlib.contextmanager
def _refiner(session: Session, around: Around, together: Together) -> Iterator[Ask]:
    """Yields a function that runs one attempt of some tasks. An embedded endpoint serves all attempts."""
    config, steering = session.config, steering_tokens(session.tokenizer)
    round_index, cache, ledger, _, _, batch = around

    def take(tasks: Sequence[Task]) -> list[Outcome]:
        assert batch is not None
        return run(tasks, batch, config.refine, round_index, special_tokens=steering)

    if batch is not None:
        yield take
        return
    with endpoint(session, together) as served:
        settings = config.refine
        if served.revision is not None:
            settings = settings.model_copy(update={"model_revision": served.revision})
        if not served.sends_key:  # a repeated request would begin the same answer again, on the same devices
            settings = settings.model_copy(update={"timeout": max(settings.timeout, EMBEDDED_TIMEOUT_S)})

        def ask(tasks: Sequence[Task]) -> list[Outcome]:
            attempt = tasks[0].attempt + 1
            requests = prompts.requests(served.model, settings, config.seed, tasks[0].words)
            name = "rewrites" if attempt == 1 else f"rewrites, attempt {attempt}"
            if served.recording is not None:  # what its server could do is part of the recording
                cache.learn(requests.form_fact, served.recording.form)
            client = ChatClient(
                requests,
                served.url,
                cache,
                sends_key=served.sends_key,
                token=served.token,
                ledger=ledger,
            )
            with session.progress.task(name) as advance:
                meter = Meter(ledger, len(tasks), client.endpoints.all)

                def on_done(outcome: Outcome) -> None:
                    note = meter.ended(outcome)
                    advance(meter.done, len(tasks), note)

                return run(tasks, client, config.refine, round_index, on_done, special_tokens=steering)

        yield ask
