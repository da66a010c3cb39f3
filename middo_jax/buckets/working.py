"""The folder of a run or of another command's results, in a bucket or on this machine.

    with working("gs://bucket/runs/mine", say) as folder: ...

The block works in a copy on this machine. What it has written is pushed to the bucket at every point at which
other processes may read it, every few minutes in between, and at the end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from middo_jax.beside import beside
from middo_jax.buckets.keeping import push_kept
from middo_jax.buckets.lease import Lease, leased
from middo_jax.buckets.mirror import Mirror, Wants
from middo_jax.buckets.names import is_light, is_piece
from middo_jax.buckets.places import Place
from middo_jax.buckets.store import BucketError
from middo_jax.rundir import Manifest, RunError
from middo_jax.rundir.elsewhere import copy_of
from middo_jax.rundir.files import is_reader, reader_index

PUSH_EVERY_S = 180.0
_TRAINED = frozenset(("train", "best", "control"))  # stages that complete a checkpoint


class _Current:
    """The folder in a bucket that this process works in.

    In a job of several processes each has a folder of its own. Process 0 writes, and the others pull what it
    has pushed. Only checkpoints are written by all, in pieces.
    """

    def __init__(self, mirror: Mirror, lease: Lease | None) -> None:
        self.mirror, self._lease = mirror, lease
        if lease is not None:
            mirror.check = lease.check
        self._pushed, self._seen = 0, 0

    def push(self, wants: Wants = lambda name: True) -> int:
        """Pushes what this process has written; returns the number of changes of the bucket up to now."""
        if self._lease is None:
            self._pushed += self.mirror.push(is_piece, removes=False)
        else:
            self._pushed += self.mirror.push(wants)
        return self._pushed

    def receive(self, pushed: int) -> None:
        """Removes the pieces that this process has no more, and pulls, if process 0 has pushed since."""
        if pushed != self._seen:
            self._seen = pushed
            self._pushed += self.mirror.push(is_piece)
            self.mirror.pull(is_light, keeps=is_piece)

    def learn(self, pushed: int) -> None:
        """Finds the pieces that others have pushed, if there are any."""
        if pushed != self._seen:
            self._seen = pushed
            self.mirror.learn()


_current: _Current | None = None
_writes_pieces = False


def writes_pieces() -> None:
    """Says that several processes write checkpoints, and push them together and at no other time."""
    global _writes_pieces
    _writes_pieces = True


def in_bucket() -> bool:
    """Whether this process works in a copy of a folder in a bucket."""
    return _current is not None


def publish() -> int:
    """Pushes what this process has written, if it works in a bucket; others may read it then.

    Returns:
      The number of changes of the bucket by this process up to now.

    Raises:
      BucketError: the bucket cannot be written.
      RunLocked: another process has taken the lock.
    """
    push_kept()
    return 0 if _current is None else _current.push()


def receive(pushed: int) -> None:
    """Pulls what process 0 has pushed, if it works in a bucket; `pushed` is what its `publish` returned."""
    if _current is not None:
        _current.receive(pushed)


def learn(pushed: int) -> None:
    """Finds what other processes have pushed; `pushed` is the sum of what their `publish` returned."""
    if _current is not None:
        _current.learn(pushed)


@contextlib.contextmanager
def working(place: str | os.PathLike[str], say: Callable[[str], None]) -> Iterator[Path]:
    """The folder for a command that writes there; of one in a bucket, the copy on this machine.

    While the block runs, no other process can write there. Checkpoints that are finished stay in the bucket
    until they are read.

    Args:
      place: a folder, or the URL of one.
      say: gets a line for what is copied, and for a push that failed and is tried again.

    Raises:
      RunLocked: another process writes there.
      BucketError: the bucket cannot be used.
    """
    global _current
    url = Place.of(place)
    if url is None:
        yield Path(place)
        return
    mirror = Mirror(url, url.work(reader_index()))
    with contextlib.ExitStack() as stack:
        lease = None if is_reader() else stack.enter_context(leased(mirror.store, say))
        if n := _pull(mirror, overwrites=lease is None):
            say(f"{url}: {n} files copied to {mirror.folder}")
        stack.enter_context(copy_of(mirror.folder, mirror))
        before, _current = _current, _Current(mirror, lease)
        try:
            with contextlib.nullcontext() if lease is None else _pushed_often(_current, say):
                yield mirror.folder
        except BaseException:
            try:  # what is finished must be in the bucket, above all when the machine is taken away
                _current.push()
            except (RunError, OSError) as error:
                say(f"{error}; the rest is in {mirror.folder}")
            raise
        else:
            _current.push()
        finally:
            _current = before


def _pull(mirror: Mirror, overwrites: bool) -> int:
    """Copies all but the checkpoints of finished trainings, which the manifests tell."""
    n = mirror.pull(is_light, overwrites=overwrites)
    return n + mirror.pull(lambda name: is_light(name) or _is_unfinished(mirror.folder, name))


def _is_unfinished(folder: Path, name: str) -> bool:
    before, found, _ = f"/{name}".partition("/checkpoint/")
    return bool(found) and not _TRAINED & Manifest(folder / before.lstrip("/")).records().keys()


@contextlib.contextmanager
def _pushed_often(current: _Current, say: Callable[[str], None]) -> Iterator[None]:
    def push(done: threading.Event) -> None:
        while not done.wait(PUSH_EVERY_S):
            try:
                current.push(lambda name: not (_writes_pieces and "/checkpoint/" in f"/{name}"))
            except BucketError as error:
                say(f"{error}; tried again in {PUSH_EVERY_S:.0f} s")
            except (RunError, OSError) as error:  # the next push of the main thread ends the program with it
                say(str(error))
                return

    with beside(push):
        yield
