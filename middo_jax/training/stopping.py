"""Stop signals: the current step is finished and saved; the exit code tells the two signals apart.

Ctrl-C (SIGINT)          KeyboardInterrupt, exit code 130 in a shell
preemption (SIGTERM)     Preempted, exit code 75: EX_TEMPFAIL of sysexits.h, "try again later"
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from middo_jax.parallel import preemption
from middo_jax.parallel.preemption import Preempted

_log = logging.getLogger(__name__)


class StopCheck(Protocol):
    """Raises KeyboardInterrupt or Preempted if the process has been told to stop."""

    def __call__(self, step: int | None = None) -> None:
        """`step` is the step just done, the same on every process; None where processes need not agree."""
        ...


@contextlib.contextmanager
def deferred_stops() -> Iterator[StopCheck]:
    """Defers signals within the block to the next call of the check; a second Ctrl-C raises at once.

    An exception in the middle of a step would find the old parameters donated and the new ones not yet there.

    With several processes, all must stop at the same step. JAX's preemption service then handles SIGTERM and
    chooses that step. Ctrl-C stops at once, because the processes could not agree on a step.
    """
    # Not at the top: the command line imports EXIT_PREEMPTED, and `middo select` must not load JAX.
    import jax

    from middo_jax.parallel.coordination import stop_point

    alone = jax.process_count() == 1
    told: list[signal.Signals] = []

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _log.warning("interrupted: saving after the step under way; once more stops at once")
        told.append(signal.SIGINT)

    def preempted(*_: object) -> None:
        _log.warning("received SIGTERM: saving after the current step")
        told.append(signal.SIGTERM)

    def check(step: int | None = None) -> None:
        if signal.SIGTERM in told:
            raise Preempted
        if told:
            raise KeyboardInterrupt
        if not alone and step is not None:
            stop_point()

    ours: list[tuple[signal.Signals, Any]] = []
    if alone and threading.current_thread() is threading.main_thread():
        for number, default, handler in (
            (signal.SIGINT, signal.default_int_handler, interrupted),
            (signal.SIGTERM, signal.SIG_DFL, preempted),
        ):
            # A handler set by the caller is kept; only the default and the program's own are replaced.
            if (before := signal.getsignal(number)) in (default, preemption.preempted):
                signal.signal(number, handler)
                ours.append((number, before))
    try:
        yield check
    finally:
        for number, before in ours:
            signal.signal(number, before)
