"""A stage as a link of the chain: what it reads, writes and depends on, and whether its record is stale.

    for link, state in assess(chain(run, config), config): ...

A stage is stale if a file it wrote is missing or damaged, if a setting it depends on or a file it read has
changed, or if it reads a file that a stale stage writes. Nothing else makes a stage stale.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.config import Config, Effect, affecting, default_of
from middo_jax.rundir.files import file_hash
from middo_jax.rundir.layout import HUGGING_FACE_CONFIGS, RoundDir, has_checkpoint_metadata
from middo_jax.rundir.manifest import TOKENIZER, Manifest, Reason, Seen

# Settings that name a place, and the roles under which its content is recorded: a moved model is the same.
_PLACES = {
    "model.path": (TOKENIZER, "base", "start", "pre_model", "model"),
    "data.path": ("data",),
    "data.eval_path": ("eval_data",),
    "refine.prompts": ("prompts",),
    "refine.model": ("refiner",),
    "quality.rubric": ("rubric",),
    "evaluate.local_data": ("local_data",),
    "evaluate.include_path": ("include_path",),
}
# A setting may name a file; then its record has the file's content.
_FILES = ("model.template",)


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
      data: files and folders of the user's by role, if it reads any; None where the places are not known.
      tokenizer: the base model's directory, if it reads its files except the weights and the place is known.
      earlier: the round before this folder's, if there is one.
    """

    name: str
    folder: RoundDir
    affected_by: frozenset[Effect]
    files: tuple[Path, ...]
    writes: tuple[Path, ...]
    models: Mapping[str, Path | None] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Path] | None = dataclasses.field(default_factory=dict)
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
        """Files and folders outside the run that the stage reads, by role.

        A refiner may be a checkpoint: it counts as a folder, since it is none of this run.
        """
        models = {TOKENIZER: self.tokenizer, **self.models}
        outside = {role: path for role, path in models.items() if path and not _is_ours(path)}
        return {role: path for role, path in {**(self.data or {}), **outside}.items() if path.exists()}

    @property
    def removed(self) -> tuple[Path, ...]:
        """The paths of `removable` that do not exist, or are empty folders."""
        return tuple(path for path in self.removable if _is_gone(path))

    @property
    def missing_models(self) -> tuple[Path, ...]:
        """Checkpoints of the run that it reads and that do not exist."""
        return tuple(p for p in self.models.values() if p is not None and _is_ours(p) and _is_gone(p))

    def begin(self) -> Begun:
        """Starts the stage, before it reads anything. Raises RunError for files of a newer version."""
        for folder in {self.folder.path, *(path.parent for path in self.reads)}:
            Manifest(folder).records()
        return Begun(self, Manifest(self.folder.path).see(self.reads, self.inputs))

    def why_stale(self, config: Config, edited: Iterable[Path] = ()) -> Reason | None:
        """Returns why the stage's record is stale, None if it is not. Ignores the state of earlier stages.

        An edit of a file in `edited`, which it read, is no reason.
        """
        manifest = Manifest(self.folder.path)
        record = manifest.records()[self.name]
        if "settings" not in record:  # the previous version's: it contains only the names of files
            return manifest.why_stale(self.name)
        before, settings = (
            self._without_places(each, record["inputs"])
            for each in (record["settings"], _settings(config, self.affected_by))
        )
        # First the recorded settings: one that is not recorded may matter only because one of these changed.
        for name in sorted(settings, key=lambda name: name not in before):
            was, now = before.get(name, default_of(name)), settings[name]
            if was != now and not (name in _FILES and was == affecting(config, self.affected_by)[name]):
                return Reason(f"{name} was {_shown(was)}, is {_shown(now)}")
        if (reason := manifest.why_stale(self.name, self.inputs, self.removed, edited)) is not None:
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
        known = {*(record["inputs"] if self.data is None else self.data), TOKENIZER, *self.models}
        for role in record["inputs"]:
            if role not in known:
                return Reason(f"it does not read {role} any more", input=role)
        return None

    def adopt(self, config: Config) -> None:
        """Records where the inputs of a fresh stage are now, if these were moved.

        So those who read the folder and do not look for models and data find the recorded places.
        """
        settings = _settings(config, self.affected_by)
        Manifest(self.folder.path).adopt(self.name, self.inputs, settings)

    def _without_places(self, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The settings without the names of places whose content is compared."""
        compared = {role for role in inputs if role in self.inputs}
        found = {
            name: value
            for name, value in settings.items()
            if not compared.intersection(_PLACES.get(name, ()))
        }
        if "data" in compared and found.get("data.sources"):
            found["data.sources"] = [{**source, "path": ""} for source in found["data.sources"]]
        return found


def _settings(config: Config, effects: Collection[Effect]) -> dict[str, Any]:
    """The settings with these effects; one that names a file has the hash of its content."""
    settings = affecting(config, effects)
    for name in _FILES:
        if (path := settings.get(name)) is not None and (hashed := content_of(path)) is not None:
            settings[name] = hashed
    return settings


@functools.cache
def content_of(path: str) -> str | None:
    """The hash of a file, as it was when the process first looked; None if there is no such file."""
    file = Path(path).expanduser()
    return f"a file with SHA-256 {file_hash(file)}" if file.is_file() else None


class Begun(NamedTuple):
    """A started stage, and the hashes of its inputs at the start."""

    link: Link
    seen: Seen

    def finish(self, config: Config, seconds: float, **facts: Any) -> None:
        """Records the stage as done under these settings."""
        link = self.link
        settings = _settings(config, link.affected_by)
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


def _is_ours(model: Path) -> bool:
    """Whether a path is a checkpoint of this package; it may be missing or incomplete."""
    named = model.name == "checkpoint" and not any((model / name).exists() for name in HUGGING_FACE_CONFIGS)
    return named or has_checkpoint_metadata(model)


def _is_gone(path: Path) -> bool:
    """Whether nothing is left of a folder that was removed, or emptied, to save space."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
