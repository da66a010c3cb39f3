"""The closed loop: train, score, select, refine, merge, round after round; then a last training, judged.

Every step asks the manifests whether it is done already, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from middo_jax import stages
from middo_jax.config import Config
from middo_jax.data.example import Example
from middo_jax.progress import Progress, duration
from middo_jax.report.build import build
from middo_jax.report.status import load_settings
from middo_jax.run_dir import RoundDir, RunDir, RunError, read_jsonl, write_jsonl, write_text
from middo_jax.session import Session, prepare, write_dataset

# Settings that may change between two starts of a run: they touch speed, cost and place, not the result.
MAY_CHANGE = (
    "runs_dir",
    "mesh",
    "model.attention",
    "scoring",
    "serve.host",
    "serve.port",
    "serve.max_batch",
    "train.save_every",
    "train.keep",
    "train.eval_every",
    "train.keep_best",
    "train.tensorboard",
    "train.wandb_project",
    "train.remat",
    "refine.base_url",
    "refine.api_key_env",
    "refine.concurrency",
    "refine.max_retries",
    "refine.timeout",
    "refine.budget_usd",
    "refine.budget_tokens",
    "refine.requests_per_minute",
    "refine.tokens_per_minute",
    "refine.prices",
)


def run_loop(config: Config, progress: Progress) -> RunDir:
    """Runs all rounds, or what is left of them; returns the run's folder with its report.

    Raises:
      RunError: the folder holds a run with other settings.
      ValueError, RuntimeError: whatever stage fails says what to do; what was done stays done.
    """
    run = RunDir(Path(config.runs_dir) / config.name)
    open_run(run, config)
    session = Session(config, progress)
    heldout = _prepare(run, session)
    steps = [*_round_steps(run, session, heldout), *_final_steps(run, session, heldout)]
    began = time.monotonic()
    for number, (directory, stage, work) in enumerate(steps, 1):
        where = f"[{number}/{len(steps)}] {directory.path.name} {stage}"
        if directory.is_done(stage):
            progress.say(f"{where}: done before")
            continue
        progress.say(where)
        run.log("start", round=directory.path.name, stage=stage)
        work()
        run.log("done", round=directory.path.name, stage=stage)
    build(run)
    run.log("report")
    progress.say(f"done in {duration(time.monotonic() - began)}")
    return run


def open_run(run: RunDir, config: Config) -> None:
    """Writes config.yaml, or checks that the folder's run has the same settings.

    Raises:
      RunError: it has others; the message names them. Or config.yaml cannot be read.
    """
    if run.config.exists() and run.round(0).stages():  # before the first, nothing depends on the settings
        before = _flat(load_settings(run))
        now = _flat(config.model_dump(mode="json"))
        differing = [k for k in sorted(before | now) if before.get(k) != now.get(k) and not _may_change(k)]
        if differing:
            shown = ", ".join(f"{k} ({before.get(k)} there, {now.get(k)} now)" for k in differing)
            raise RunError(
                f"{run.path} holds a run with other settings: {shown}. Give this run another name "
                f"(name=...), or delete that folder."
            )
        run.log("resume")
    write_text(run.config, config.to_yaml())


Step = tuple[RoundDir, str, Callable[[], Any]]


def _prepare(run: RunDir, session: Session) -> list[Example]:
    first = run.round(0)
    if not first.is_done("prepare"):
        kept, heldout, rejections = prepare(session)
        write_jsonl(run.rejected, (r.to_json() for r in rejections))
        write_jsonl(run.heldout, (e.to_json() for e in heldout))
        write_dataset(first, kept)
    return [Example.from_json(row) for row in read_jsonl(run.heldout)]


def _round_steps(run: RunDir, session: Session, heldout: list[Example]) -> list[Step]:
    config, steps = session.config, []
    for t in range(config.rounds):
        here = run.round(t)
        following = run.round(t + 1) if t + 1 < config.rounds else run.final
        earlier = run.round(t - 1) if t else None
        previous = earlier.checkpoint if earlier else None
        start = _start(session, previous, config.train.start_from)
        pre_model = _start(session, previous, config.complexity.pre_model)

        def score(
            here: RoundDir = here,
            pre_model: Callable[[], Path] = pre_model,
            earlier: RoundDir | None = earlier,
        ) -> None:
            stages.score_stage(session, here, here.checkpoint, pre_model(), earlier=earlier)

        def refine(here: RoundDir = here, t: int = t) -> None:
            from middo_jax.refine import AnswerCache

            cache = AnswerCache(config.refine.cache or run.llm_cache)
            try:
                stages.refine_stage(session, here, t, cache, heldout, here.checkpoint)
            finally:
                cache.close()

        def merge(here: RoundDir = here, following: RoundDir = following) -> None:
            began = time.monotonic()
            write_dataset(following, stages.merge_stage(session, here))
            here.finish("merge", [here.dropped], time.monotonic() - began)

        steps += [
            (here, "train", lambda h=here, s=start: stages.train_stage(session, h, s(), heldout)),
            (here, "score", score),
            (here, "select", lambda h=here: stages.select_stage(session, h)),
            (here, "refine", refine),
            (here, "merge", merge),
        ]
    return steps


def _start(session: Session, previous: Path | None, which: str) -> Callable[[], Path]:
    if which == "previous" and previous is not None:
        return lambda: previous
    return lambda: session.base


def _final_steps(run: RunDir, session: Session, heldout: list[Example]) -> list[Step]:
    final, config = run.final, session.config
    last = run.round(config.rounds - 1).checkpoint
    start = _start(session, last, config.train.start_from)

    def evaluate() -> None:
        began = time.monotonic()
        models = {"base": session.base} | {d.path.name: d.checkpoint for d in [*run.rounds(), final]}
        losses = stages.measure_heldout(session, run, models, heldout)
        final.finish("evaluate", [], time.monotonic() - began, losses=losses)

    def export() -> None:
        began = time.monotonic()
        out = final / "huggingface"
        shutil.rmtree(out, ignore_errors=True)  # of a run that ended before the manifest could name it
        facts = stages.export_checkpoint(
            final.checkpoint, out, config.model.dtype, session.progress, mesh=session.mesh
        )
        final.finish("export", [out], time.monotonic() - began, **facts)

    return [
        (final, "train", lambda: stages.train_stage(session, final, start(), heldout)),
        (final, "evaluate", evaluate),
        (final, "export", export),
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _may_change(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
