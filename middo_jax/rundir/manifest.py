"""The manifest of a folder: the finished stages, their inputs and outputs, and whether these have changed.

`manifest.json` has its format's `version`, the `checksum` of what follows, and the records of the stages. A
record:

    finished, seconds    when, and how long it took
    files                {name: SHA-256} of what it wrote, a folder file by file
    versions             {name: version} of the formats of the public ones among them, see schemas.py
    reads                {name: SHA-256} of what it read within the run; of a checkpoint's metadata.json
                         without the base model's place
    inputs               {role: {path, hash, stat}} of what it read outside: the user's data, models; of the
                         role `tokenizer` all of a model but its weights
    stats                {name: [size, mtime in ns]} of files and reads when they were hashed
    settings             {dotted name: value} of the settings that it depends on
    ...                  other facts: counts, losses

Names are relative to the folder. A file is hashed again only when its size or its mtime has changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.rundir.elsewhere import is_elsewhere
from middo_jax.rundir.files import file_hash, is_reader, write_json
from middo_jax.rundir.schemas import MANIFEST, newer, versions_of

TOKENIZER = "tokenizer"  # role of a model's directory of which the weights do not matter
_WEIGHTS = frozenset((".safetensors", ".gguf", ".bin", ".pt", ".pth"))
_WHOLE = 1 << 30  # bytes up to which a file is hashed whole
_SAMPLES, _SAMPLE = 64, 64 << 10  # of a larger one: so many blocks of so many bytes


class RunError(RuntimeError):
    """The run's folder is not in the state that an operation needs; the message says what to do."""


class Reason(NamedTuple):
    """Why a stage is stale.

    Attributes:
      text: for messages, such as `scores.parquet has changed`.
      input: the role of the input outside the run that is the reason; None if it is something else.
      is_forecast: only a stale stage before it is the reason, which may write the same again.
    """

    text: str
    input: str | None = None
    is_forecast: bool = False

    def __str__(self) -> str:
        return self.text


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
            if manifest.get("checksum", known := checksum(records)) != known:  # earlier versions wrote none
                raise ValueError("it is not as it was written")
            if not all(isinstance(r["files"], dict) and float(r["seconds"]) >= 0 for r in records.values()):
                raise ValueError("a stage without files or seconds")
            for record in records.values():
                self._refuse_newer(record.get("versions", {}))
            return records
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise RunError(
                f"{self.path}: not a manifest ({e}); `middo run CONFIG --repair` puts it aside and does the "
                "stages of this folder again; answers that were paid for are kept"
            ) from e

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
            {name: _as_read(path) for name, path in found.items()},
            {role: _input(role, path) for role, path in inputs.items()},
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

    def adopt(self, stage: str, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
        """Records other places of a stage's inputs, whose content is as recorded; see `finish`.

        Args:
          stage: a finished stage.
          inputs: where its inputs outside the run are now, by role.
          settings: the settings that it depends on, which name the places.
        """
        records = self.records()
        record = records[stage]
        known = record.get("inputs", {})
        moved = {
            role: {**known[role], **_place(role, path)}
            for role, path in inputs.items()
            if role in known and known[role]["path"] != str(path.resolve())
        }
        adopted = {**record, "inputs": known | moved, "settings": dict(settings)}
        if "settings" in record and adopted != record and not is_reader():
            self._write(records | {stage: adopted})

    def forget(self, stage: str) -> None:
        """Removes a stage's record, because its files are about to be overwritten."""
        records = self.records()
        if records.pop(stage, None) is not None:
            self._write(records)

    def why_stale(
        self,
        stage: str,
        inputs: Mapping[str, Path] | None = None,
        removed: Iterable[Path] = (),
        edited: Iterable[Path] = (),
    ) -> Reason | None:
        """Why a finished stage does not fit the files that are there; None if it does.

        A missing input is no reason: within the run, the stage that wrote it is stale; outside of it, the
        results remain valid.

        Args:
          stage: its name.
          inputs: the present places of its inputs outside the run, by role; by default the recorded ones.
          removed: files or folders that it wrote and that were removed on purpose, which is no reason.
          edited: files that it read and that may have changed, which is no reason.
        """
        record, gone = self.records()[stage], [self.name(path) for path in removed]
        may_differ = {self.name(path) for path in edited}
        for name, known in record["files"].items():
            if any(name == of or name.startswith(f"{of}/") for of in gone):
                continue
            if not (self.folder / name).exists():
                if is_elsewhere(self.folder / name):
                    continue
                return Reason(f"{name} is missing")
            if self._has_changed(record, name, known):
                return Reason(f"{name} is not as it was written")
        for name, known in record.get("reads", {}).items():
            if name in may_differ:
                continue
            if (self.folder / name).exists() and self._has_changed(record, name, known, _as_read):
                return Reason(f"{name} has changed")
        return _changed_input(record.get("inputs", {}), inputs or {})

    def edited(self, record: Mapping[str, Any]) -> list[str]:
        """The files of a record that can be read and are not as they were written."""
        found = []
        for name in record["files"]:
            with contextlib.suppress(Unreadable):
                if (self.folder / name).is_file() and self._has_changed(record, name, record["files"][name]):
                    found.append(name)
        return found

    def name(self, path: Path) -> str:
        """Returns a path's name in records: relative to the folder."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def _write(self, records: Mapping[str, Any]) -> None:
        content = {"version": MANIFEST.version, "checksum": checksum(records), "stages": records}
        write_json(self.path, content)

    def _refuse_newer(self, versions: Mapping[str, int]) -> None:
        for name, version in versions.items():
            if (reason := newer(name, version, self.path)) is not None:
                raise RunError(reason)

    def _has_changed(
        self, record: Mapping[str, Any], name: str, known: str, hashed: Callable[[Path], str] | None = None
    ) -> bool:
        path, stats = self.folder / name, record.get("stats")
        if stats is None:  # the previous version's records contain no hashes to compare
            return False
        try:
            return _stat(path) != stats[name] and (hashed or fingerprint)(path) != known
        except FileNotFoundError:  # another process is just writing it anew
            return True
        except OSError as error:
            raise Unreadable(path, error) from error


class Unreadable(RunError):
    """A file of a run exists and cannot be read; the message says what to do."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be read ({error.strerror or error}): make it readable, or let `middo run CONFIG "
            "--repair` put it aside and make it again"
        )
        self.path = path


