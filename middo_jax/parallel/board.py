"""Short texts that the processes of a job leave where all hosts see them: in a folder or a bucket."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple, Protocol

from middo_jax.buckets import Place
from middo_jax.buckets.store import BucketError, Store


class Note(NamedTuple):
    """A text, and when it was written, in seconds by the clock of the place where it is."""

    written: float
    text: str


class Board(Protocol):
    """A place for texts by name."""

    def write(self, name: str, text: str) -> None:
        """Writes a text, in the place of an earlier one. Raises OSError or BucketError."""
        ...

    def notes(self) -> dict[str, Note]:
        """All texts by name. Raises OSError or BucketError."""
        ...

    def remove(self, name: str) -> None:
        """Removes a text, and the place when it is empty."""
        ...


def board(shared: str | Path, name: str) -> Board:
    """The texts below `name` in a folder or bucket that all hosts share.

    Raises:
      BucketError: the package for this kind of bucket is not installed.
    """
    url = Place.of(shared)
    return _Folder(Path(shared) / name) if url is None else _Objects(Store(url / name))


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, name: str, text: str) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        (self._path / name).write_text(text, encoding="utf-8")

    def notes(self) -> dict[str, Note]:
        found = {}
        for path in sorted(self._path.iterdir()) if self._path.is_dir() else ():
            with contextlib.suppress(OSError):
                found[path.name] = Note(path.stat().st_mtime, path.read_text(encoding="utf-8"))
        return found

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other processes still use it
            self._path.rmdir()


class _Objects:
    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, name: str, text: str) -> None:
        self._store.put_text(text, name)

    def notes(self) -> dict[str, Note]:
        found = {}
        for name, stored in sorted(self._store.list().items()):
            text = self._store.read(name)
            if text is not None:
                found[name] = Note(stored.modified, text)
        return found

    def remove(self, name: str) -> None:
        with contextlib.suppress(BucketError):
            self._store.remove(name)
