"""The lock of a folder in a bucket: the object `middo.lock`, of which one process at a time is the owner.

A bucket has no processes, and the hosts of a preempted slice never come back to say that theirs has ended. So
the lock is a lease: its owner writes it anew every minute, and stops writing anything once it could not do so
for five minutes. A lock that is ten minutes old by the bucket's own clock is one whose owner has ended or has
stopped to write, and is removed. Younger ones are removed only if the owner has provably ended on this host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from middo_jax.buckets.names import LOCK
from middo_jax.buckets.store import BucketError, Store
from middo_jax.progress import duration
from middo_jax.rundir.files import json_line
from middo_jax.rundir.lock import Owner, RunLocked

REFRESH_S = 60.0
ALIVE_S = 2 * REFRESH_S  # a lock no older than that has an owner that runs
TRUST_S = 300.0  # since the last refresh: the owner writes no longer than that
EXPIRES_S = 600.0
_POLL_S = 15.0


class Lease:
    """A lock that this process holds, and keeps fresh in a thread of its own."""

    def __init__(self, store: Store, owner: Owner) -> None:
        self._store, self._owner = store, owner
        self._refreshed = time.monotonic()
        self._lost: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Has to be called before anything is written.

        Raises:
          RunLocked: another process has the lock now, or may have it.
        """
        if self._lost is None and time.monotonic() - self._refreshed > TRUST_S:
            self._refresh()
        if self._lost is not None:
            raise RunLocked(self._lost)

    def release(self) -> None:
        """Removes the lock, unless it is another process's by now."""
        self._done.set()
        self._thread.join()
        if _owner(self._store) == self._owner:
            self._store.remove(LOCK)

    def _keep_fresh(self) -> None:
        while not self._done.wait(REFRESH_S):
            with contextlib.suppress(BucketError):  # `check` finds a lease that is too old
                self._refresh()

    def _refresh(self) -> None:
        """Writes the lock anew if it is still this process's. A server that is away is an error, no loss."""
        began, other = time.monotonic(), _owner(self._store)
        if began - self._refreshed > EXPIRES_S or other != self._owner:
            now = "" if other in (None, self._owner) else f"; now it is locked by {other}"
            self._lost = (
                f"{self._store.place}: this process could not keep its lock, and writes no more there"
                f"{now}. The same command resumes from what is in the bucket"
            )
            return
        self._store.put_text(json_line(dataclasses.asdict(self._owner)), LOCK)
        self._refreshed = began


@contextlib.contextmanager
def leased(store: Store, say: Callable[[str], None]) -> Iterator[Lease]:
    """Locks the folder of a store against all other processes while the block runs.

    Args:
      store: the folder's.
      say: gets a line for a lock that was removed, and one before a wait.

    Raises:
      RunLocked: another process holds the lock, or may hold it.
      BucketError: the bucket cannot be used.
    """
    lease = _take(store, say)
    try:
        yield lease
    finally:
        with contextlib.suppress(BucketError):  # it expires
            lease.release()


def _take(store: Store, say: Callable[[str], None]) -> Lease:
    owner = Owner.this_process()
    text = json_line(dataclasses.asdict(owner))
    while not store.create(text, LOCK):
        found = store.read(LOCK)
        if found is not None:
            _wait_or_break(store, found, say)
    if _owner(store) != owner:  # a server that ignores the condition lets two create it: the last one has it
        raise RunLocked(f"{store.place} was locked by another process at the same moment; start again")
    return Lease(store, owner)


def _wait_or_break(store: Store, text: str, say: Callable[[str], None]) -> None:
    """Returns once the lock with this text is gone, broken if need be.

    Raises:
      RunLocked: its owner still runs, or nothing says who it is.
    """
    other = Owner.of(text)
    if other is None:
        raise RunLocked(
            f"{store.place} is locked, and its {LOCK} does not say by whom: make sure that no other process "
            f"writes there, remove {store.place}/{LOCK}, and start again"
        )
    first, is_told = None, False
    while not other.has_ended():
        age_s, stored = _age(store)
        if stored is None or store.read(LOCK) != text:
            return
        first = first or stored
        if stored != first or age_s < ALIVE_S:
            raise RunLocked(
                f"{store.place} is locked by {other}, which was there {duration(max(0.0, age_s))} ago: wait "
                "until it ends, or stop it"
            )
        if age_s > EXPIRES_S:
            break
        if not is_told:
            say(
                f"{store.place} is locked by {other}, last there {duration(age_s)} ago; waiting for up to "
                f"{duration(EXPIRES_S - age_s)} whether it still runs"
            )
            is_told = True
        time.sleep(_POLL_S)
    _break(store, text, other)
    say(f"{store.place}: removed the lock of {other}, which has ended without releasing it")


def _age(store: Store) -> tuple[float, str | None]:
    """(Seconds since the lock was written, by the clock of the bucket; its version, None if it is gone)."""
    probe = f"{LOCK}.probe-{uuid.uuid4().hex}"
    store.put_text("", probe)
    now, lock = store.info(probe), store.info(LOCK)
    store.remove(probe)
    if now is None or lock is None:
        return 0.0, None
    return now.modified - lock.modified, f"{lock.version} {lock.modified}"


def _break(store: Store, text: str, other: Owner) -> None:
    """Removes a lock, unless another process does so, too: it has to be the first to create an object."""
    mark = f"{LOCK}.removing-{other.token}"
    if not store.create("", mark):
        raise RunLocked(
            f"{store.place}: another process removes the lock of {other}: start again in a minute; if this "
            f"stays, remove {store.place}/{mark} and {store.place}/{LOCK}"
        )
    if store.read(LOCK) == text:
        store.remove(LOCK)
    store.remove(mark)


def _owner(store: Store) -> Owner | None:
    return Owner.of(store.read(LOCK) or "")
