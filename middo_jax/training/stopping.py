"""Being told to stop: the step under way is finished and saved, and the exit code says which it was.

Ctrl-C (SIGINT)          KeyboardInterrupt, which a shell knows as 130
preemption (SIGTERM)     Preempted, 75: the EX_TEMPFAIL of sysexits.h, "try again later"
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
        """`step` is the one just done, the same on every process; None where processes need not agree."""
        ...


@contextlib.contextmanager
def deferred_stops() -> Iterator[StopCheck]:
    """Within the block signals wait for the check; a second Ctrl-C raises as usual.

    An exception in the middle of a step would find the old parameters donated and the new ones not yet there.

    Where several processes train, all have to stop at the same step: there JAX's preemption service listens
    for SIGTERM and says which step that is, and Ctrl-C, on which nobody could agree, stops at once.
    """
    # Not at the top: the command line reads EXIT_PREEMPTED, and `middo select` loads no JAX.
    import jax

    from middo_jax.parallel.coordination import stop_point

    alone = jax.process_count() == 1
    told: list[signal.Signals] = []

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _log.warning("interrupted: saving after the step under way; once more stops at once")
        told.append(signal.SIGINT)

    def preempted(*_: object) -> None:
        _log.warning("told to terminate: saving after the step under way")
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
            # Whoever has set another handler wants that one, but for the program's own.
            if (before := signal.getsignal(number)) in (default, preemption.preempted):
                signal.signal(number, handler)
                ours.append((number, before))
    try:
        yield check
    finally:
        for number, before in ours:
            signal.signal(number, before)
