"""The results of a pass on disk, in parts, so that a pass that was stopped goes on where it was.

A batch is known by a hash of all that decides its results: the model, the program's static arguments, the
shape, and the examples in each row. The plan of a pass depends on the examples and the mesh alone, so the
same pass plans the same batches again, and takes the results of those that it has. On another mesh, those
that are planned otherwise are computed. No batch is packed to find its key: each example has a digest, and in
a job each process computes those of its share.

A part is a numpy archive, written every `SAVE_EVERY_S` and where the pass ends early:

  keys      uint8 [batches, 16], the batches' hashes
  sizes     int64 [batches], examples per batch
  leaf0...  results of all its examples, [examples, ...]; the leaves of the program's output
"""

from __future__ import annotations

import hashlib
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from middo_jax.parallel.coordination import from_first
from middo_jax.parallel.hosts import gather_rows, share_of
from middo_jax.progress import Progress
from middo_jax.rundir import files
from middo_jax.rundir.leftovers import remove
from middo_jax.version import __version__

SAVE_EVERY_S = 60.0
_KEY_BYTES = 16
_NAME = re.compile(r"([0-9a-f]{16})-(\d{6})\.npz")


class _Place(NamedTuple):
    """Where the results of a batch are: the examples from `start` to `stop` of a part."""

    part: Path
    start: int
    stop: int


class Parts:
    """The parts of one pass in a folder of its own. Process 0 writes them, and all processes read them."""

    def __init__(self, folder: Path, identity: str, progress: Progress, name: str) -> None:
        """Finds the parts of earlier starts. Those of another model or another version are removed.

        Args:
          folder: folder of the pass; it is made when the first part is written.
          identity: hash of the model's config and weights.
          progress: is told how many results were found.
          name: name of the pass in the progress display.
        """
        decisive = f"{__version__} {identity}"
        self._folder, self._identity = folder, hashlib.sha256(decisive.encode()).hexdigest()[:16]
        self._pending: dict[bytes, list[np.ndarray]] = {}
        self._saved_at = time.monotonic()
        self._open: tuple[Path, list[np.ndarray]] | None = None
        names = from_first(f"parts of {name}", lambda: self._whole_parts(progress))
        self._next = 1 + max((int(name.rpartition("-")[2].removesuffix(".npz")) for name in names), default=0)
        self._places: dict[bytes, _Place] = {}
        for part in (folder / name for name in names):
            with np.load(part, allow_pickle=False) as archive:
                stops = np.cumsum(archive["sizes"]).tolist()
                for key, start, stop in zip(archive["keys"], [0, *stops], stops, strict=False):
                    self._places[key.tobytes()] = _Place(part, start, stop)
        if found := sum(place.stop - place.start for place in self._places.values()):
            progress.say(f"{name}: goes on after {found:,} examples of an earlier start")

    def key(self, rows: Iterable[Sequence[bytes]], static: Mapping[str, Any]) -> bytes:
        """Returns the key of a batch.

        Args:
          rows: digests of the examples in each row, in their order.
          static: what else decides the packed inputs and the program: its static arguments and the shape.
        """
        key = hashlib.blake2b(self._identity.encode(), digest_size=_KEY_BYTES)
        key.update(repr(sorted(static.items())).encode())
        for row in rows:
            key.update(b"row%d:" % len(row) + b"".join(row))
        return key.digest()

    def find(self, key: bytes) -> list[np.ndarray] | None:
        """Returns the leaves of a batch's results, [m, ...] each; None if they must be computed."""
        if (place := self._places.get(key)) is None:
            return None
        if self._open is None or self._open[0] != place.part:  # batches are asked for in the order of a part
            with np.load(place.part, allow_pickle=False) as archive:
                count = sum(name.startswith("leaf") for name in archive.files)
                self._open = place.part, [archive[f"leaf{i}"] for i in range(count)]
        return [leaf[place.start : place.stop] for leaf in self._open[1]]

    def add(self, key: bytes, leaves: Sequence[np.ndarray]) -> None:
        """Keeps the results of a batch, [m, ...] each, and writes a part if it is time."""
        self._pending[key] = list(leaves)
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Writes what was added since the last part."""
        self._saved_at = time.monotonic()
        if files.is_reader():  # process 0 writes what all have gathered
            self._pending.clear()
        if not self._pending:
            return
        batches = list(self._pending.values())
        arrays = {f"leaf{i}": np.concatenate(of_all) for i, of_all in enumerate(zip(*batches, strict=True))}
        arrays["keys"] = np.frombuffer(b"".join(self._pending), np.uint8).reshape(-1, _KEY_BYTES)
        arrays["sizes"] = np.array([len(batch[0]) for batch in batches], np.int64)
        with files.atomic(self._folder / f"{self._identity}-{self._next:06d}.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        self._next += 1
        self._pending.clear()

    def _whole_parts(self, progress: Progress) -> list[str]:
        """Names of this pass's parts, in order; removes the others, and says which are damaged."""
        names = []
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue  # a temporary file, which is swept with the others
            if match[1] != self._identity:
                remove(path)
            elif _is_whole(path):
                names.append(path.name)
            else:
                progress.say(f"{path}: damaged, so its batches are computed again")
                remove(path)
        return names


class Saved(NamedTuple):
    """The parts of a pass, and the digests of all its examples."""

    parts: Parts
    digests: Sequence[bytes]


def digests(n: int, content: Callable[[int], Any], own: Sequence[int] | None = None) -> list[bytes]:
    """Returns the digest of each of n examples. In a job all processes must call it.

    Args:
      n: number of examples.
      content: index of an example -> all of it that the packed inputs are made of, a pytree of arrays.
      own: indices of the examples that this process reads, which are all examples of all processes together;
        None: every so many-th.
    """
    own = share_of(n) if own is None else own
    rows = np.frombuffer(b"".join(digest(content(i)) for i in own), np.int32).reshape(
        len(own), _KEY_BYTES // 4
    )
    return [row.tobytes() for row in gather_rows("digests of a pass", own, rows, n)]


def digest(content: Any) -> bytes:
    """Returns the hash of an example's content, a pytree of arrays."""
    found = hashlib.blake2b(digest_size=_KEY_BYTES)
    for path, x in jax.tree_util.tree_leaves_with_path(content):
        found.update(f"\n{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        found.update(np.ascontiguousarray(x).data)
    return found.digest()


def _is_whole(path: Path) -> bool:
    """Whether an archive has the checksums that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False
