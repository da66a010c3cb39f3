"""Records which processes have arrived at a job's start: one file per process in a folder that hosts share.

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

# Between two writes of a file. A file three intervals older than this process's belongs to a dead process.
ALIVE_S = 5.0


class RollCall:
    """Keeps this process's file fresh while the block runs, and then removes it."""

    def __init__(self, shared: Path, job: str, process: int | None) -> None:
        """`job` separates jobs that share a folder. Without `process`, pid and host identify the process."""
        self._folder = shared / f".joining-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
        # With the host: in containers, every process may have the same pid.
        unnumbered = f"pid {os.getpid()}@{quote(socket.gethostname(), safe='')}"
        self._mine = self._folder / (unnumbered if process is None else str(process))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, daemon=True)

    def __enter__(self) -> RollCall:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sign()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._mine.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other processes still use it
            self._folder.rmdir()

    def _sign(self) -> None:
        self._mine.write_text(socket.gethostname(), encoding="utf-8")

    def _keep_fresh(self) -> None:
        while not self._done.wait(ALIVE_S):
            with contextlib.suppress(OSError):  # the shared folder may be unavailable for a moment
                self._sign()

    def arrived(self) -> dict[str, str]:
        """{process: host} of the processes that wait now; ages are by the file system's clock.

        A process without a number is called `pid 12@HOST`.
        """
        found, now = {}, self._mine.stat().st_mtime
        for path in sorted(self._folder.iterdir()):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime < 3 * ALIVE_S:
                    found[path.name] = path.read_text(encoding="utf-8")
        return found

    def missing(self, processes: int | None) -> str:
        """A message about the processes that have not arrived."""
        try:
            arrived = self.arrived()
        except OSError as error:
            return f"not all hosts have arrived; those that have cannot be read from {self._folder}: {error}"
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
            f"the folder {self._folder.parent}"
        )
