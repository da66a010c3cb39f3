"""Atomic writing of files: each file is written under a temporary name and renamed over the old one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from middo_jax.rundir.elsewhere import bring
from middo_jax.rundir.process import mark

_reader: int | None = None  # index of this process, if it only reads
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """There is no room for a file; the message names it and says what to do."""

    def __init__(self, path: object) -> None:
        super().__init__(
            errno.ENOSPC,
            "disk full: free space there, or ask for a larger quota, and run the same command again; "
            "everything that was finished is kept",
            str(path),
        )

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class DamagedFile(ValueError):
    """A file of a run is not what a stage writes; the message names it and says what to do."""

    def __init__(self, place: object, reason: object) -> None:
        super().__init__(
            f"{place}: damaged ({reason}); `middo run CONFIG --repair` puts it aside and makes it again; in "
            "the folder of another command, run that command again"
        )


@contextlib.contextmanager
def full_disk_named(path: object) -> Iterator[None]:
    """Turns errors of the block that a full disk or a used-up quota caused into `DiskFull`.

    Args:
      path: what is written within the block.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull(path) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, reports a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if (
            isinstance(error, sqlite3.Error)
            and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        ):
            return True
        # Orbax and pyarrow raise errors of their own, with the system's words in them.
        if any(os.strerror(code).lower() in str(error).lower() for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def only_read(process: int = 1) -> None:
    """Makes this process write no more files: another process of the job writes them, and this one reads.

    `process`: its index in the job.
    """
    global _reader
    _reader = process


def is_reader() -> bool:
    """Whether `only_read` was called: another process writes the files."""
    return _reader is not None


def reader_index() -> int | None:
    """The index of this process in its job if `only_read` was called, else None."""
    return _reader


@contextlib.contextmanager
def own_files() -> Iterator[None]:
    """Lets this process write within the block, even after `only_read`.

    Needed for files that each host has for itself, such as a cache in the home folder.
    """
    global _reader
    before, _reader = _reader, None
    try:
        yield
    finally:
        _reader = before


def temporary_prefix(path: Path) -> str:
    """How the name of a temporary file or folder beside `path` begins: it names the process that makes it."""
    return f".{path.name}.tmp-{mark()}-"


def copy_folder(source: Path, to: Path) -> None:
    """Copies a folder; an earlier one at that place is removed first. `to` appears when the copy is whole.

    Raises:
      DiskFull: there is no room for the copy.
    """
    if _reader is not None:
        return
    bring(source)
    temporary = to.with_name(f"{temporary_prefix(to)}copy")
    with full_disk_named(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, temporary)
            shutil.rmtree(to, ignore_errors=True)
            temporary.rename(to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file in the folder of `path` and renames it to `path` if the block succeeds.

    A process that only reads (`only_read`) writes nothing.

    Raises:
      DiskFull: there is no room for the file; the old one is as it was.
    """
    if _reader is not None:
        with open(os.devnull, mode) as nowhere:
            yield nowhere
        return
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path))
    try:
        binary = mode == "wb"
        with full_disk_named(path):
            with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes 0600, which others who share a run could not read
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# JSON may contain these characters unescaped, but readers of lines, such as `str.splitlines`, split at them.
_LINE_SEPARATORS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"})


def json_line(value: Any) -> str:
    """Returns a value as one line of JSON with its line end, and without other line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.translate(_LINE_SEPARATORS) + "\n"


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, atomically."""
    with atomic(path) as file:
        for row in rows:
            file.write(json_line(row))


def each_jsonl(path: Path) -> Iterator[Any]:
    """The values of a file with one JSON value per line, one at a time; a missing file is an error.

    Raises:
      DamagedFile: a line is not JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DamagedFile(f"{path}:{number}", error) from error


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file with one JSON value per line, see `each_jsonl`."""
    return list(each_jsonl(path))


def read_json(path: Path) -> Any:
    """Reads a file of one JSON value; a missing file is an error.

    Raises:
      DamagedFile: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, error) from error


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes.

    Raises:
      FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} must be hashed but does not exist") from error
