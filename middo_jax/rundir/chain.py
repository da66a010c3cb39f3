"""The chain of stages: the files that each reads and writes, and the effects of settings it depends on.

`rundir/link.py` says what a link is and when it is stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from middo_jax.config import Config, Effect, replayed_file
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.link import Link
from middo_jax.rundir.stopping import Course, course

# The effects of settings that each stage depends on. "prepare" is the first round's, which reads the user's
# data; "prepare_later" is a later round's. Effects of stages whose files a stage reads need not be repeated.
AFFECTED_BY: Mapping[str, frozenset[Effect]] = {
    "prepare": frozenset(("data", "text")),  # the tokenizer is an input of its own
    "prepare_later": frozenset(("growth",)),
    "train": frozenset(("training", "text", "model")),
    "score": frozenset(("scores", "text", "model")),
    "select": frozenset(("selection",)),
    "take_back": frozenset(),
    "refine": frozenset(("rewrites", "acceptance", "text", "model")),
    "merge": frozenset(("growth",)),
    "heldout": frozenset(("text", "model")),
    "best": frozenset(),
    "evaluate": frozenset(("text", "model", "contrast")),
    "benchmark": frozenset(("benchmarks", "text", "model")),
    "export": frozenset(("model",)),
}


def chain(
    run: RunDir,
    config: Config,
    base: Path | None = None,
    data: Mapping[str, Path] | None = None,
    so_far: Course | None = None,
) -> list[Link]:
    """Returns all stages of a run in order; with `stop.patience` up to the end of the rounds, if it is known.

    Args:
      run: the run.
      config: settings; `rounds`, `stop`, `train.start_from` and `refine.accept` are used.
      base: the base model's directory; None if it is not known.
      data: files and folders of the user's data by role; None if they are not known.
      so_far: the trainings that were measured, if `stop.patience` is set; None reads them from the run.
    """
    links = [prepare(run, data, base)]
    stops = config.stop.patience is not None
    so_far = so_far or (course(run, config) if stops else None)
    last = config.rounds if so_far is None or so_far.last is None else so_far.last
    ends = [*(run.round(t) for t in range(last)), run.round(last) if stops else run.final]
    benchmarks: list[Link] = []
    for t, here in enumerate(ends):
        earlier = ends[t - 1] if t else None
        previous = base if earlier is None else earlier.checkpoint
        start = previous if config.train.start_from == "previous" else base
        if earlier is not None:
            links.append(prepare_later(here, earlier, _taken_back(earlier, config, t - 1)))
        links.append(train(here, start, base))
        is_first = earlier is None
        benchmarks = [benchmark(here, config, base, is_first)] if config.evaluate.tasks else []
        if stops:
            by_task = config.stop.metric == "task"
            links += benchmarks if by_task else [heldout(here, run, base)]
            benchmarks = [] if by_task else benchmarks
        if here is ends[-1]:
            break
        measuring = here.checkpoint if config.refine.accept == "measured" else None
        rated = score(here, here.checkpoint, start, rubric=own_file(config.quality.rubric), tokenizer=base)
        scored = dataclasses.replace(rated, earlier=earlier)
        taken = _taken_back(here, config, t)
        refined = refine(here, run.heldout, measuring, base, refiner_files(config), taken)
        links += [scored, select(here)]
        if taken is not None and earlier is not None:
            links.append(take_back(here, earlier, _taken_back(earlier, config, t - 1)))
        links += [refined, merge(here, taken), *benchmarks]
    if so_far is not None:
        links += [*benchmarks, best(run, ends, so_far)]
        ends, benchmarks = [*ends, run.final], []  # the best training has the benchmarks of its own round
    return [*links, evaluate(run, config, ends, base), *benchmarks, export(run.final, base)]


def prepare(run: RunDir, data: Mapping[str, Path] | None, base: Path | None = None) -> Link:
    """The user's data -> the first round's dataset, held-out rows and rejected rows."""
    here = run.round(0)
    writes = (here.dataset, run.heldout, run.rejected)
    return Link("prepare", here, AFFECTED_BY["prepare"], (), writes, data=data, tokenizer=base)


def prepare_later(here: RoundDir, earlier: RoundDir, taken: Path | None = None) -> Link:
    """A round with its rewrites -> the next round's dataset, the last one in the user's format too."""
    files = (earlier.dataset, earlier.scores, earlier.selection, earlier.refined, *_verdicts(earlier))
    files += () if taken is None else (taken,)
    writes = (here.dataset, here.own_format) if here.path.name == "final" else (here.dataset,)
    return Link("prepare", here, AFFECTED_BY["prepare_later"], files, writes, earlier=earlier)


def train(here: RoundDir, start: Path | None, tokenizer: Path | None) -> Link:
    """Dataset -> checkpoint, from the weights of `start`."""
    writes = (here.checkpoint, here.metrics)
    return Link(
        "train",
        here,
        AFFECTED_BY["train"],
        (here.dataset,),
        writes,
        {"start": start},
        tokenizer=tokenizer,
        may_write=(here.evaluations,),
        # The last training's checkpoint is the run's result and is never removed to save space.
        removable=(here.checkpoint,) if here.run is not None else (),
    )


def score(
    here: RoundDir,
    model: Path,
    pre_model: Path | None,
    base: Path | None = None,
    rubric: Path | None = None,
    tokenizer: Path | None = None,
) -> Link:
    """Dataset -> scores and embeddings, under the model after training and the one before.

    `base`: that of an adapter, whose own files do not contain it; in a run, the training's record has it.
    """
    models, writes = {"model": model, "pre_model": pre_model}, (here.scores, here.embeddings)
    models |= {} if base is None else {"base": base}
    data = {} if rubric is None else {"rubric": rubric}
    affected = AFFECTED_BY["score"]
    return Link("score", here, affected, (here.dataset,), writes, models, data, tokenizer=tokenizer)


def select(here: RoundDir) -> Link:
    """Scores -> one set of samples per axis."""
    writes = (here.selected, here.selection)
    return Link("select", here, AFFECTED_BY["select"], (here.scores,), writes)


def own_file(path: str | None) -> Path | None:
    """A file of the user's that a setting names."""
    return None if path is None else Path(path).expanduser()


