"""Replaces gcloud, xpk, kubectl, sbatch, srun, scancel, scontrol and docker on PATH.

Each call is recorded. What it answers is played from a scenario, and what it creates is kept, so that a test
can assert that everything was deleted again. The folder `$FAKE_CLOUD` has three files:

  scenario.json   `slices`: per created slice, the states that it is seen in, the last one staying
                  `runs`: per start, the events that happen while its log is followed, and its exit code
                  `refuse`: words of a call -> how often it fails, with which exit code and message
                  `block`: words of a call that does not return before it is ended
  calls.jsonl     program and arguments of every call, in order
  state.json      the resources that exist
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["FAKE_CLOUD"])


def main(program: str, arguments: list[str]) -> int:
    """Records the call and plays its part of the scenario; returns the exit code."""
    line = " ".join([program, *arguments])
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (FOLDER / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps([program, *arguments]) + "\n")
        scenario = json.loads((FOLDER / "scenario.json").read_text())
        file = FOLDER / "state.json"
        state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        for words, refusal in scenario.get("refuse", {}).items():
            played = state.setdefault("refused", {})
            if words in line and played.get(words, 0) < refusal["times"]:
                played[words] = played.get(words, 0) + 1
                file.write_text(json.dumps(state))
                print(refusal["message"], file=sys.stderr)
                return refusal["code"]
        play = {"gcloud": gcloud, "xpk": xpk}.get(program)
        code = play(line, state, scenario) if play else scenario.get("codes", {}).get(program, 0)
        file.write_text(json.dumps(state))
    if any(words in line for words in scenario.get("block", [])):
        (FOLDER / "blocked").touch()
        time.sleep(60)
    return code


def gcloud(line: str, state: dict[str, Any], scenario: dict[str, Any]) -> int:
    """Queued resources and their hosts; objects in buckets are not kept."""
    alive = state.get("slice")
    if "queued-resources create" in line:
        if alive:
            return _error("ALREADY_EXISTS: Resource exists")
        number = state["created"] = state.get("created", 0) + 1
        state["slice"] = list(scenario["slices"][number - 1])
    elif "queued-resources delete" in line:
        if not alive:
            return _error("NOT_FOUND: Resource was not found")
        state["slice"] = None
    elif "describe" in line:
        if not alive:
            return _error("NOT_FOUND: Resource was not found")
        seen = alive.pop(0) if len(alive) > 1 and "queued-resources" in line else alive[0]
        if "failedData" in line:
            print("There is no more capacity in the zone")
        elif "queued-resources" in line:
            print(seen)
        else:
            print("READY" if seen == "ACTIVE" else "PREEMPTED")
    elif "tpu-vm" in line:
        return _on_hosts(line, state, scenario)
    return 0


def _on_hosts(line: str, state: dict[str, Any], scenario: dict[str, Any]) -> int:
    if not state.get("slice") or state["slice"][0] != "ACTIVE":
        return _error("This TPU is not in a usable state")
    if " scp " in line:
        # The script deletes its archive, so a copy is kept for the test.
        shutil.copy(next(word for word in line.split() if word.endswith(".tar.gz")), FOLDER / "sent.tar.gz")
    elif "nohup" in line:
        number = state["started"] = state.get("started", 0) + 1
        state["run"] = dict(scenario["runs"][number - 1])
    elif "tail" in line and "-F" in line:
        run = state["run"]
        print(f"log of start {state['started']}")
        event = run["events"].pop(0) if run.get("events") else ""
        if event == "preempted":
            state["slice"] = ["SUSPENDED"]
        if event:
            return 255
        run["ended"] = True
    elif "run.exit ]" in line:
        run = state["run"]
        print(run.get("exit", 0) if run.get("ended") else "running")
    return 0


def xpk(line: str, state: dict[str, Any], scenario: dict[str, Any]) -> int:
    """Workloads; waiting for one gives the exit code of the scenario."""
    if "workload create" in line:
        file = line.split("--env-file=")[1].split()[0]
        shutil.copy(file, FOLDER / "environment")  # the script deletes it
        state["workload"] = True
    elif "workload delete" in line:
        state["workload"] = False
    elif "--wait-for-job-completion" in line:
        return scenario.get("wait", 0)
    return 0


def _error(message: str) -> int:
    print(f"ERROR: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
