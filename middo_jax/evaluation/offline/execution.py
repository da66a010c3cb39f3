"""Runs a program that a model wrote, in a process of its own with limits. This is not a sandbox.

The process has no environment, an empty folder, and limits on time, memory, the size of a file, open files
and processes. Where the kernel allows it to a user, it has no network and its own process numbers, so that
all that it started ends with it. It can still read what its user can read, and write where its user can
write. Code that must not do that belongs on a machine that has nothing to lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from middo_jax.evaluation.offline import limited

_REPORT_BYTES = 1024  # of the report; a longer one is not ours


@dataclasses.dataclass(frozen=True)
class ProgramLimits:
    """What a program may use.

    Attributes:
      wall_s: seconds until it is ended.
      cpu_s: seconds of computing per process.
      memory_bytes: addresses per process.
      file_bytes: of each file that it writes.
      open_files: per process.
      processes: at one time, threads included.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 32


@dataclasses.dataclass(frozen=True)
class ProgramResult:
    """How a program ended: `passed` if it came to its end without an exception, else `reason` says why."""

    passed: bool
    reason: str | None = None


def run_program(code: str, limits: ProgramLimits = ProgramLimits()) -> ProgramResult:
    """Runs Python code to its end, or to a limit.

    The code cannot pass by ending early, with `sys.exit(0)` or `os._exit(0)`: a token is reported only after
    its last line. Code that searches its own process for the token can.
    """
    token = secrets.token_hex(16)
    wanted = dataclasses.asdict(limits) | {"token": token}
    with tempfile.TemporaryDirectory(prefix="middo-code-", ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.py"
        try:
            program.write_text(code, encoding="utf-8")
        except UnicodeEncodeError:
            return ProgramResult(False, "SyntaxError")
        command = [sys.executable, "-I", limited.__file__, str(program)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,  # a group of its own, which is ended as a whole
        )
        try:
            report = _report(process, (json.dumps(wanted) + "\n").encode(), limits.wall_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    if report is None:
        return ProgramResult(False, f"over {limits.wall_s:g} s")
    if report.get("token") == token:
        return ProgramResult(True)
    return ProgramResult(False, str(report.get("error") or f"ended with status {process.returncode}"))


def _report(process: subprocess.Popen[bytes], wanted: bytes, wall_s: float) -> dict[str, object] | None:
    """The line that the process wrote, {} if it wrote none that is ours; None if it took too long.

    No more is read than a report can have: the program could write to the pipe without end.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + wall_s
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(wanted)
        process.stdin.close()
    written = b""
    while b"\n" not in written and len(written) < _REPORT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return None
        part = os.read(process.stdout.fileno(), _REPORT_BYTES)
        if not part:
            break
        written += part
    try:
        found = json.loads(written)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
