"""The chain of stages: which files each reads and writes, which settings it depends on, and what is stale.

    for link, state in assess(chain(run, config), config): ...

A stage is stale if a file it wrote is missing or damaged, if a setting it depends on or a file it read has
changed, or if it reads what a stale stage writes. Nothing else makes a stage stale.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.config import Config, Effect, affecting, default_of
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.manifest import Manifest, Seen

# What each stage depends on. "prepare" is the first round's, which reads the user's data; "follow" prepares a
# later one. A stage that reads another's files need not repeat that one's effects.
AFFECTED_BY: Mapping[str, frozenset[Effect]] = {
    "prepare": frozenset(("data", "text", "model")),
    "follow": frozenset(("growth",)),
    "train": frozenset(("training", "text", "model")),
    "score": frozenset(("scores", "text", "model")),
    "select": frozenset(("selection",)),
    "refine": frozenset(("rewrites", "acceptance", "text", "model")),
    "merge": frozenset(("growth",)),
    "evaluate": frozenset(("text", "model")),
    "export": frozenset(("model",)),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """What a stage is to the chain.

    Attributes:
      name: of the stage, as in the manifest.
      folder: its manifest records the stage.
      affected_by: the effects of settings that it depends on.
      files: what it reads within the run, models aside.
      writes: files, or folders.
      models: the models that it reads, by role; None where the place is not known.
      data: files and folders of the user's data by role, if it reads them and the places are known.
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

    @property
    def where(self) -> str:
        """Such as `round_00 score`."""
        return f"{self.folder.path.name} {self.name}"

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files within the run.

        A checkpoint is known by its metadata.json, which names the training that decided every weight; the
        files of the weights are in the record of that training.
        """
        ours = (path / "metadata.json" for path in self.models.values() if path and _is_ours(path))
        return (*self.files, *dict.fromkeys(ours))

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and folders outside of the run, by role."""
        roles = {**self.data, **self.models}
        return {role: p for role, p in roles.items() if p and not _is_ours(p) and p.exists()}

    def begin(self) -> Begun:
        """To be called before the stage reads anything. Refuses what a newer version wrote."""
        for folder in {self.folder.path, *(path.parent for path in self.reads)}:
            Manifest(folder).records()
        return Begun(self, Manifest(self.folder.path).see(self.reads, self.inputs))

    def why_stale(self, config: Config) -> str | None:
        """Why the record of the stage is stale, None if it is not; the stages before it are not looked at."""
        manifest = Manifest(self.folder.path)
        record = manifest.records()[self.name]
        if "settings" not in record:  # the previous version's: it says which files there were, no more
            return manifest.why_stale(self.name)
        before = record["settings"]
        settings = affecting(config, self.affected_by)
        # First what the record names: what it does not name may be asked now because of such a change.
        for name in sorted(settings, key=lambda name: name not in before):
            if (was := before.get(name, default_of(name))) != (now := settings[name]):
                return f"{name} was {_shown(was)}, is {_shown(now)}"
        if (reason := manifest.why_stale(self.name)) is not None:
            return reason
        wrote = record["files"]
        for name in map(manifest.name, self.writes):  # a folder is recorded file by file
            if not any(file == name or file.startswith(f"{name}/") for file in wrote):
                return f"it writes {name} now"
        known = {*record["reads"], *record["inputs"]}
        new = [n for n in (*map(manifest.name, self.reads), *self.inputs) if n not in known]
        return f"it reads {new[0]} now" if new else None


class Begun(NamedTuple):
    """A stage under way, and what it found to read."""

    link: Link
    seen: Seen

    def finish(self, config: Config, seconds: float, **facts: Any) -> None:
        """Records the stage as done under these settings."""
        link = self.link
        settings = affecting(config, link.affected_by)
        link.folder.finish(link.name, link.writes, seconds, seen=self.seen, settings=settings, **facts)


