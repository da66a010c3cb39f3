"""What is only read from a bucket: datasets, models, runs. Copies are kept, and renewed where they differ.

A dataset or a model has one copy per object, beside a hidden file with the version of the object and the size
and mtime of the copy. An object with another version, or a copy that was changed, is copied again.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from middo_jax.buckets.mirror import Mirror
from middo_jax.buckets.names import fits, is_light, is_pattern
from middo_jax.buckets.places import Place, shown
from middo_jax.buckets.store import BucketError, Store, StoredObject
from middo_jax.rundir.elsewhere import copy_of


def here(path: str, wants: Callable[[str], bool] = lambda name: True) -> str:
    """The path on this machine of a file, folder or pattern in a bucket; a text that is no URL is returned.

    Args:
      path: such as s3://bucket/data/*.jsonl.
      wants: whether a file of a folder is needed, by its name.

    Raises:
      BucketError: there is nothing of that name, or the bucket cannot be read.
    """
    url = Place.of(path)
    if url is None:
        return path
    parts = url.path.split("/")
    first = next((i for i, part in enumerate(parts) if is_pattern(part)), len(parts))
    place, pattern = Place(url.scheme, url.bucket, "/".join(parts[:first])), parts[first:]
    store = Store(place)
    found = {name: s for name, s in store.list().items() if not pattern or fits(name.split("/"), pattern)}
    if not found:
        raise BucketError(f"{url}: there is no such file or folder in the bucket")
    if "" in found:
        _copy(store, "", found[""], place.copy)
        return str(place.copy)
    for name, stored in found.items():
        if wants(name):
            _copy(store, name, stored, place.copy / name)
    _remove_others(place.copy, found, pattern)
    return "/".join([glob.escape(str(place.copy)) if pattern else str(place.copy), *pattern])


@contextlib.contextmanager
def read_only(place: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder for a command that only reads a run; of one in a bucket, a copy here without weights.

    Raises:
      BucketError: the bucket cannot be read.
    """
    url = Place.of(place)
    if url is None:
        yield Path(place)
        return
    mirror = Mirror(url, url.copy)
    mirror.pull(is_light, overwrites=True)
    if not any(mirror.folder.iterdir()):
        raise BucketError(f"{url}: there is no such folder in the bucket")
    with copy_of(mirror.folder, mirror):
        yield mirror.folder


def send(file: Path) -> str:
    """Writes a file of a copy into the bucket. Returns its URL; the path, if it is in no copy.

    Raises:
      BucketError: the bucket cannot be written.
    """
    place = Place.of(shown(file))
    if place is None:
        return str(file)
    Store(place.parent).put(file, place.name)
    return str(place)


def _copy(store: Store, name: str, stored: StoredObject, to: Path) -> None:
    """Copies an object, unless the copy here is of this version and as it was copied."""
    beside = to.with_name(f".{to.name}.version")
    with contextlib.suppress(OSError, ValueError):
        if json.loads(beside.read_bytes()) == [stored.version, *_stat(to)]:
            return
    store.get(name, to)
    beside.write_text(json.dumps([stored.version, *_stat(to)]), encoding="utf-8")


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _remove_others(folder: Path, found: Mapping[str, StoredObject], pattern: Sequence[str]) -> None:
    """Removes copies of objects that the bucket does not have any more."""
    for path in [*folder.rglob("*")] if folder.is_dir() else []:
        name = path.relative_to(folder).as_posix()
        is_copy = path.with_name(f".{path.name}.version").exists()
        if (
            path.is_file()
            and is_copy
            and name not in found
            and (not pattern or fits(name.split("/"), pattern))
        ):
            path.unlink()
