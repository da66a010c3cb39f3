"""Runs the scripts of launch/ against programs that record their calls instead of renting machines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAKE = (ROOT / "tests" / "support" / "fake_cloud.py").read_text()
PROGRAMS = ("gcloud", "xpk", "kubectl", "sbatch", "srun", "scancel", "scontrol", "docker")
WORDS = {  # a word of a gcloud command -> what it does, first match
    "create": "create",
    "delete": "delete",
    "tpu-vm describe": "host",
    "describe": "state",
    "scp": "send",
    "uv pip install": "install",
    "nohup": "start",
    'tail --pid="$(cat run.pid)" -F': "follow",
    "run.exit ]": "ask",
    "kill -TERM": "end",
    "rsync": "copy",
}


class Cloud:
    """A small clone of the project, and first on PATH programs that play a scenario (fake_cloud.py)."""

    def __init__(self, folder: Path, **scenario: Any) -> None:
        self.clone, self.folder, programs = folder / "clone", folder / "cloud", folder / "programs"
        for new in (self.clone, self.folder, programs):
            new.mkdir()
        for program in PROGRAMS:
            (programs / program).write_text(f"#!{sys.executable} -IS\n{FAKE}")
            (programs / program).chmod(0o755)
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        (self.clone / "mine.yaml").write_text("name: mine\n")
        subprocess.run(["git", "init", "--quiet", self.clone], check=True)
        subprocess.run(["git", "-C", self.clone, "add", "--all"], check=True)
        (self.folder / "scenario.json").write_text(json.dumps(scenario))
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "FAKE_CLOUD": str(self.folder), "TMPDIR": str(folder)}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The script under way, in a process group of its own."""
        return subprocess.Popen(
            ["bash", f"launch/{script}", *arguments],
            cwd=self.clone,
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, answer: str = "", **environment: str) -> tuple[int, str]:
        """Exit code and output of the script; `answer` is what a person types."""
        process = self.start(script, *arguments, **environment)
        try:
            output, _ = process.communicate(answer, timeout=60)
        finally:
            _end(process)
        return process.returncode, output

    def interrupt(
        self, script: str, *arguments: str, by: signal.Signals, group: bool = False
    ) -> tuple[int, str]:
        """The same, with a signal while a call blocks: to the script alone, or as Ctrl-C to its group."""
        process = self.start(script, *arguments)
        try:
            deadline = time.monotonic() + 30
            while not (self.folder / "blocked").exists():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "the call that blocks was never made"
                time.sleep(0.02)
            (os.killpg if group else os.kill)(process.pid, by)
            output, _ = process.communicate(timeout=30)
        finally:
            _end(process)
        return process.returncode, output

    @property
    def calls(self) -> list[list[str]]:
        """Every call: the program, then its arguments."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def verbs(self) -> list[str]:
        """What the calls of gcloud do, in order; the same thing twice in a row counts once."""
        verbs: list[str] = []
        for call in self.calls:
            line = " ".join(call)
            verb = next(verb for words, verb in WORDS.items() if words in line)
            if verbs[-1:] != [verb]:
                verbs.append(verb)
        return verbs

    @property
    def left_behind(self) -> list[str]:
        """What was created and not deleted."""
        file = self.folder / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        return [kind for kind in ("slice", "workload") if state.get(kind)]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