class State(NamedTuple):
    """Where a stage stands: `is_done` if it has a record, and `why` that is stale, None if it is not."""

    is_done: bool
    why: str | None

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has to be done."""
        return self.is_done and self.why is None


def assess(links: Sequence[Link], config: Config) -> list[tuple[Link, State]]:
    """The state of each link under these settings, in order."""
    states: list[tuple[Link, State]] = []
    pending: list[tuple[Path, Link]] = []  # what will be written anew, and the first link to blame
    for link in links:
        record = link.folder.stages().get(link.name)
        why = None if record is None else link.why_stale(config)
        cause = next((of for path, of in pending for read in link.reads if read.is_relative_to(path)), None)
        if record is not None and why is None and cause is not None and "settings" in record:
            why = f"follows {cause.where}"
        states.append((link, State(record is not None, why)))
        if record is None or why is not None:
            pending += [(path, cause or link) for path in link.writes]
    return states


def chain(
    run: RunDir, config: Config, base: Path | None = None, data: Mapping[str, Path] | None = None
) -> list[Link]:
    """All stages of a run in order.

    Args:
      run: the run.
      config: how many rounds, from which models; and whether rewrites are measured.
      base: the base model's directory; None where it is not known.
      data: files and folders of the user's data by role; None where they are not known.
    """
    links = [prepare(run, data or {})]
    ends = [*(run.round(t) for t in range(config.rounds)), run.final]
    for t, here in enumerate(ends):
        earlier = ends[t - 1] if t else None
        previous = base if earlier is None else earlier.checkpoint
        start = previous if config.train.start_from == "previous" else base
        if earlier is not None:
            links.append(follow(here, earlier))
        links.append(train(here, start))
        if here.path == run.final.path:
            break
        measuring = here.checkpoint if config.refine.accept == "measured" else None
        scored = dataclasses.replace(score(here, here.checkpoint, start), earlier=earlier)
        links += [scored, select(here), refine(here, run.heldout, measuring), merge(here)]
    return [*links, evaluate(run, ends, base), export(run.final)]


def prepare(run: RunDir, data: Mapping[str, Path]) -> Link:
    """The user's data -> the first round's dataset, and what is held out."""
    here = run.round(0)
    writes = (here.dataset, run.heldout, run.rejected)
    return Link("prepare", here, AFFECTED_BY["prepare"], (), writes, data=data)


def follow(here: RoundDir, earlier: RoundDir) -> Link:
    """A round and what was refined of it -> the next one's dataset."""
    files = (earlier.dataset, earlier.scores, earlier.selection, earlier.refined)
    return Link("prepare", here, AFFECTED_BY["follow"], files, (here.dataset,), earlier=earlier)


def train(here: RoundDir, start: Path | None) -> Link:
    """Dataset -> checkpoint, from the weights of `start`."""
    writes = (here.checkpoint, here.metrics)
    return Link("train", here, AFFECTED_BY["train"], (here.dataset,), writes, {"start": start})


def score(here: RoundDir, model: Path, pre_model: Path | None) -> Link:
    """Dataset -> scores and embeddings, under the model and the one before it."""
    models, writes = {"model": model, "pre_model": pre_model}, (here.scores, here.embeddings)
    return Link("score", here, AFFECTED_BY["score"], (here.dataset,), writes, models)


def select(here: RoundDir) -> Link:
    """Scores -> the three sets."""
    writes = (here.selected, here.selection)
    return Link("select", here, AFFECTED_BY["select"], (here.scores,), writes)


def refine(here: RoundDir, heldout: Path | None, model: Path | None) -> Link:
    """The selected samples -> rewrites; `model` measures them, if they are measured."""
    held = () if heldout is None else (heldout,)
    measured = () if model is None else (here.embeddings,)
    files = (here.dataset, here.scores, here.selection, *held, *measured)
    writes = (here.requests, here.refined, here.candidates)
    return Link("refine", here, AFFECTED_BY["refine"], files, writes, {"model": model})


def merge(here: RoundDir) -> Link:
    """Rewrites -> which samples make room for them."""
    files = (here.dataset, here.scores, here.selection, here.refined)
    return Link("merge", here, AFFECTED_BY["merge"], files, (here.dropped,))


def evaluate(run: RunDir, trained: Iterable[RoundDir], base: Path | None) -> Link:
    """Held-out rows -> their loss under the base and every trained model."""
    models = {"base": base} | {directory.path.name: directory.checkpoint for directory in trained}
    writes = (run.heldout_losses, run.heldout_rows)
    return Link("evaluate", run.final, AFFECTED_BY["evaluate"], (run.heldout,), writes, models)


def export(final: RoundDir) -> Link:
    """The last checkpoint -> a Hugging Face directory."""
    writes = (final / "huggingface",)
    return Link("export", final, AFFECTED_BY["export"], (), writes, {"model": final.checkpoint})


def _is_ours(model: Path) -> bool:
    """Whether a model is a checkpoint of ours, also one that is not there yet or not complete."""
    others = ("config.json", "adapter_config.json")
    named = model.name == "checkpoint" and not any((model / name).exists() for name in others)
    return named or (model / "metadata.json").exists()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