def refine(
    here: RoundDir,
    heldout: Path | None,
    model: Path | None,
    base: Path | None = None,
    data: Mapping[str, Path] | None = None,
    taken: Path | None = None,
) -> Link:
    """The selected samples -> rewrites; `model` measures them, None if they are not measured.

    `data`: the user's files, see `refiner_files`. `taken`: what is taken back, see `taken_back_file`.
    """
    held = () if heldout is None else (heldout,)
    measured = () if model is None else (here.embeddings,)
    files = (
        here.dataset,
        here.scores,
        here.selection,
        *held,
        *measured,
        *(() if taken is None else (taken,)),
    )
    writes = (here.requests, here.refined, here.candidates)
    models, affected = {"model": model}, AFFECTED_BY["refine"]
    return Link("refine", here, affected, files, writes, models, data or {}, tokenizer=base)


def refiner_files(config: Config) -> dict[str, Path]:
    """The user's files that the refiner's requests and answers depend on, by role.

    `refiner` is the model that the embedded endpoint serves, if it is not the base model.
    """
    settings = config.refine
    recorded = replayed_file(settings.base_url)
    is_embedded = settings.base_url is None or recorded is not None
    found = {
        "prompts": own_file(settings.prompts),
        "recorded": None if recorded is None else own_file(str(recorded)),
        "refiner": own_file(settings.model) if is_embedded else None,
    }
    return {role: path for role, path in found.items() if path is not None}


def take_back(here: RoundDir, earlier: RoundDir, taken: Path | None) -> Link:
    """The selections of two rounds -> the rewrites that are worse than their originals were."""
    before = (earlier.dataset, earlier.refined, earlier.selected, *_verdicts(earlier))
    files = (*before, *(() if taken is None else (taken,)), here.dataset, here.selected)
    return Link("take_back", here, AFFECTED_BY["take_back"], files, (here.taken_back,), earlier=earlier)


def taken_back_file(here: RoundDir, config: Config) -> Path | None:
    """The round's taken_back.jsonl, if `refine.take_back` is on and a round is before it."""
    return _taken_back(here, config, here.index)


def _taken_back(here: RoundDir, config: Config, index: int) -> Path | None:
    return here.taken_back if config.refine.take_back and index > 0 else None


def merge(here: RoundDir, taken: Path | None = None) -> Link:
    """Rewrites -> the samples that are dropped to make room for them."""
    files = (here.dataset, here.scores, here.selection, here.refined, *_verdicts(here))
    files += () if taken is None else (taken,)
    return Link("merge", here, AFFECTED_BY["merge"], files, (here.dropped,))


def _verdicts(here: RoundDir) -> tuple[Path, ...]:
    """People's verdicts, which no stage writes."""
    return (here.verdicts,) if here.verdicts.exists() else ()


def evaluate(run: RunDir, config: Config, trained: Iterable[RoundDir], base: Path | None) -> Link:
    """Held-out rows -> their losses, and with `evaluate.contrast` margins, under the base and every model."""
    models = {"base": base} | {directory.path.name: directory.checkpoint for directory in trained}
    writes = (run.heldout_losses, run.heldout_rows)
    writes += (run.contrast_rows,) if config.evaluate.contrast else ()
    return Link("evaluate", run.final, AFFECTED_BY["evaluate"], (run.heldout,), writes, models)


def heldout(here: RoundDir, run: RunDir, tokenizer: Path | None) -> Link:
    """Held-out rows -> their losses under the round's model, which decide when the rounds end."""
    writes, models = (here.heldout_losses, here.heldout_rows), {here.path.name: here.checkpoint}
    affected = AFFECTED_BY["heldout"]
    return Link("heldout", here, affected, (run.heldout,), writes, models, tokenizer=tokenizer)


def best(run: RunDir, trained: Sequence[RoundDir], so_far: Course) -> Link:
    """Dataset and checkpoint of the best training -> those of `final`.

    It reads the measurements of all trainings, which decide which of them is the best.
    """
    here, final = trained[so_far.best or 0], run.final
    by_task = so_far.metric == "task"
    measured = [of.benchmarks if by_task else of.heldout_losses for of in trained]
    writes = (final.dataset, final.own_format, final.checkpoint)
    files = (here.dataset, *measured)
    return Link("best", final, AFFECTED_BY["best"], files, writes, {"model": here.checkpoint}, earlier=here)


def benchmark(here: RoundDir, config: Config, base: Path | None, is_first: bool) -> Link:
    """The round's model, in the first round also `base` -> their scores on `evaluate.tasks`."""
    models: dict[str, Path | None] = {"base": base} if is_first else {}
    models |= {here.path.name: here.checkpoint}
    places = {"local_data": config.evaluate.local_data, "include_path": config.evaluate.include_path}
    data = {role: Path(path).expanduser() for role, path in places.items() if path is not None}
    affected, writes = AFFECTED_BY["benchmark"], (here.benchmarks,)
    return Link("benchmark", here, affected, (), writes, models, data, tokenizer=base)


def export(final: RoundDir, base: Path | None) -> Link:
    """The last checkpoint, and the base model's tokenizer -> a Hugging Face directory."""
    writes, models = (final / "huggingface",), {"model": final.checkpoint}
    return Link("export", final, AFFECTED_BY["export"], (), writes, models, tokenizer=base)
