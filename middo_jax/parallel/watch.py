"""The watch of a job: heartbeats of all processes; it ends this one if others are lost or all are stuck."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax
from jax._src import distributed  # the client has no public name; Orbax uses it as well

from middo_jax.parallel.preemption import EXIT_PREEMPTED

POLL_S = 5.0
DEAD_AFTER_S = 25.0  # without a heartbeat
END_AFTER_S = 10.0  # for the main thread to end by itself after another process has failed

ending = threading.Event()  # set when the watch ends this process
_count = 0  # pieces of work done by this process
_at = "start"


def advanced(where: str) -> None:
    """Records progress of this process, so that `Watch` can find a process that is stuck."""
    global _count, _at
    _count, _at = _count + 1, where


class _End(NamedTuple):
    """Why this process must end, its exit code, and the delay in seconds."""

    reason: str
    code: int
    after_s: float


class Watch:
    """Ends this process with a message when another process has failed or is dead, or when all are stuck.

    The main thread may be in a collective that never returns, so only ending the process helps. The exit code
    is 1 if another process raised an error, which would recur after a restart. It is EXIT_PREEMPTED if a
    process is dead, cut off or stuck: the scheduler must then restart all of them.
    """

    def __init__(self, stall_timeout_s: float) -> None:
        """`stall_timeout_s`: how long all processes may make no progress."""
        self._stall_timeout_s = stall_timeout_s
        # Read here: at the program's end, the calls would make JAX start a new backend.
        self._me, self._processes = jax.process_index(), jax.process_count()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._guard_thread = threading.Thread(target=self._guard, daemon=True)
        self._looked = time.monotonic()
        self._seen: dict[str, tuple[int, float]] = {}
        self._moved: dict[str, tuple[int, float]] = {}
        self._beats = itertools.count()

    def start(self) -> None:
        """Starts watching, in threads of its own."""
        # A process may die before its first heartbeat.
        self._seen = {str(process): (-1, time.monotonic()) for process in range(self._processes)}
        self._looked = time.monotonic()
        self._thread.start()
        self._guard_thread.start()

    def _guard(self) -> None:
        """Ends this process if process 0 does not answer: a call to its store has no time limit.

        A host that is cut off gets no error, since no connection is closed. The time in which this process
        stood still itself does not count.
        """
        looked, silent = self._looked, 0.0
        while self._thread.is_alive():
            time.sleep(POLL_S)
            silent = silent + POLL_S if self._looked == looked else 0.0
            looked = self._looked
            if silent > DEAD_AFTER_S and not ending.is_set():
                reason = f"process 0, which coordinates, cannot be reached: no answer for {silent:.0f} s"
                self._end(_End(reason, EXIT_PREEMPTED, END_AFTER_S))

    def _watch(self) -> None:
        while True:
            try:
                end = self._look()
                self._looked = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                reason = f"process 0, which coordinates, cannot be reached: {str(error).splitlines()[0]}"
                end = _End(reason, EXIT_PREEMPTED, END_AFTER_S)
            if end is not None:
                self._end(end)
            time.sleep(POLL_S)

    def _look(self) -> _End | None:
        client, me = distributed.global_state.client, str(self._me)
        if client is None:  # shut down normally
            sys.exit()
        about = {"beat": next(self._beats), "count": _count, "at": _at, "host": socket.gethostname()}
        client.key_value_set(f"middo/heartbeat/{me}", json.dumps(about), allow_overwrite=True)
        ended = {key.rsplit("/", 1)[1]: text for key, text in client.key_value_dir_get("middo/end/")}
        for process, text in ended.items():
            if text and process != me:
                return _End(f"process {process} ended: {text}", 1, END_AFTER_S)
        table = {
            key.rsplit("/", 1)[1]: json.loads(x) for key, x in client.key_value_dir_get("middo/heartbeat/")
        }
        now = time.monotonic()
        for process, row in table.items():
            if self._seen.get(process, (None, 0))[0] != row["beat"]:
                self._seen[process] = row["beat"], now
            if self._moved.get(process, (None, 0))[0] != row["count"]:
                self._moved[process] = row["count"], now
        for process, (_, since) in self._seen.items():
            if process not in ended and now - since > DEAD_AFTER_S:
                row = table.get(process)
                where, last = (f" on {row['host']}", f", last at {row['at']}") if row else ("", "")
                reason = (
                    f"process {process}{where} has sent no heartbeat for {now - since:.0f} s{last}: "
                    "it is dead or cut off"
                )
                return _End(reason, EXIT_PREEMPTED, END_AFTER_S)
        still = now - max(since for _, since in self._moved.values())
        if still > self._stall_timeout_s:
            least = min(row["count"] for row in table.values())
            behind = [
                f"process {process} on {row['host']} at {row['at']}"
                for process, row in sorted(table.items())
                if row["count"] == least
            ]
            reason = (
                f"nobody got further for {still:.0f} s (hosts.stall_timeout); last is {', '.join(behind)}"
            )
            return _End(reason, EXIT_PREEMPTED, 0)
        return None

    def _end(self, end: _End) -> None:
        ending.set()
        time.sleep(end.after_s)
        print(
            f"middo: {end.reason}; the same command resumes from what is saved", file=sys.stderr, flush=True
        )
        # The service ends with this process, and the others would then end at once, without a message.
        if self._me == 0:
            time.sleep(2 * POLL_S)
        os._exit(end.code)
