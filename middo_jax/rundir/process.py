"""Facts of the system about processes: when one started, and in which namespace its number counts."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path


def mark(pid: int | None = None) -> str:
    """A short name of a process, for names of files: `PID-START-PLACE`, of its number, start and machine.

    The number alone is not enough: after its process has ended, another one may get it, here or elsewhere.
    """
    pid = os.getpid() if pid is None else pid
    return f"{pid}-{_short(started(pid) or '')}-{place()}"


def has_ended(marked: str) -> bool | None:
    """Whether a mark's process has ended; None if its machine is another one, or was started again since."""
    pid, start, where = marked.split("-")
    if where != place():
        return None
    now = started(int(pid))
    return now is None or _short(now) != start


@functools.cache
def place() -> str:
    """8 hex digits that name this machine, its present start and the namespace of process numbers."""
    return _short(f"{socket.gethostname()} {first_line('/proc/sys/kernel/random/boot_id')} {namespace()}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def started(pid: int) -> str | None:
    """When a process started, in the system's format; None if it has ended."""
    if sys.platform == "linux":
        try:
            # The name of the program, in parentheses, may hold anything; state and start time are behind it.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    told = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C"},
    )
    return told.stdout.strip() or None


def namespace() -> str:
    """The namespace of process numbers; "" where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def first_line(path: str) -> str:
    """The first line of a file of the system; "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
