"""Progress on stderr, with an estimate: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

LINE_EVERY_S = 15.0  # between lines where there is no terminal


class Advance(Protocol):
    """How a piece of work says how far it is."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """`note` is what else there is to say."""
        ...


class Progress(Protocol):
    """Where stages say how far they are."""

    def say(self, text: str) -> None:
        """One line for the user."""
        ...

    def task(self, name: str, unit: str = "samples") -> contextlib.AbstractContextManager[Advance]:
        """A piece of work: the block calls what it is given with (done, total, note)."""
        ...


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Nothing."""
        yield lambda done, total, note="", /: None


class Lines:
    """For logs: a line at the start, every LINE_EVERY_S seconds, and at the end."""

    def say(self, text: str) -> None:
        """One line on stderr."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """Lines with share, rate and time left."""
        started = spoken = time.monotonic()
        last = (0, 0, "")
        first: tuple[int, float] | None = None  # what was done before this start says nothing of the speed

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
    """For people: rich's progress bars on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, markup=False)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """A bar with count, time passed and time left; it stays when done."""
        from rich import progress

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
    """Reports to another progress, and calls an observer with a task's name whenever a task gets further."""

    def __init__(self, progress: Progress, observer: Callable[[str], None]) -> None:
        self._progress, self._observer = progress, observer

    def say(self, text: str) -> None:
        """One line for the user."""
        self._progress.say(text)

    @contextlib.contextmanager
    def task(self, name: str, unit: str = "samples") -> Iterator[Advance]:
        """A task of the other progress."""
        self._observer(name)
        with self._progress.task(name, unit) as advance:

            def observed(done: int, total: int, note: str = "", /) -> None:
                self._observer(name)
                advance(done, total, note)

            yield observed


_in_job: tuple[bool, Callable[[str], None]] | None = None


def in_job(speaks: bool, observer: Callable[[str], None]) -> None:
    """Makes `for_stderr` fit a job of several processes, of which one speaks; all call the observer."""
    global _in_job
    _in_job = speaks, observer


def for_stderr() -> Progress:
    """Bars on a terminal, lines elsewhere; nothing from the processes of a job that do not speak for it."""
    progress = Bars() if sys.stderr.isatty() else Lines()
    if _in_job is None:
        return progress
    speaks, observer = _in_job
    return Observed(progress if speaks else Silent(), observer)


def duration(seconds: float) -> str:
    """95 -> "1m35s"."""
    seconds = round(seconds)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
