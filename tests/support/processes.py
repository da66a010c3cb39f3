"""Processes of a test that share a mesh."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

TIMEOUT_S = 300


def run_together(processes: int, arguments: Callable[[int], Sequence[object]], code: int = 0) -> None:
    """Runs Python so many times at once; all of them have to end with the exit code.

    Args:
      processes: how many. One is a program of its own, with the same arguments.
      arguments: process -> what stands before its address, the number of processes, and its own number.
      code: the exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    try:
        for process in range(processes):
            command = [sys.executable, *map(str, arguments(process)), address, str(processes), str(process)]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            pipe, out = subprocess.PIPE, subprocess.STDOUT
            started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=out))
        for process in started:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == code, output.decode(errors="replace")[-4000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