def checksum(records: Mapping[str, Any]) -> str:
    """SHA-256 of the records of a manifest."""
    text = json.dumps(records, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(path: Path, without: frozenset[str] = frozenset()) -> str:
    """A hash of a file, or of all files of a folder with their names, hidden ones left out.

    Files up to 1 GiB are hashed whole. Of larger ones, which are weights, the size and 64 blocks spread
    evenly over the file: to read all of them would take minutes after every training and every copy.

    Args:
      path: the file or folder.
      without: suffixes of files of the folder that are left out, too.
    """
    if path.is_file():
        return file_hash(path) if path.stat().st_size <= _WHOLE else _sampled_hash(path)
    return _fingerprint_of_folder(path, _stat_of(path, without), without)


@functools.lru_cache(maxsize=64)
def _fingerprint_of_folder(folder: Path, stat: str, without: frozenset[str]) -> str:
    # `stat` tells a changed folder from the one that was hashed before.
    digest = hashlib.sha256()
    for path in _visible_files(folder, without):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{fingerprint(path)}\n".encode())
    return digest.hexdigest()


def _as_read(path: Path) -> str:
    """The fingerprint of a file for a stage that reads it; of a checkpoint without the base model's place.

    A training that is done again after the project was moved makes the same model.
    """
    if path.name != "metadata.json":
        return fingerprint(path)
    try:
        content = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return fingerprint(path)
    return checksum({name: value for name, value in content.items() if not name.startswith("base")})


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


def _stat_of(path: Path, without: frozenset[str] = frozenset()) -> str:
    """Returns one hash of the sizes and mtimes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else _visible_files(path, without)
    rows = [f"{file.relative_to(path).as_posix()} {_stat(file)}" for file in files]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _files_below(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} must be hashed but does not exist")
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _visible_files(folder: Path, without: frozenset[str]) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix not in without and p.is_file())
    return sorted(p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts))


def _left_out(role: str) -> frozenset[str]:
    return _WEIGHTS if role == TOKENIZER else frozenset()


def _input(role: str, path: Path) -> dict[str, str]:
    return {**_place(role, path), "hash": fingerprint(path.resolve(), _left_out(role))}


def _place(role: str, path: Path) -> dict[str, str]:
    path = path.resolve()
    return {"path": str(path), "stat": _stat_of(path, _left_out(role))}


def _changed_input(inputs: Mapping[str, Any], now: Mapping[str, Path]) -> Reason | None:
    for role, known in inputs.items():
        path, without = now.get(role, Path(known["path"])).resolve(), _left_out(role)
        if not path.exists() or _stat_of(path, without) == known["stat"]:
            continue
        if fingerprint(path, without) != known["hash"]:
            return Reason(f"{role} has changed: {path}", input=role)
    return None
