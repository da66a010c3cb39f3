"""The paths of all files in a run's folder.

runs/NAME/   config.yaml  events.jsonl  heldout.jsonl ...
  round_00/  dataset.jsonl  scores.parquet  checkpoint/  manifest.json ...
  final/
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from middo_jax.config.base import URL
from middo_jax.rundir.events import append_event
from middo_jax.rundir.files import is_reader
from middo_jax.rundir.manifest import Manifest, RunError
from middo_jax.rundir.nesting import require_flat
from middo_jax.rundir.schemas import EVENTS

HUGGING_FACE_CONFIGS = ("config.json", "adapter_config.json")
_ROUND = re.compile(r"round_(\d{2,})")


def local(path: str | Path) -> Path:
    """Returns the path, if it is not a URL.

    Raises:
      RunError: the path is a URL: the command works on folders of this machine, or got a URL of another kind.
    """
    if re.match(URL, str(path)):
        raise RunError(
            f"{path}: give a folder on this machine; docs/buckets.md lists what may be in a bucket"
        )
    return Path(path)


def has_checkpoint_metadata(directory: Path) -> bool:
    """Whether a directory contains a metadata.json that is of a checkpoint of this package.

    A Hugging Face directory may contain a file of that name, too. It is not ours if it does not name a base.
    """
    path = directory / "metadata.json"
    if not path.is_file() or not any((directory / name).exists() for name in HUGGING_FACE_CONFIGS):
        return path.is_file()
    try:
        text = path.read_bytes()
        require_flat(text)
        metadata = json.loads(text)
    except ValueError:
        return False
    return isinstance(metadata, dict) and isinstance(metadata.get("base"), str)


class RoundDir:
    """One round's folder, `round_00` or `final`; also what `middo score --out DIR` writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = local(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def dataset(self) -> Path:
        """The examples that this round trains on and diagnoses."""
        return self.path / "dataset.jsonl"

    @property
    def own_format(self) -> Path:
        """Of `final`: the dataset in the format of the user's data."""
        return self.path / "train.jsonl"

    @property
    def scores(self) -> Path:
        """One row per sample with its measurements."""
        return self.path / "scores.parquet"

    @property
    def embeddings(self) -> Path:
        """One row per sample: the mean hidden state over its prompt."""
        return self.path / "embeddings.parquet"

    @property
    def scoring_parts(self) -> Path:
        """Folder with the results so far of an unfinished scoring stage."""
        return self.path / "scoring"

    @property
    def selection(self) -> Path:
        """Thresholds, the three sets, their overlap, the m-sweep."""
        return self.path / "selection.json"

    @property
    def selected(self) -> Path:
        """One row per sample: which sets it is in, and its standardised scores."""
        return self.path / "selection.parquet"

    @property
    def requests(self) -> Path:
        """Requests to the refiner, and its answers."""
        return self.path / "requests.jsonl"

    @property
    def refined(self) -> Path:
        """One row per task of the refiner."""
        return self.path / "refined.jsonl"

    @property
    def rejected(self) -> Path:
        """Input rows that could not be used, with the reason, if a command has read data into this folder."""
        return self.path / "rejected.jsonl"

    @property
    def candidates(self) -> Path:
        """One row per attempt of the refiner: the gate that rejected it, and its measurements."""
        return self.path / "candidates.jsonl"

    @property
    def verdicts(self) -> Path:
        """People's verdicts on the accepted rewrites; `middo refine --read-review` writes it."""
        return self.path / "verdicts.jsonl"

    @property
    def taken_back(self) -> Path:
        """Rewrites that are taken back in this round and in earlier ones (`refine.take_back`)."""
        return self.path / "taken_back.jsonl"

    @property
    def dropped(self) -> Path:
        """Samples dropped to make room for additions, and additions without room, each with the reason."""
        return self.path / "dropped.jsonl"

    @property
    def checkpoint(self) -> Path:
        """This round's model."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """One row per training step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One row per held-out loss that was measured during training."""
        return self.path / "evaluations.jsonl"

    @property
    def heldout_losses(self) -> Path:
        """Held-out loss of this round's model, if `stop.patience` is set."""
        return self.path / "heldout_losses.json"

    @property
    def heldout_rows(self) -> Path:
        """Loss sum and number of target tokens of each held-out example under this round's model."""
        return self.path / "heldout_rows.parquet"

    @property
    def benchmarks(self) -> Path:
        """The scores of this round's model on `evaluate.tasks`."""
        return self.path / "benchmarks.json"

    @property
    def manifest(self) -> Path:
        """Which stages are done."""
        return Manifest(self.path).path

    @property
    def written(self) -> list[Path]:
        """The files that commands write into a folder that belongs to no run."""
        measured = [self.dataset, self.rejected, self.scores, self.embeddings, self.selection, self.selected]
        refined = [self.requests, self.refined, self.candidates, self.verdicts, self.dropped, self.merged]
        return [*measured, *refined, self.metrics, self.evaluations, self.manifest, self.path / "config.yaml"]

    @property
    def merged(self) -> Path:
        """The next dataset, of a folder that belongs to no run."""
        return self.path / "merged.jsonl"

    @property
    def run(self) -> RunDir | None:
        """The run that this is a round of; None for a folder that `middo score --out DIR` wrote."""
        run = RunDir(self.path.absolute().parent)
        is_run = run.config.exists() or run.events.exists()  # either may have been removed
        return run if is_run and _ROUND.fullmatch(self.path.absolute().name) else None

    @property
    def index(self) -> int:
        """The round's number, counted from 0; 0 for a folder that belongs to no run."""
        match = _ROUND.fullmatch(self.path.absolute().name)
        return int(match[1]) if match and self.run else 0

    def require_elsewhere(self, path: Path) -> None:
        """Requires that a file that is written for the user is not among those of this folder or its run.

        Raises:
          RunError: it would be.
        """
        folders = [self.path, *([] if self.run is None else [self.run.path])]
        if path.resolve().parent in {folder.resolve() for folder in folders}:
            raise RunError(f"{path} would be among the files that are read; write to another folder")

    def stages(self) -> dict[str, Any]:
        """Returns the records of the finished stages by name, see `rundir.manifest`."""
        return Manifest(self.path).records()

    def is_done(self, stage: str) -> bool:
        """Whether the stage has a record, and the files that it read and wrote are unchanged."""
        manifest = Manifest(self.path)
        return stage in manifest.records() and manifest.why_stale(stage) is None

    def finish(self, stage: str, files: Iterable[Path], seconds: float, **record: Any) -> None:
        """Records a stage as done, see `Manifest.finish`."""
        Manifest(self.path).finish(stage, files, seconds, **record)

    def forget(self, stage: str) -> None:
        """Removes a stage's record, because its files are about to be overwritten."""
        Manifest(self.path).forget(stage)


