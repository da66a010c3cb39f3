"""Records which processes have arrived at a job's start: one text per process where all hosts see it.

JAX's coordination service ends the process when its start times out, and does not report who was missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from middo_jax.buckets.store import BucketError
from middo_jax.parallel.board import board

# Between two writes of a text. One that is three intervals older than this process's is a dead process's.
ALIVE_S = 5.0


class RollCall:
    """Keeps this process's text fresh while the block runs, and then removes it."""

    def __init__(self, shared: str | Path, job: str, process: int | None) -> None:
        """`job` separates jobs that share a place. Without `process`, pid and host identify the process.

        `shared`: a folder, or the URL of one in a bucket.
        """
        self._shared = shared
        self._board = board(shared, f".joining-{hashlib.sha256(job.encode()).hexdigest()[:8]}")
        # With the host: in containers, every process may have the same pid.
        unnumbered = f"pid {os.getpid()}@{quote(socket.gethostname(), safe='')}"
        self._mine = unnumbered if process is None else str(process)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, daemon=True)

    def __enter__(self) -> RollCall:
        self._sign()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._board.remove(self._mine)

    def _sign(self) -> None:
        self._board.write(self._mine, socket.gethostname())

    def _keep_fresh(self) -> None:
        while not self._done.wait(ALIVE_S):
            with contextlib.suppress(OSError, BucketError):  # it may be unavailable for a moment
                self._sign()

    def arrived(self) -> dict[str, str]:
        """{process: host} of the processes that wait now; ages are by the clock of the shared place.

        A process without a number is called `pid 12@HOST`.
        """
        notes = self._board.notes()
        now = max((note.written for note in notes.values()), default=0.0)
        return {name: note.text for name, note in notes.items() if now - note.written < 3 * ALIVE_S}

    def missing(self, processes: int | None) -> str:
        """A message about the processes that have not arrived."""
        try:
            arrived = self.arrived()
        except (OSError, BucketError) as error:
            return f"not all hosts have arrived; those that have cannot be read from {self._shared}: {error}"
        hosts = ", ".join(f"{name.partition('@')[0]} on {host}" for name, host in arrived.items())
        if processes is None:
            return f"not all hosts have arrived (here: {hosts})"
        absent = [str(i) for i in range(processes) if str(i) not in arrived]
        if not absent:
            return (
                f"all {processes} processes have arrived ({hosts}), but do not reach the coordinator's port"
            )
        return (
            f"process {', '.join(absent)} of {processes} has not arrived (here: {hosts}), or does not share "
            f"{self._shared}"
        )
