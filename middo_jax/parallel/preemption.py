"""How a preempted program ends."""

from __future__ import annotations

import threading
from typing import NoReturn

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(SystemExit):
    """The scheduler takes the machine back. Everything is saved, and the same call resumes from there.

    A `SystemExit`, so a program that does not catch it ends with EXIT_PREEMPTED.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


_asked = threading.Event()


def preempted(*_: object) -> NoReturn:
    """Handler of SIGTERM: ends whatever runs, since each stage saves what it needs to resume.

    Python drops what is raised within some calls, such as a callback of the garbage collector. Then
    `end_if_asked` ends the program at the next stop point.
    """
    _asked.set()
    raise Preempted


def end_if_asked() -> None:
    """Raises `Preempted` if a SIGTERM has come that has not ended the program."""
    if _asked.is_set():
        raise Preempted
