"""Files of a folder that are in its bucket and not on this machine until they are needed.

Weights are large, and most commands do not read them. A stage whose weights are in the bucket is done, so the
manifest counts these files as present, and whoever reads them calls `bring` first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


class Original(Protocol):
    """The folder in a bucket of which a folder here is a copy."""

    def has(self, path: Path) -> bool:
        """Whether a file that is not here is in the bucket."""
        ...

    def bring(self, path: Path) -> None:
        """Copies a file, or all files below a folder, to this machine."""
        ...

    def size(self, path: Path) -> int:
        """Bytes of the files at or below a path that are not here."""
        ...


_originals: dict[Path, Original] = {}


@contextlib.contextmanager
def copy_of(folder: Path, original: Original) -> Iterator[None]:
    """Within the block, `folder` may lack files that `original` has."""
    _originals[folder.absolute()] = original
    try:
        yield
    finally:
        del _originals[folder.absolute()]


def is_elsewhere(path: Path) -> bool:
    """Whether a file that is not here is in the bucket of its folder."""
    original = _original(path)
    return original is not None and original.has(_normal(path))


def bring(path: Path) -> None:
    """Brings a file, or all files below a folder, to this machine, if its folder is a copy of a bucket's.

    Raises:
      RunError: the bucket cannot be read, or a file there is not as it was written.
    """
    original = _original(path)
    if original is not None:
        original.bring(_normal(path))


def size_elsewhere(path: Path) -> int:
    """Bytes of the files at or below a path that are in the bucket of its folder and not here."""
    original = _original(path)
    return 0 if original is None else original.size(_normal(path))


def _original(path: Path) -> Original | None:
    if not _originals:
        return None
    path = _normal(path)
    return next((found for folder, found in _originals.items() if path.is_relative_to(folder)), None)


def _normal(path: Path) -> Path:
    return Path(os.path.abspath(path))  # names in manifests contain `..`
