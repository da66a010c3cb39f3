"""Progress on stderr with an estimate of the time left: bars on a terminal, otherwise lines."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich import progress
from rich.console import Console

LINE_EVERY_S = 15.0  # between two lines without a terminal


class Advance(Protocol):
    """Reports the progress of a task."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """`note` is appended to the line."""
        ...


class Progress(Protocol):
    """Interface through which stages report their progress."""

    def say(self, text: str) -> None:
        """Prints one line for the user."""
        ...

    def task(self, name: str, unit: str = "samples") -> contextlib.AbstractContextManager[Advance]:
        """Returns a context manager; it yields a function of (done, total, note) that the block calls."""
        ...


class Silent:
    """Prints nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Shows nothing."""
        yield lambda done, total, note="", /: None


class Lines:
    """For logs: a line at the start, every LINE_EVERY_S seconds, and at the end."""

    def say(self, text: str) -> None:
        """Prints one line on stderr."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Prints lines with the count, the elapsed time and the time left."""
        started = spoken = time.monotonic()
        last = (0, 0, "")
        first: tuple[int, float] | None = None  # the speed excludes work that was done before this start

        def line(done: int, total: int, note: str) -> str:
            passed = time.monotonic() - started
            since = (done - first[0], time.monotonic() - first[1]) if first else (0, 0.0)
            left = since[1] / since[0] * (total - done) if since[0] else None
            estimate = f", {duration(left)} left" if left is not None and done < total else ""
            return f"  {name}: {done}/{total} {unit} in {duration(passed)}{estimate} {note}".rstrip()

        def advance(done: int, total: int, note: str = "", /) -> None:
            nonlocal spoken, last, first
            last, first = (done, total, note), first or (done, time.monotonic())
            if time.monotonic() - spoken >= LINE_EVERY_S and done < total:
                spoken = time.monotonic()
                self.say(line(*last))

        yield advance
        if last[1]:
            self.say(line(*last))


class Bars:
    """For terminals: rich's progress bars on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Prints one line above the bars."""
        self._console.print(text, markup=False)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Shows a bar with the count, the elapsed time and the time left. It stays on the terminal."""
        columns = (
            progress.TextColumn("  {task.description:<26}", markup=False),
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit, markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left", markup=False),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
        )
        with progress.Progress(*columns, console=self._console) as bars:
            bar = bars.add_task(name, total=None, note="")

            def advance(done: int, total: int, note: str = "", /) -> None:
                bars.update(bar, completed=done, total=total, note=note)

            yield advance


class Observed:
    """Reports to another progress, and calls an observer with the task's name at each advance."""

    def __init__(self, progress: Progress, observer: Callable[[str], None]) -> None:
        self._progress, self._observer = progress, observer

    def say(self, text: str) -> None:
        """Prints one line for the user."""
        self._progress.say(text)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Opens a task of the other progress."""
        self._observer(name)
        with self._progress.task(name, unit) as advance:

            def observed(done: int, total: int, note: str = "", /) -> None:
                self._observer(name)
                advance(done, total, note)

            yield observed


class HeldBack:
    """Holds back what is said and what is logged, until the first line has been said or the block ends.

    with HeldBack(progress) as opening: opening.say("a lock was removed"); opening.first("middo-jax 1.0 on")
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._waiting: list[Callable[[], object]] | None = None  # None: nothing is held back
        self._filters: list[tuple[logging.Handler, Callable[[logging.LogRecord], bool]]] = []

    def __enter__(self) -> HeldBack:
        """Begins."""
        self._waiting = []
        handlers = logging.getLogger().handlers or [logging.lastResort]
        for handler in filter(None, handlers):
            keep = functools.partial(self._keep, handler)
            handler.addFilter(keep)
            self._filters.append((handler, keep))
        return self

    def __exit__(self, *error: object) -> None:
        """Says what is still held back."""
        self.release()

    def _keep(self, handler: logging.Handler, record: logging.LogRecord) -> bool:
        if self._waiting is not None:
            self._waiting.append(functools.partial(handler.handle, record))
        return self._waiting is None

    def say(self, text: str) -> None:
        """Prints one line for the user, behind the first one."""
        if self._waiting is None:
            self._progress.say(text)
        else:
            self._waiting.append(functools.partial(self._progress.say, text))

    def first(self, text: str) -> None:
        """Says the first line, and then what was held back."""
        self._progress.say(text)
        self.release()

    def release(self) -> None:
        """Says what was held back, in its order, and holds back nothing any more."""
        for handler, keep in self._filters:
            handler.removeFilter(keep)
        waiting, self._waiting, self._filters = self._waiting, None, []
        for each in waiting or ():
            each()


_in_job: tuple[bool, Callable[[str], None]] | None = None


def in_job(speaks: bool, observer: Callable[[str], None]) -> None:
    """Configures `for_stderr` for a job of several processes: only one reports; all call the observer."""
    global _in_job
    _in_job = speaks, observer


def for_stderr() -> Progress:
    """Returns bars if stderr is a terminal, otherwise lines; silent in processes that must not report."""
    progress = Bars() if sys.stderr.isatty() else Lines()
    if _in_job is None:
        return progress
    speaks, observer = _in_job
    return Observed(progress if speaks else Silent(), observer)


def duration(seconds: float) -> str:
    """0.42 -> "0.4 s", 75 -> "1 min 15 s", 5400 -> "1 h 30 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