class RunDir:
    """A run's folder: config.yaml, events.jsonl, llm_cache.sqlite, round_00 ... final, report.html."""

    def __init__(self, path: str | Path) -> None:
        self.path = local(path)

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        """One line per event, with its time."""
        return self.path / "events.jsonl"

    @property
    def llm_cache(self) -> Path:
        """Every answer of the refiner, keyed by request."""
        return self.path / "llm_cache.sqlite"

    @property
    def rejected(self) -> Path:
        """Input rows that could not be used, with the reason."""
        return self.path / "rejected.jsonl"

    @property
    def heldout(self) -> Path:
        """Examples that are never trained on and never rewritten."""
        return self.path / "heldout.jsonl"

    @property
    def heldout_losses(self) -> Path:
        """Held-out loss of the base model and of every round's model."""
        return self.path / "heldout_losses.json"

    @property
    def heldout_rows(self) -> Path:
        """Loss sum and number of target tokens of each held-out example under each of these models."""
        return self.path / "heldout_rows.parquet"

    @property
    def contrast_rows(self) -> Path:
        """Contrast margin of each held-out example and kind of fault under each of these models."""
        return self.path / "contrast_rows.parquet"

    @property
    def plan(self) -> Path:
        """What `middo plan --save` predicted."""
        return self.path / "plan.json"

    @property
    def controls(self) -> Path:
        """The control arms beside the loop: losses, differences, costs."""
        return self.path / "controls.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def final(self) -> RoundDir:
        """The last training: dataset, checkpoint, export."""
        return RoundDir(self.path / "final")

    def round(self, index: int) -> RoundDir:
        """The folder of round `index`, counted from 0."""
        return RoundDir(self.path / f"round_{index:02d}")

    def rounds(self) -> list[RoundDir]:
        """Existing rounds in order, without `final`."""
        return [RoundDir(p) for p in sorted(self.path.glob("round_[0-9][0-9]*")) if p.is_dir()]

    @property
    def is_begun(self) -> bool:
        """Whether the folder belongs to a run: it contains a round, or settings but no round's files."""
        holds_settings = self.config.exists() and not RoundDir(self.path).manifest.exists()
        return bool(self.rounds()) or self.final.path.is_dir() or holds_settings

    def log(self, event: str, **facts: Any) -> None:
        """Appends one line to events.jsonl: time, event and facts."""
        if is_reader():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"version": EVENTS.version, "time": now, "event": event, **facts}
        append_event(self.events, line)
