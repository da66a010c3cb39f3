"""Atomic writing of files: each file is written under a temporary name and renamed over the old one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

_is_reader = False


def only_read() -> None:
    """Makes this process write no more files: another process of the job writes them, and this one reads."""
    global _is_reader
    _is_reader = True


def is_reader() -> bool:
    """Whether `only_read` was called: another process writes the files."""
    return _is_reader


@contextlib.contextmanager
def own_files() -> Iterator[None]:
    """Lets this process write within the block, even after `only_read`.

    Needed for files that each host has for itself, such as a cache in the home folder.
    """
    global _is_reader
    before, _is_reader = _is_reader, False
    try:
        yield
    finally:
        _is_reader = before


@contextlib.contextmanager
def atomic(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file in the folder of `path` and renames it to `path` if the block succeeds.

    After `only_read` nothing is written.
    """
    if _is_reader:
        with open(os.devnull, mode) as nowhere:
            yield nowhere
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        binary = mode == "wb"
        with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp sets 0600, and other users could not read a shared run
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


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value per line; raises FileNotFoundError for a missing file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


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
