"""A SIGTERM ends the program, also where Python drops what its handler raises."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from middo_jax.parallel import preemption
from middo_jax.parallel.coordination import stop_point
from middo_jax.parallel.preemption import Preempted, preempted


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    before = signal.signal(signal.SIGTERM, preempted)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_came_in_a_callback_ends_the_program_at_the_next_stop_point(handled: None) -> None:
    def in_collector(phase: str, info: Any) -> None:
        if phase == "start":
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # the handler runs in here, and what it raises is dropped

    stop_point()
    gc.callbacks.append(in_collector)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(in_collector)
    with pytest.raises(Preempted):
        stop_point()
