"""Files that are whole or not there: each is written to a temporary name and renamed over the old one."""

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
    """From now on this process writes no file: another process of its job does, and this one reads them."""
    global _is_reader
    _is_reader = True


def is_reader() -> bool:
    """Whether another process writes what this one would."""
    return _is_reader


@contextlib.contextmanager
def own_files() -> Iterator[None]:
    """Within the block this process writes, even if it only reads otherwise.

    For files that each host needs for itself, such as those of a cache in the home folder.
    """
    global _is_reader
    before, _is_reader = _is_reader, False
    try:
        yield
    finally:
        _is_reader = before


@contextlib.contextmanager
def atomic(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it over `path` once the block has ended well.

    A process that only reads (`only_read`) writes nothing.
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


# Characters that JSON may hold as they are, but that readers of lines, such as `str.splitlines`, split at.
_LINE_SEPARATORS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"})


def json_line(value: Any) -> str:
    """A value as one line of JSON, its end included; no reader finds another line's end within."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.translate(_LINE_SEPARATORS) + "\n"


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, whole or not at all."""
    with atomic(path) as file:
        for row in rows:
            file.write(json_line(row))


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value per line; a missing file is an error, as everywhere."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
      FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} was to be hashed and is not there") from error
