"""launch/vllm.sh with a small HTTP server in place of vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launching import ROOT

SERVER = """
import http.server, os, sys, time

arguments = sys.argv[1:]
with open(os.environ["STARTS"], "a") as starts:
    starts.write(" ".join([*arguments, os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
                           os.environ.get("VLLM_API_KEY", "no key"), str(os.getpid())]) + "\\n")
if os.environ.get("BROKEN"):
    sys.exit(1)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" and not os.environ.get("SICK") else 503)
        self.end_headers()

    def log_message(self, *words):
        pass

http.server.HTTPServer.allow_reuse_address = True
http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


class Server:
    """launch/vllm.sh under way, and the starts of the server that it made."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        program = folder / "environment" / "bin" / "vllm"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!{sys.executable} -IS{SERVER}")
        program.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.file = folder / "starts"
        clean = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        place = ["--environment", str(folder / "environment"), "--port", str(self.port), "--poll", "0.1"]
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "vllm.sh"), *place, *arguments],
            env=clean | {"STARTS": str(self.file)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def starts(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    def wait_for(self, words: str) -> str:
        """Reads output up to the line that has these words."""
        assert self.process.stdout is not None
        seen = ""
        while words not in seen:
            line = self.process.stdout.readline()
            assert line, seen
            seen += line
        return seen

    def end(self, by: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        os.kill(self.process.pid, by)
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(start: str) -> int:
    return int(start.split()[-1])


def test_it_serves_says_where_and_ends_with_its_server(tmp_path: Path, servers: list[Server]) -> None:
    arguments = ["--model", "a/model", "--gpus", "6,7", "--", "--max-model-len", "4096"]
    server = Server(tmp_path, *arguments, OPENAI_API_KEY="very-secret")
    servers.append(server)
    output = server.wait_for(f"refine.base_url=http://127.0.0.1:{server.port}/v1 refine.model=a/model")
    assert "very-secret" not in output
    [start] = server.starts
    options = f"--host 127.0.0.1 --port {server.port} --tensor-parallel-size 2 --max-model-len 4096"
    assert start.startswith(f"serve a/model --served-model-name a/model {options} 6,7 very-secret ")
    code, _ = server.end()
    assert code == 0
    assert not is_alive(pid_of(start))


def test_a_server_that_dies_is_started_again(tmp_path: Path, servers: list[Server]) -> None:
    server = Server(tmp_path, "--model", "m")
    servers.append(server)
    server.wait_for("refine.model=m")
    os.kill(pid_of(server.starts[0]), signal.SIGKILL)
    server.wait_for("healthy")
    assert len(server.starts) == 2


def test_a_new_export_is_served_and_an_unfinished_one_is_not(tmp_path: Path, servers: list[Server]) -> None:
    exports = tmp_path / "runs"
    first, second = exports / "one" / "huggingface", exports / "two" / ".huggingface.tmp"
    server = Server(tmp_path, "--watch", str(exports))
    servers.append(server)
    server.wait_for("waiting for an export")
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    server.wait_for("refine.model=refiner")
    time.sleep(0.5)
    assert len(server.starts) == 1
    assert f"serve {first} --served-model-name refiner" in server.starts[0]
    second.rename(exports / "two" / "huggingface")
    server.wait_for("healthy")
    assert f"serve {exports / 'two' / 'huggingface'} " in server.starts[1]
    assert not is_alive(pid_of(server.starts[0]))


def test_a_server_that_never_starts_is_given_up(tmp_path: Path, servers: list[Server]) -> None:
    server = Server(tmp_path, "--model", "m", "--max-restarts", "2", BROKEN="1")
    servers.append(server)
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert len(server.starts) == 3
    assert "started again 2 times already: giving up" in output


def test_a_server_that_stays_sick_is_ended_at_the_timeout(tmp_path: Path, servers: list[Server]) -> None:
    server = Server(tmp_path, "--model", "m", "--timeout", "5", "--max-restarts", "0", SICK="1")
    servers.append(server)
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert "not healthy after 5 s" in output
    assert not is_alive(pid_of(server.starts[0]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "m", "--host", "0.0.0.0"], "set VLLM_API_KEY"),
        (["--model", "m", "--", "--api-key=x"], "keys are given by the environment variable"),
        (["--model", "m", "--watch", "f"], "exclude each other"),
        ([], "--model or --watch is missing"),
        (["--model", "m", "--gpus", "six"], "numbers with commas"),
    ],
)
def test_a_wrong_command_line_starts_nothing(
    tmp_path: Path, servers: list[Server], arguments: list[str], says: str
) -> None:
    server = Server(tmp_path, *arguments)
    servers.append(server)
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 2
    assert says in output
    assert server.starts == []


def test_a_dry_run_shows_the_installation_and_the_server(tmp_path: Path) -> None:
    command = [
        "bash",
        str(ROOT / "launch" / "vllm.sh"),
        "--dry-run",
        "--model",
        "m",
        "--device",
        "tpu",
        "--chips",
        "4",
    ]
    shown = subprocess.run(
        [*command, "--environment", str(tmp_path / "new")], capture_output=True, text=True, check=True
    )
    assert "pip install --quiet vllm-tpu" in shown.stdout
    assert "--tensor-parallel-size 4" in shown.stdout
    assert not (tmp_path / "new").exists()
