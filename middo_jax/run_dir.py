"""A run's folder: where each artefact lies, atomic writes, and manifests that say when a stage is done.

Everything is written to a temporary name and renamed. A stage counts as done only when its round's
`manifest.json` says so, with the hash of every file it wrote; a stage found half-written is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal


class RunError(RuntimeError):
    """The run's folder does not fit what is asked of it; the message says what to do."""


@contextlib.contextmanager
def atomic(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it over `path` once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        binary = mode == "wb"
        with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which would surprise who shares a run
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value a line, whole or not at all."""
    with atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value a line; a missing file is an error, as everywhere."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's sorted file names and bytes.

    Raises:
      FileNotFoundError: there is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} was to be hashed and is not there")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class RoundDir:
    """One round's folder, `round_00` or `final`; also what `middo score --out DIR` writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def dataset(self) -> Path:
        """The examples that this round trains on and diagnoses."""
        return self.path / "dataset.jsonl"

    @property
    def scores(self) -> Path:
        """One row a sample, see `signals.table`."""
        return self.path / "scores.parquet"

    @property
    def embeddings(self) -> Path:
        """float32 [N, D], rows as in scores.parquet."""
        return self.path / "embeddings.npy"

    @property
    def selection(self) -> Path:
        """Thresholds, the three sets, their overlap, the m-sweep."""
        return self.path / "selection.json"

    @property
    def requests(self) -> Path:
        """What the refiner was asked and what it answered."""
        return self.path / "requests.jsonl"

    @property
    def refined(self) -> Path:
        """One row a task of the refiner."""
        return self.path / "refined.jsonl"

    @property
    def rejected(self) -> Path:
        """Input rows that could not be used, with the reason, where a command reads them into this folder."""
        return self.path / "rejected.jsonl"

    @property
    def candidates(self) -> Path:
        """One row per attempt of the refiner: the gate that rejected it, and what was measured of it."""
        return self.path / "candidates.jsonl"

    @property
    def dropped(self) -> Path:
        """Samples that made room for additions, and additions that found none, with the reason."""
        return self.path / "dropped.jsonl"

    @property
    def checkpoint(self) -> Path:
        """This round's model."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """One row a training step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One row a held-out loss that was measured while training."""
        return self.path / "evaluations.jsonl"

    @property
    def manifest(self) -> Path:
        """Which stages are done."""
        return self.path / "manifest.json"

    def stages(self) -> dict[str, Any]:
        """Finished stages by name: when, how long, which files with which hashes."""
        if not self.manifest.exists():
            return {}
        return json.loads(self.manifest.read_text(encoding="utf-8"))["stages"]

    def is_done(self, stage: str) -> bool:
        """Whether the manifest names the stage and every file it wrote is still there."""
        record = self.stages().get(stage)
        return record is not None and all((self.path / name).exists() for name in record["files"])

    def finish(self, stage: str, files: Iterable[Path], seconds: float, **facts: Any) -> None:
        """Records a stage as done. `facts` are small JSON values worth keeping (counts, losses)."""
        stages = self.stages()
        stages[stage] = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
            "files": {f.relative_to(self.path).as_posix(): file_hash(f) for f in files},
            **facts,
        }
        write_json(self.manifest, {"stages": stages})

    def forget(self, stage: str) -> None:
        """Takes a stage back from the manifest: what it wrote is about to be overwritten."""
        stages = self.stages()
        if stages.pop(stage, None) is not None:
            write_json(self.manifest, {"stages": stages})


class RunDir:
    """A run's folder: config.yaml, events.jsonl, llm_cache.sqlite, round_00 ... final, report.html."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        """What happened when, one line each."""
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

    def log(self, event: str, **facts: Any) -> None:
        """Appends one line to events.jsonl: when, what, and its facts."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
