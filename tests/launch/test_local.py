"""launch/local.sh with real processes, in place of the whole loop a small program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import ROOT

PROGRAM = """
import os, signal, sys, time

process, mode = int(sys.argv[sys.argv.index("--process") + 1]), sys.argv[sys.argv.index("run") + 1]

def save(number, frame):
    print("saved", flush=True)
    sys.exit(75)

if mode != "deaf":
    signal.signal(signal.SIGTERM, save)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(" ".join(sys.argv[1:]), flush=True)
print(os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"], file=sys.stderr, flush=True)
open(f"{os.environ['READY']}.{process}", "w").close()
if mode == "end":
    sys.exit(0)
if mode == "fail" and process == 1:
    sys.exit(3)
time.sleep(60)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    program = folder / "middo"
    program.write_text(f"#!{sys.executable} -IS{PROGRAM}")
    program.chmod(0o755)
    environment = os.environ | {"MIDDO": str(program), "READY": str(folder / "ready")}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "local.sh"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(files: list[Path]) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.02)


def end(process: subprocess.Popen[str], timeout: float = 40) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_processes_find_each_other_and_their_lines_have_their_numbers(tmp_path: Path) -> None:
    process = start(tmp_path, "--processes", "3", "--devices", "2", "--port", "4711", "end", "rounds=2")
    output = end(process)
    assert process.returncode == 0, output
    lines = output.splitlines()
    for number in range(3):
        given = f"--coordinator 127.0.0.1:4711 --processes 3 --process {number}"
        assert f"[{number}] {given} run end rounds=2" in lines
        assert f"[{number}] cpu 2" in lines
    assert len(lines) == 6


def test_one_process_that_fails_ends_the_others_and_gives_the_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path, "--processes", "3", "fail")
    output = end(process)
    assert process.returncode == 3, output
    assert "a process ended with 3: ending the others" in output


@pytest.mark.parametrize(("by", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_reaches_all_and_they_save(tmp_path: Path, by: signal.Signals, group: bool) -> None:
    process = start(tmp_path, "--processes", "2", "wait")
    wait_for([tmp_path / f"ready.{number}" for number in range(2)])
    (os.killpg if group else os.kill)(process.pid, by)
    output = end(process)
    assert process.returncode == 75, output
    assert {"[0] saved", "[1] saved"} <= set(output.splitlines())


def test_who_does_not_end_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "--processes", "2", "--grace", "1", "deaf")
    wait_for([tmp_path / f"ready.{number}" for number in range(2)])
    os.kill(process.pid, signal.SIGTERM)
    output = end(process)
    assert process.returncode == 137, output
    assert "not ended after 1 s: killed" in output


def test_one_process_is_the_program_itself(tmp_path: Path) -> None:
    """On the machine's own devices, and a signal reaches it without a shell between."""
    program = tmp_path / "middo"
    program.write_text('#!/bin/bash\necho $$ "$@" "${JAX_NUM_CPU_DEVICES:-own}"\nexit 7\n')
    program.chmod(0o755)
    command = ["bash", str(ROOT / "launch" / "local.sh"), "mine.yaml"]
    process = subprocess.Popen(
        command, env=os.environ | {"MIDDO": str(program)}, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 7
    assert output.split() == [str(process.pid), "run", "mine.yaml", "own"]


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "--dry-run", "--processes", "2", "--port", "1", "end")
    output = end(process)
    assert process.returncode == 0
    assert len(output.splitlines()) == 2
    assert not list(tmp_path.glob("ready*"))
