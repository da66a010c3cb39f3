"""What a hostile program can do to the one that runs it: nothing but fail, within its time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from middo_jax.evaluation.offline.execution import ProgramLimits, ProgramResult, run_program

QUICK = ProgramLimits(wall_s=0.7, cpu_s=1)
KILLED = "ended with status 137"


def test_a_good_program_passes_and_a_bad_one_says_why() -> None:
    assert run_program("assert sum(range(4)) == 6") == ProgramResult(True)
    assert run_program("assert sum(range(4)) == 7") == ProgramResult(False, "AssertionError")
    assert run_program("def f(:") == ProgramResult(False, "SyntaxError")
    assert run_program("import middo_jax.cli_") == ProgramResult(False, "ModuleNotFoundError")
    assert run_program("'\ud800'") == ProgramResult(False, "SyntaxError")


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), 9)"],
)
def test_ending_early_is_no_pass(code: str) -> None:
    assert not run_program(code + "\nassert False").passed


def test_an_endless_loop_is_ended_in_time() -> None:
    assert run_program("while True: pass", ProgramLimits(wall_s=120, cpu_s=1)).reason == KILLED
    began = time.monotonic()
    assert not run_program("import time; time.sleep(60)", QUICK).passed
    assert time.monotonic() - began < 30  # a busy machine is no failure


def test_memory_is_limited() -> None:
    assert run_program("x = bytearray(8 << 30)") == ProgramResult(False, "MemoryError")


def test_a_written_file_is_limited_and_gone() -> None:
    code = "with open('big', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))"
    assert run_program(code) == ProgramResult(False, "OSError")
    code = "import os; assert os.listdir() == ['program.py'], os.listdir()"
    assert run_program(code) == ProgramResult(True)


def test_any_amount_of_output_is_dropped() -> None:
    code = "import sys\nfor _ in range(10_000): sys.stdout.write('x' * (1 << 20))"
    began = time.monotonic()
    run_program(code, QUICK)
    assert time.monotonic() - began < 2
    flood = (
        "import os\n"
        "while True:\n"
        "    for fd in range(3, 10):\n"
        "        try: os.write(fd, b'x' * 65536)\n"
        "        except OSError: pass"
    )
    assert not run_program(flood, QUICK).passed


def test_a_fork_bomb_fails_and_leaves_nothing() -> None:
    mark = f"middo-bomb-{os.getpid()}"
    code = (
        "import os, sys, time\n"
        f"NAME = {mark!r}\n"
        "while True:\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)', NAME])\n"
    )
    began = time.monotonic()
    assert run_program(code, ProgramLimits(wall_s=20)) == ProgramResult(False, "BlockingIOError")
    assert time.monotonic() - began < 25  # and the children sleep longer
    time.sleep(0.2)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert mark not in left


def test_the_environment_is_empty_and_the_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDDO_SECRET", "key")
    code = (
        "import os, sys\n"
        "assert 'MIDDO_SECRET' not in os.environ\n"
        "assert not set(os.environ) - {'LC_CTYPE'}, os.environ\n"
        "assert os.getcwd() not in sys.path\n"
    )
    assert run_program(code) == ProgramResult(True)


def can_unshare() -> bool:
    code = (
        "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000 | 0x20000000 | 0x40000000) != 0)"
    )
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="this kernel allows no namespaces to this user")
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        accepted = threading.Event()
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        found = run_program(code)
        assert not found.passed
        assert found.reason in ("OSError", "ConnectionRefusedError")
        assert not accepted.is_set()


def test_a_program_cannot_read_the_token_from_its_input() -> None:
    code = "import sys, json\njson.loads(sys.stdin.readline())['token']"
    assert run_program(code).reason == "JSONDecodeError"


def test_many_programs_leave_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(3):
        run_program("open('a', 'w').write('b')")
    assert list(tmp_path.iterdir()) == []
