"""The chain of stages: the files that each reads and writes, its settings, and which stages are stale.

    for link, state in assess(chain(run, config), config): ...

A stage is stale if a file it wrote is missing or damaged, if a setting it depends on or a file it read has
changed, or if it reads a file that a stale stage writes. Nothing else makes a stage stale.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.config import Config, Effect, affecting, default_of, replayed_file
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.manifest import TOKENIZER, Manifest, Reason, Seen
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
    "evaluate": frozenset(("text", "model")),
    "benchmark": frozenset(("benchmarks", "text", "model")),
    "export": frozenset(("model",)),
}

# Settings that name a place, and the roles under which its content is recorded: a moved model is the same.
_PLACES = {
    "model.path": (TOKENIZER, "base", "start", "pre_model", "model"),
    "data.path": ("data",),
    "refine.prompts": ("prompts",),
    "quality.rubric": ("rubric",),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """A stage in the chain: its inputs, outputs and dependencies.

    Attributes:
      name: of the stage, as in the manifest.
      folder: its manifest records the stage.
      affected_by: the effects of settings that it depends on.
      files: what it reads within the run, models aside.
      writes: files, or folders.
      may_write: files that it writes under some settings and that no stage reads.
      removable: what it wrote and may be removed to save space; made again when another stage needs it.
      models: the models that it reads, by role; None where the place is not known.
      data: files and folders of the user's data by role, if it reads them and the places are known.
      tokenizer: the base model's directory, if it reads its files except the weights and the place is known.
      earlier: the round before this folder's, if there is one.
    """

    name: str
    folder: RoundDir
    affected_by: frozenset[Effect]
    files: tuple[Path, ...]
    writes: tuple[Path, ...]
    models: Mapping[str, Path | None] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    earlier: RoundDir | None = None
    tokenizer: Path | None = None
    may_write: tuple[Path, ...] = ()
    removable: tuple[Path, ...] = ()

    @property
    def where(self) -> str:
        """Folder and name, such as `round_00 score`."""
        return f"{self.folder.path.name} {self.name}"

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files within the run that the stage reads.

        A checkpoint is represented by its metadata.json, which contains the identity of the training and so
        determines every weight. The training's record contains the files of the weights.
        """
        ours = (path / "metadata.json" for path in self.models.values() if path and _is_ours(path))
        return (*self.files, *dict.fromkeys(ours))

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and folders outside the run that the stage reads, by role."""
        roles = {**self.data, TOKENIZER: self.tokenizer, **self.models}
        return {role: p for role, p in roles.items() if p and not _is_ours(p) and p.exists()}

    @property
    def removed(self) -> tuple[Path, ...]:
        """The paths of `removable` that do not exist."""
        return tuple(path for path in self.removable if not path.exists())

    @property
    def missing_models(self) -> tuple[Path, ...]:
        """Checkpoints of the run that it reads and that do not exist."""
        return tuple(p for p in self.models.values() if p is not None and _is_ours(p) and not p.exists())

    def begin(self) -> Begun:
        """Starts the stage, before it reads anything. Raises RunError for files of a newer version."""
        for folder in {self.folder.path, *(path.parent for path in self.reads)}:
            Manifest(folder).records()
        return Begun(self, Manifest(self.folder.path).see(self.reads, self.inputs))

    def why_stale(self, config: Config) -> Reason | None:
        """Returns why the stage's record is stale, None if it is not. Ignores the state of earlier stages."""
        manifest = Manifest(self.folder.path)
        record = manifest.records()[self.name]
        if "settings" not in record:  # the previous version's: it contains only the names of files
            return manifest.why_stale(self.name)
        before = record["settings"]
        settings = self._settings(config, record["inputs"])
        # First the recorded settings: one that is not recorded may matter only because one of these changed.
        for name in sorted(settings, key=lambda name: name not in before):
            if (was := before.get(name, default_of(name))) != (now := settings[name]):
                return Reason(f"{name} was {_shown(was)}, is {_shown(now)}")
        if (reason := manifest.why_stale(self.name, self.inputs, self.removed)) is not None:
            return reason
        wrote = record["files"]
        for name in map(manifest.name, self.writes):  # a folder is recorded file by file
            if not any(file == name or file.startswith(f"{name}/") for file in wrote):
                return Reason(f"it writes {name} now")
        known = {*record["reads"], *record["inputs"], TOKENIZER}  # older records do not have the last
        for name in (*map(manifest.name, self.reads), *self.inputs):
            if name not in known:
                return Reason(f"it reads {name} now", input=name if name in self.inputs else None)
        reads = {*map(manifest.name, self.reads)}
        for name in record["reads"]:  # models aside: the place of one may not be known here
            if name not in reads and not name.endswith("/metadata.json"):
                return Reason(f"it does not read {name} any more")
        return None

    def _settings(self, config: Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The settings it depends on, without the names of places whose content is compared."""
        settings = affecting(config, self.affected_by)
        for name, roles in _PLACES.items():
            if any(role in inputs and role in self.inputs for role in roles):
                settings.pop(name, None)
        return settings


class Begun(NamedTuple):
    """A started stage, and the hashes of its inputs at the start."""

    link: Link
    seen: Seen

    def finish(self, config: Config, seconds: float, **facts: Any) -> None:
        """Records the stage as done under these settings."""
        link = self.link
        settings = affecting(config, link.affected_by)
        wrote = (*link.writes, *(path for path in link.may_write if path.exists()))
        link.folder.finish(link.name, wrote, seconds, seen=self.seen, settings=settings, **facts)


class State(NamedTuple):
    """State of a stage. `is_done`: it has a record; `why`: why the record is stale, None if it is not."""

    is_done: bool
    why: Reason | None

    @property
    def is_fresh(self) -> bool:
        """Whether the stage is done and not stale."""
        return self.is_done and self.why is None


def assess(links: Sequence[Link], config: Config) -> list[tuple[Link, State]]:
    """Returns the state of each link under these settings, in order."""
    states: list[tuple[Link, State]] = []
    pending: list[tuple[Path, Link]] = []  # paths that will be rewritten, and the first link that causes it
    for link in links:
        record = link.folder.stages().get(link.name)
        why = None if record is None else link.why_stale(config)
        cause = next((of for path, of in pending for read in link.reads if read.is_relative_to(path)), None)
        if record is not None and why is None and cause is not None and "settings" in record:
            why = Reason(f"follows {cause.where}", is_forecast=True)
        states.append((link, State(record is not None, why)))
        if record is None or why is not None:
            pending += [(path, cause or link) for path in link.writes]
    return states


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
    links = [prepare(run, data or {}, base)]
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
        links.append(train(here, start))
        benchmarks = [benchmark(here, config, None if earlier else base)] if config.evaluate.tasks else []
        if stops:
            by_task = config.stop.metric == "task"
            links += benchmarks if by_task else [heldout(here, run)]
            benchmarks = [] if by_task else benchmarks
        if here is ends[-1]:
            break
        measuring = here.checkpoint if config.refine.accept == "measured" else None
        rated = score(here, here.checkpoint, start, rubric=own_file(config.quality.rubric))
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
    return [*links, evaluate(run, ends, base), *benchmarks, export(run.final, base)]


def prepare(run: RunDir, data: Mapping[str, Path], base: Path | None = None) -> Link:
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


def train(here: RoundDir, start: Path | None) -> Link:
    """Dataset -> checkpoint, from the weights of `start`."""
    writes = (here.checkpoint, here.metrics)
    return Link(
        "train",
        here,
        AFFECTED_BY["train"],
        (here.dataset,),
        writes,
        {"start": start},
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
) -> Link:
    """Dataset -> scores and embeddings, under the model after training and the one before.

    `base`: that of an adapter, whose own files do not contain it; in a run, the training's record has it.
    """
    models, writes = {"model": model, "pre_model": pre_model}, (here.scores, here.embeddings)
    models |= {} if base is None else {"base": base}
    data = {} if rubric is None else {"rubric": rubric}
    return Link("score", here, AFFECTED_BY["score"], (here.dataset,), writes, models, data)


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
    """The user's files that the refiner's requests and answers depend on, by role."""
    recorded = replayed_file(config.refine.base_url)
    found = {
        "prompts": own_file(config.refine.prompts),
        "recorded": None if recorded is None else own_file(str(recorded)),
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


def evaluate(run: RunDir, trained: Iterable[RoundDir], base: Path | None) -> Link:
    """Held-out rows -> their losses under the base and every trained model."""
    models = {"base": base} | {directory.path.name: directory.checkpoint for directory in trained}
    writes = (run.heldout_losses, run.heldout_rows)
    return Link("evaluate", run.final, AFFECTED_BY["evaluate"], (run.heldout,), writes, models)


def heldout(here: RoundDir, run: RunDir) -> Link:
    """Held-out rows -> their losses under the round's model, which decide when the rounds end."""
    writes, models = (here.heldout_losses, here.heldout_rows), {here.path.name: here.checkpoint}
    return Link("heldout", here, AFFECTED_BY["heldout"], (run.heldout,), writes, models)


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


def benchmark(here: RoundDir, config: Config, base: Path | None) -> Link:
    """The round's model, and before it `base` if there is one -> their scores on `evaluate.tasks`."""
    models = {} if base is None else {"base": base}
    models |= {here.path.name: here.checkpoint}
    local = config.evaluate.local_data
    data = {} if local is None else {"local_data": Path(local).expanduser()}
    return Link("benchmark", here, AFFECTED_BY["benchmark"], (), (here.benchmarks,), models, data)


def export(final: RoundDir, base: Path | None) -> Link:
    """The last checkpoint, and the base model's tokenizer -> a Hugging Face directory."""
    writes, models = (final / "huggingface",), {"model": final.checkpoint}
    return Link("export", final, AFFECTED_BY["export"], (), writes, models, tokenizer=base)


def _is_ours(model: Path) -> bool:
    """Whether a path is a checkpoint of this package; it may be missing or incomplete."""
    others = ("config.json", "adapter_config.json")
    named = model.name == "checkpoint" and not any((model / name).exists() for name in others)
    return named or (model / "metadata.json").exists()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
