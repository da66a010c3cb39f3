"""How a program ends that the scheduler told to stop."""

from __future__ import annotations

from typing import NoReturn

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(SystemExit):
    """The scheduler takes the machine back; all is saved, and the same call continues from there.

    A `SystemExit`, so that a program that does nothing about it ends with EXIT_PREEMPTED.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def preempted(*_: object) -> NoReturn:
    """The handler of SIGTERM: ends whatever runs, since each stage leaves what it needs to be continued."""
    raise Preempted
