"""A folder on this machine and its original in a bucket, file by file.

`pull` makes the copy like the bucket, `push` the bucket like the copy. The bucket has the same files under
the same names, so that other programs read them there. At any moment its files are those of a folder that was
killed at some moment: a file is replaced as a whole, and a mark that declares files complete is written after
them and removed before they are replaced or removed:

    metadata.json           of a checkpoint
    _CHECKPOINT_METADATA    of a training's saved step
    manifest.json           of a round; it has the hash of every file that it declares finished

A record beside the copies has what the last pull or push saw: {name: [version, size, mtime in ns]}. If the
bucket still has these versions, nobody else has written since, and files that differ here are newer: a run
that was killed before it pushed loses nothing on the same machine. Otherwise the bucket's files replace those
here. A file that is missing here is copied again; only what this process saw here and finds gone is removed
from the bucket.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from middo_jax.buckets.names import (
    half_steps,
    is_below,
    is_copied,
    is_mark_of_data,
    mark_of,
    order,
)
from middo_jax.buckets.places import Place, record_of
from middo_jax.buckets.store import Store, StoredObject
from middo_jax.rundir import RunError
from middo_jax.rundir.files import full_disk_named
from middo_jax.rundir.manifest import Manifest, fingerprint

_COPIED_FIRST = 64 << 20  # bytes up to which a file is copied before it is sent: others may append to it


class Copied(NamedTuple):
    """What was seen of a file when it was last copied.

    Attributes:
      version: that of the object; "" while it is being written or removed.
      size: bytes of the object, or of the file that it was made of.
      mtime: of the file here, in ns; None if it is not here.
    """

    version: str
    size: int
    mtime: int | None


class _Here(NamedTuple):
    size: int
    mtime: int


Wants = Callable[[str], bool]


class Mirror:
    """A folder and its original. Threads and processes of this machine take turns."""

    def __init__(self, place: Place, folder: Path, store: Store | None = None) -> None:
        """`store`: that of `place`, if there is one already."""
        self.place, self.folder = place, folder.absolute()
        self._record = record_of(self.folder)
        self.store = store or Store(place)
        self._turn = threading.Lock()
        self._known: dict[str, Copied] = {}
        self._seen: set[str] = set()  # files that were here when this process last looked
        self._half: set[str] = set()  # objects of saved steps of which a push was interrupted
        self.check: Callable[[], None] = lambda: None  # raises before a change, if this process may not write

    def pull(
        self,
        wants: Wants = lambda name: True,
        *,
        keeps: Wants = lambda name: False,
        overwrites: bool = False,
    ) -> int:
        """Makes the copy like the bucket, except for newer files here; returns the number of copies.

        Args:
          wants: whether a file that is not here is copied now. Others can be brought later, see `elsewhere`.
          keeps: whether a file that is here and not in the bucket stays, because it is still being written.
          overwrites: whether files that are newer here are replaced, too.

        Raises:
          BucketError: the bucket cannot be read.
        """
        with self._exclusive():
            listing = {name: s for name, s in self.store.list().items() if is_copied(name)}
            is_newer_here = not overwrites and self._is_as_left(listing)
            half = half_steps(listing)
            if is_newer_here:  # then the rest of them is here, or they are gone here
                half = {name for name in half if _here(self.folder / name) is None}
            listing = {name: stored for name, stored in listing.items() if name not in half}
            if not is_newer_here:
                self._drop_others(listing, keeps)
            n = 0
            for name in sorted(listing, key=order):
                n += self._pull(name, listing[name], wants, is_newer_here)
            self._known = {name: known for name, known in self._known.items() if name in listing}
            self._half, self._seen = half, set(self._scan())
            self._write_record()
        return n

    def push(self, wants: Wants = lambda name: True, *, removes: bool = True) -> int:
        """Makes the bucket like the copy; returns the number of objects that were written or removed.

        Args:
          wants: which files are pushed.
          removes: whether objects whose files are gone here are removed.

        Raises:
          BucketError: the bucket cannot be written. The next push goes on.
        """
        with self._exclusive():
            files = self._scan()
            changed = [name for name, here in files.items() if wants(name) and not self._is_known(name, here)]
            gone = [name for name in self._gone(files, changed) if removes and wants(name)]
            for name in sorted((*changed, *gone), key=order, reverse=True):
                folder = name.rpartition("/")[0]
                if is_mark_of_data(name) and any(is_below(other, folder) for other in changed):
                    self._remove(name)  # what it declares complete is about to be replaced
            n = 0
            for name in sorted(changed, key=order):
                n += self._put(name, files[name])
            for name in sorted(gone, key=order, reverse=True):
                self._remove(name)
            half = {name for name in self._half if removes and wants(name)}
            for name in half - files.keys():
                self.store.remove(name)
            self._half -= half
            self._seen = files.keys() | {name for name in self._seen if not (removes and wants(name))}
        return n + len(gone)

    def learn(self) -> None:
        """Finds the objects that others have written; their files are not copied."""
        with self._exclusive():
            listing = self.store.list()
            self._known = {
                n: known for n, known in self._known.items() if n in listing or known.mtime is not None
            }
            for name, stored in listing.items():
                if is_copied(name) and name not in self._known:
                    self._known[name] = Copied(stored.version, stored.size, None)
            self._write_record()

    def has(self, path: Path) -> bool:
        """Whether a file that is not here is in the bucket."""
        known = self._known.get(path.relative_to(self.folder).as_posix())
        return known is not None and known.mtime is None

    def bring(self, path: Path) -> None:
        """Copies a file, or all files below a folder, that were left in the bucket.

        Raises:
          RunError: a file is gone from the bucket, or is not as the stage that wrote it recorded it.
        """
        wanted = path.relative_to(self.folder).as_posix()
        if not any(is_below(name, wanted) for name, known in self._known.items() if known.mtime is None):
            return
        with self._exclusive():
            for name, known in list(self._known.items()):
                if known.mtime is None and is_below(name, wanted):
                    self.store.get(name, self.folder / name)
                    self._refuse_damaged(name)
                    self._note(name, known.version)
                    self._seen.add(name)  # not a new look: a file that was seen and is gone is to be removed

    def size(self, path: Path) -> int:
        """Bytes of the files at or below a path that were left in the bucket."""
        wanted = path.relative_to(self.folder).as_posix()
        left = (known for name, known in self._known.items() if is_below(name, wanted))
        return sum(known.size for known in left if known.mtime is None)

    def _pull(self, name: str, stored: StoredObject, wants: Wants, is_newer_here: bool) -> int:
        known, here = self._known.get(name), _here(self.folder / name)
        if here is not None and known is not None and (is_newer_here or known == (stored.version, *here)):
            return 0
        if not wants(name):
            (self.folder / name).unlink(missing_ok=True)
            self._known[name] = Copied(stored.version, stored.size, None)
            return 0
        self.store.get(name, self.folder / name)
        if name.endswith(".sqlite"):  # these belong to the file that was replaced
            for suffix in ("-wal", "-shm"):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
        self._note(name, stored.version)
        return 1

    def _is_as_left(self, listing: Mapping[str, StoredObject]) -> bool:
        """Whether the bucket is as the last pull or push of this copy left it."""
        pending = {name for name, known in self._known.items() if known.version == ""}
        settled = self._known.keys() - pending
        return listing.keys() - pending == settled and all(
            listing[name].version == self._known[name].version for name in settled
        )

    def _drop_others(self, listing: Mapping[str, StoredObject], keeps: Wants) -> None:
        """Removes what the bucket does not have, and forgets files that were changed here.

        The record is written first: a pull that is killed must not pass for a copy that is newer.
        """
        files = self._scan()
        others = {name for name in files.keys() - listing.keys() if not keeps(name)}
        self._known = {
            name: known
            for name, known in self._known.items()
            if name in listing and (known.mtime is None or files.get(name) == (known.size, known.mtime))
        }
        self._known |= {name: Copied("none", 0, 0) for name in others}
        self._write_record()
        for name in others:
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]
            for parent in (self.folder / name).parents:
                if parent == self.folder or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _put(self, name: str, here: _Here) -> int:
        """Writes an object. A file that is gone by now is left to the next push."""
        self.check()
        before = self._known.get(name)
        self._known[name] = Copied("", here.size, here.mtime)
        self._write_record()
        with tempfile.TemporaryDirectory(dir=self._record.parent) as folder:
            try:
                version = self.store.put(_still(self.folder / name, Path(folder)), name)
            except FileNotFoundError:
                if before is None:
                    del self._known[name]
                return 0
        self._known[name] = Copied(version, here.size, here.mtime)
        self._write_record()
        return 1

    def _remove(self, name: str) -> None:
        if name in self._known:
            self.check()
            self._known[name] = self._known[name]._replace(version="")
            self._write_record()
            self.store.remove(name)
            del self._known[name]
            self._write_record()

    def _gone(self, files: Mapping[str, _Here], changed: list[str]) -> Iterator[str]:
        """Objects whose files this process has seen here and that are here no more.

        A file that was left in the bucket is gone if its folder's mark is: the folder was removed or
        replaced.
        """
        for name, known in self._known.items():
            if name in files:
                continue
            mark = mark_of(name) if known.mtime is None else name
            if mark in self._seen and (mark not in files or mark in changed):
                yield name

    def _is_known(self, name: str, here: _Here) -> bool:
        known = self._known.get(name)
        return known is not None and known.version != "" and (known.size, known.mtime) == here

    def _note(self, name: str, version: str) -> None:
        here = _here(self.folder / name)
        assert here is not None
        self._known[name] = Copied(version, *here)
        self._write_record()

    def _refuse_damaged(self, name: str) -> None:
        """Raises RunError if a stage wrote the file and it is another one now; the file is removed."""
        path = self.folder / name
        for folder in (path.parent, *path.parent.parents):
            if folder == self.folder.parent:
                return
            manifest = Manifest(folder)
            for record in manifest.records().values():
                known = record["files"].get(manifest.name(path))
                if known is not None and fingerprint(path) != known:
                    path.unlink()
                    raise RunError(
                        f"{self.place}/{name} is not as it was written: put the right file there, or remove "
                        f"{self.place}/{mark_of(name) or name}, and `middo run` makes it again"
                    )

    def _scan(self) -> dict[str, _Here]:
        """All files here that are copied."""
        found = {}
        for root, folders, names in os.walk(self.folder):
            folders[:] = filter(is_copied, folders)
            for file in names:
                path = Path(root, file)
                name = path.relative_to(self.folder).as_posix()
                if is_copied(name) and (here := _here(path)) is not None:
                    found[name] = here
        return found

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._turn:
            with full_disk_named(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with self._record.with_suffix(".guard").open("a") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX)
                self._known = self._read_record()
                yield

    def _read_record(self) -> dict[str, Copied]:
        try:
            rows = json.loads(self._record.read_bytes())
            return {name: Copied(*row) for name, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # then the bucket's files replace those here

    def _write_record(self) -> None:
        path = self._record
        temporary = path.with_suffix(f".{os.getpid()}")
        with full_disk_named(path):
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(temporary, path)


def _here(path: Path) -> _Here | None:
    """Size and mtime of a file; of a database with those of its log, which has what was written last."""
    try:
        stat = path.stat()
        size, mtime = stat.st_size, stat.st_mtime_ns
        if path.suffix == ".sqlite":
            with contextlib.suppress(FileNotFoundError):
                log = path.with_name(f"{path.name}-wal").stat()
                if log.st_size:
                    size, mtime = size + log.st_size, max(mtime, log.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Here(size, mtime)


def _still(path: Path, folder: Path) -> Path:
    """The file, or a copy of it in `folder` if it may change while it is sent.

    Raises:
      FileNotFoundError: it is gone.
    """
    to = folder / path.name
    if path.suffix == ".sqlite":
        with contextlib.suppress(sqlite3.Error):  # one that is damaged is sent as it is
            _snapshot(path, to)
            return to
    if path.stat().st_size > _COPIED_FIRST:
        return path
    shutil.copyfile(path, to)
    return to


def _snapshot(path: Path, to: Path) -> None:
    """Copies a database that others may write meanwhile."""
    with (
        contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30.0)) as source,
        contextlib.closing(sqlite3.connect(to)) as copy,
    ):
        source.backup(copy)
