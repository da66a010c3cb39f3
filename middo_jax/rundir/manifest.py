"""The manifest of a folder: the finished stages, their inputs and outputs, and whether these have changed.

`manifest.json` has its format's `version` and the records of the stages. A record:

    finished, seconds    end time, duration
    files                {name: SHA-256} of the files that it wrote
    versions             {name: version} of the formats of public files among them, see schemas.py
    reads                {name: SHA-256} of the files within the run that it read
    inputs               {role: {path, hash, stat}} of data and models outside the run that it read
    stats                {name: [size, mtime in ns]} of `files` and `reads` when they were hashed
    settings             {dotted name: value} of the settings that it depends on
    ...                  other facts: counts, losses

Names are relative to the folder. A file is hashed again only when its size or its mtime has changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.rundir.files import file_hash, is_reader, write_json
from middo_jax.rundir.schemas import MANIFEST, newer, versions_of

_WHOLE = 1 << 30  # maximum size in bytes of a file that is hashed whole
_SAMPLES, _SAMPLE = 64, 64 << 10  # number and size in bytes of the blocks that are hashed of a larger file


class RunError(RuntimeError):
    """The run's folder is not in the state that an operation needs; the message says what to do."""


class Seen(NamedTuple):
    """Inputs of a stage, for its record: `reads`, `inputs`, and `stats` of `reads`."""

    reads: dict[str, str]
    inputs: dict[str, dict[str, str]]
    stats: dict[str, list[int]]


class Manifest:
    """The finished stages of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "manifest.json"

    def records(self) -> dict[str, Any]:
        """Returns the records of the finished stages by name.

        Raises:
          RunError: the file is not a manifest, or a newer version wrote it or one of the recorded files.
        """
        try:
            manifest = json.loads(self.path.read_text(encoding="utf-8"))
            self._refuse_newer({self.path.name: manifest.get("version", 0)})
            records = manifest["stages"]
            if not all(isinstance(r["files"], dict) and float(r["seconds"]) >= 0 for r in records.values()):
                raise ValueError("a stage without files or seconds")
            for record in records.values():
                self._refuse_newer(record.get("versions", {}))
            return records
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunError(f"{self.path}: not a manifest ({e!r}); delete it to run the round again") from e

    def see(self, reads: Iterable[Path], inputs: Mapping[str, Path]) -> Seen:
        """Hashes a stage's inputs before it reads them, so that an edit during the stage makes it stale.

        Args:
          reads: files within the run.
          inputs: files and folders outside the run, by role.

        Raises:
          FileNotFoundError: one of them does not exist.
        """
        found = {self.name(path): path for path in reads}
        return Seen(
            {name: fingerprint(path) for name, path in found.items()},
            {role: _input(path) for role, path in inputs.items()},
            {name: _stat(path) for name, path in found.items()},
        )

    def finish(
        self,
        stage: str,
        files: Iterable[Path],
        seconds: float,
        *,
        seen: Seen | None = None,
        settings: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Records a stage as done.

        Args:
          stage: name of the stage.
          files: files that it wrote; a folder means all files below it.
          seconds: duration.
          seen: inputs of the stage; None records none, so that only damage to its files makes it stale.
          settings: settings that it depends on, by dotted name.
          facts: small JSON values to keep (counts, losses).

        Raises:
          FileNotFoundError: one of `files` does not exist.
        """
        if is_reader():
            return
        written = {self.name(path): path for file in files for path in _files_below(file)}
        stats = {name: _stat(path) for name, path in written.items()}
        record: dict[str, Any] = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
            "files": {name: fingerprint(path) for name, path in written.items()},
            "versions": versions_of(written),
        }
        if seen is not None:
            record |= {"reads": seen.reads, "inputs": seen.inputs, "settings": dict(settings or {})}
            stats = seen.stats | stats
        record |= {"stats": stats, **facts}
        self._write(self.records() | {stage: record})

    def forget(self, stage: str) -> None:
        """Removes a stage's record, because its files are about to be overwritten."""
        records = self.records()
        if records.pop(stage, None) is not None:
            self._write(records)

    def why_stale(self, stage: str) -> str | None:
        """Returns why a finished stage does not match the present files; None if it does.

        A missing input does not make a stage stale: within the run the stage that wrote it is stale, and
        outside the run the results remain valid.
        """
        record = self.records()[stage]
        for name, known in record["files"].items():
            if not (self.folder / name).exists():
                return f"{name} is missing"
            if self._has_changed(record, name, known):
                return f"{name} is not as it was written"
        for name, known in record.get("reads", {}).items():
            if (self.folder / name).exists() and self._has_changed(record, name, known):
                return f"{name} has changed"
        return _changed_input(record.get("inputs", {}))

    def name(self, path: Path) -> str:
        """Returns a path's name in records: relative to the folder."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def _write(self, records: Mapping[str, Any]) -> None:
        write_json(self.path, {"version": MANIFEST.version, "stages": records})

    def _refuse_newer(self, versions: Mapping[str, int]) -> None:
        for name, version in versions.items():
            if (reason := newer(name, version, self.path)) is not None:
                raise RunError(reason)

    def _has_changed(self, record: Mapping[str, Any], name: str, known: str) -> bool:
        path, stats = self.folder / name, record.get("stats")
        if stats is None:  # the previous version's records contain no hashes to compare
            return False
        return _stat(path) != stats[name] and fingerprint(path) != known


def fingerprint(path: Path) -> str:
    """Returns the hash of a file, or of all files of a folder with their names, except hidden ones.

    Files up to 1 GiB are hashed whole. For larger files, which contain weights, the size and 64 evenly spread
    blocks are hashed, because reading them whole would take minutes after every training and every copy.
    """
    if path.is_file():
        return file_hash(path) if path.stat().st_size <= _WHOLE else _sampled_hash(path)
    return _fingerprint_of_folder(path, _stat_of(path))


@functools.lru_cache(maxsize=64)
def _fingerprint_of_folder(folder: Path, stat: str) -> str:
    # `stat` is part of the cache's key, so that a changed folder is hashed again.
    digest = hashlib.sha256()
    for path in _visible_files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{fingerprint(path)}\n".encode())
    return digest.hexdigest()


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return f"sampled:{digest.hexdigest()}"


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _stat_of(path: Path) -> str:
    """Returns one hash of the sizes and mtimes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else _visible_files(path)
    rows = [f"{file.relative_to(path).as_posix()} {_stat(file)}" for file in files]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _files_below(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} must be hashed but does not exist")
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _visible_files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts))


def _input(path: Path) -> dict[str, str]:
    path = path.resolve()
    return {"path": str(path), "hash": fingerprint(path), "stat": _stat_of(path)}


def _changed_input(inputs: Mapping[str, Any]) -> str | None:
    for role, known in inputs.items():
        path = Path(known["path"])
        if path.exists() and _stat_of(path) != known["stat"] and fingerprint(path) != known["hash"]:
            return f"{role} has changed: {path}"
    return None
