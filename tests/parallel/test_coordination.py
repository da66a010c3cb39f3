"""Laws of a job: one decides and all know; what happens to one ends all, with a message that names it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from middo_jax.parallel.preemption import EXIT_PREEMPTED

JOB = Path(__file__).parents[1] / "support" / "job.py"

pytestmark = pytest.mark.multiprocess


class Ended(NamedTuple):
    code: int
    output: str


def run_job(folder: Path, thing: str, processes: int, **environment: str) -> list[Ended]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(folder), thing, address, str(processes), str(process)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    print(*outputs, sep="\n---\n")  # shown where the test fails
    return [Ended(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_process_0_decides_and_all_know(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "decide", 3)
    assert [e.code for e in ended] == [0, 0, 0]
    assert "decided 3 3000000 asked" in ended[0].output
    assert all("decided 3 3000000 told" in e.output for e in ended[1:])
    # The same secret, which the job's store does not have any more.
    [secret] = {tuple(re.findall(r"^secret (64 \w+ \[.*\])$", e.output, re.MULTILINE)) for e in ended}
    assert secret[0].endswith(" []")


def test_process_0_leads_and_the_others_follow(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "led", 3)
    assert all(e.code == 0 and "did [0, 1, 2]" in e.output for e in ended)


def test_a_mismatch_names_processes_and_values(tmp_path: Path) -> None:
    for e in run_job(tmp_path, "differ", 2):
        assert e.code != 0
        assert "the processes differ in data: process 0 on " in e.output
        assert " has b, process 1 on " in e.output


def test_where_one_fails_all_end_and_say_why(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "fail", 3)
    assert [e.code for e in ended] == [1, 1, 1]  # another start would end alike
    assert all("process 1 ended: ValueError: a broken host" in ended[i].output for i in (0, 2))


@pytest.mark.parametrize("thing", ["vanish", "lost"])
def test_where_one_is_killed_all_end_to_be_started_again_and_name_it(tmp_path: Path, thing: str) -> None:
    ended = run_job(tmp_path, thing, 3)
    assert [e.code for e in ended] == [EXIT_PREEMPTED, -signal.SIGKILL, EXIT_PREEMPTED]
    # A process may die before its first heartbeat, which has its host.
    named = re.compile(r"process 1( on \S+)? has sent no heartbeat .* dead or cut off")
    assert all(named.search(ended[i].output) for i in (0, 2))


def test_one_that_is_alive_and_stuck_is_named(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "stall", 2, STALL="6")
    assert [e.code for e in ended] == [EXIT_PREEMPTED] * 2
    assert "nobody got further for " in ended[0].output
    assert "last is process 1 on " in ended[0].output


@pytest.mark.slow
def test_where_process_0_answers_nothing_the_others_end_and_say_so(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "frozen", 3)
    assert [e.code for e in ended] == [-signal.SIGKILL, EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert all(
        "process 0, which coordinates, cannot be reached: no answer for" in e.output for e in ended[1:]
    )


def test_a_sigterm_to_one_that_waits_ends_all_as_preempted(tmp_path: Path) -> None:
    assert [e.code for e in run_job(tmp_path, "preempted_alone", 3)] == [EXIT_PREEMPTED] * 3
