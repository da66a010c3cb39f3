"""How a preempted program ends."""

from __future__ import annotations

from typing import NoReturn

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(SystemExit):
    """The scheduler takes the machine back. Everything is saved, and the same call resumes from there.

    A `SystemExit`, so a program that does not catch it ends with EXIT_PREEMPTED.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def preempted(*_: object) -> NoReturn:
    """Handler of SIGTERM: ends whatever runs, since each stage saves what it needs to resume."""
    raise Preempted
