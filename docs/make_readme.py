"""Writes the parts of README.md that come from a run of the quickstart, and docs/report.png.

    /usr/bin/time -v make quickstart > quickstart.log 2>&1      # in a clone without runs/quickstart
    python docs/make_readme.py --record runs/quickstart quickstart.log
    python docs/make_readme.py                                  # README.md from docs/quickstart.json alone

The record, docs/quickstart.json, has everything that README.md says of that run. The parts that are filled in
are marked in README.md: `<!-- quickstart: NAME -->` to `<!-- end -->`. The picture needs chromium.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import yaml

from middo_jax.config import replayed_file
from middo_jax.progress import duration
from middo_jax.report.build import build
from middo_jax.report.status import status
from middo_jax.rundir import RunDir, file_hash, write_json, write_text

ROOT = Path(__file__).parent.parent
RECORD, PICTURE, README = ROOT / "docs/quickstart.json", ROOT / "docs/report.png", ROOT / "README.md"
CONFIG = ROOT / "configs/quickstart.yaml"
PICTURE_SIZE = (1280, 1500)
LINE = 120  # characters of the transcript's lines; longer ones are wrapped
COMMAND = "middo run configs/quickstart.yaml"
_PART = re.compile(r"(<!-- quickstart: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
_PROGRESS = re.compile(r"  .+: (\d+)/(\d+) \w+ in ")


def record(run: RunDir, log: str, note: str = "") -> dict[str, Any]:
    """What README.md says of a finished run of the quickstart.

    Args:
      run: its folder.
      log: the output of `/usr/bin/time -v make quickstart`, stdout and stderr together.
      note: what else must be known about the machine, such as that it was shared.

    Raises:
      ValueError: the run is not complete, or the log is not that of one run from its start to its end.
    """
    facts = status(run)
    if not facts["complete"]:
        raise ValueError(f"{run.path}: the run is not complete; next: {facts['next']}")
    if any(effect is None or effect["interval"] is None for effect in facts["effects"].values()):
        raise ValueError(f"{run.path}: an effect on the held-out loss has no interval: {facts['effects']}")
    first = facts["rounds"][0]
    return {
        "device": _device(),
        "note": note,
        "installs": "installing middo-jax" in log,
        "versions": {"python": platform.python_version(), "jax": importlib.metadata.version("jax")},
        "inputs": inputs(),
        "transcript": transcript(log),
        "loop": _found(r"^done in (.+)$", log),
        "seconds": _seconds(_found(r"Elapsed \(wall clock\) time .*: ([\d:.]+)$", log)),
        "cpu_seconds": sum(
            float(_found(rf"{of} time \(seconds\): ([\d.]+)$", log)) for of in ("User", "System")
        ),
        "peak_gb": round(int(_found(r"Maximum resident set size \(kbytes\): (\d+)$", log)) * 1024 / 1e9, 1),
        "rows": {"in": first["rows"], "out": facts["final"]["rows"], "held_out": facts["n_heldout"]},
        "rewrites": {"accepted": first["accepted"], "tried": first["accepted"] + first["rejected"]},
        "recorded": run.round(0).stages()["refine"].get("recorded"),
        "effects": facts["effects"],
    }


def inputs() -> dict[str, str]:
    """Hashes of what the quickstart reads: settings without comments, data and recorded answers."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    answers = replayed_file(settings["refine"]["base_url"])
    if answers is None:
        raise ValueError(f"{CONFIG}: refine.base_url names no recorded answers")
    return {
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "data": file_hash(ROOT / settings["data"]["path"]),
        "answers": file_hash(ROOT / answers),
    }


def transcript(log: str) -> list[str]:
    """The lines that `middo run` printed, without those of work in progress.

    Raises:
      ValueError: the log does not hold exactly one run, or one that did not begin at its first stage.
    """
    parts = log.split(f"{COMMAND}\n")
    if len(parts) != 2 or "done before" in log:
        raise ValueError(f"the log must hold one `{COMMAND}` that starts without runs/quickstart")
    lines = []
    for line in parts[1].splitlines():
        counts = _PROGRESS.match(line)
        if counts is None or counts[1] == counts[2]:
            lines.append(line)
        if line.endswith("report.html"):
            return lines
    raise ValueError("the log has no line with the report's path: the run did not end well")


def picture(report: Path, to: Path) -> None:
    """The top of the report as it looks on a screen."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        size = f"--window-size={PICTURE_SIZE[0]},{PICTURE_SIZE[1]}"
        command = ["chromium", *options, size, f"--screenshot={to}", report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def fill(readme: str, facts: dict[str, Any]) -> str:
    """README.md's text with every part made from the record."""
    parts = {"transcript": _transcript(facts), "measured": _measured(facts)}
    return _PART.sub(lambda found: f"{found[1]}{parts[found[2]]}{found[3]}", readme)


def _transcript(facts: dict[str, Any]) -> str:
    return "\n".join(["```", *(short for line in facts["transcript"] for short in _wrapped(line)), "```"])


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _measured(facts: dict[str, Any]) -> str:
    versions, rows, rewrites, effects = (facts[key] for key in ("versions", "rows", "rewrites", "effects"))
    note = f" ({facts['note']})" if facts["note"] else ""
    verdict = effects["rounds"]["verdict"]
    shows = "no effect of the round" if verdict == "no effect shown" else f"a final model that is {verdict}"
    sentences = (
        f"This run took {duration(facts['seconds'])},",
        f"{'with' if facts['installs'] else 'after'} installation",
        f"({facts['loop']} of it for the loop),",
        f"{duration(facts['cpu_seconds'])} of CPU time,",
        f"and at most {facts['peak_gb']} GB of memory on {facts['device']}{note},",
        f"with Python {versions['python']} and jax {versions['jax']}.",
        f"{rewrites['accepted']} of {rewrites['tried']} rewrites",
        f"{'was' if rewrites['accepted'] == 1 else 'were'} accepted.",
        f"The dataset has {rows['in']} rows before the round and {rows['out']} after it.",
        *_effect("Fine-tuning", effects["fine_tuning"]),
        *_effect("The round", effects["rounds"]),
        f"So this run shows {shows}.",
        "The quickstart demonstrates the program, not the method:",
        "116 rows and a model of 135M parameters are too small for that.",
        *_refiner(facts["recorded"]),
        "For real use, set `refine.base_url` to the endpoint of a capable model.",
    )
    return textwrap.fill(" ".join(sentences), LINE, break_long_words=False, break_on_hyphens=False)


def _refiner(recorded: dict[str, Any] | None) -> tuple[str, ...]:
    """Whose answers the rewrites are."""
    if recorded is None:
        return ("Here the base model is its own refiner.",)
    n, misses = recorded["answers"], recorded["misses"]
    others = f"; the other {misses} are the base model's own" if misses else ""
    return (f"Of the refiner's {n} answers, {n - misses} are recorded ones of {recorded['model']}{others}.",)


def _effect(what: str, effect: dict[str, Any]) -> tuple[str, ...]:
    low, high = effect["interval"]
    return (
        f"{what} changed the held-out loss by {effect['change']:+.4f} nats per token",
        f"(from {effect['loss_before']:.4f} to {effect['loss_after']:.4f}), with a 95 % interval",
        f"from {low:+.4f} to {high:+.4f} over {effect['n_rows']} rows.",
    )


def _found(pattern: str, log: str) -> str:
    found = re.findall(pattern, log, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"the log must have one line like {pattern}, and has {len(found)}")
    return found[0]


def _seconds(clock: str) -> float:
    """'10:58.78' or '1:02:03' in seconds."""
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _device() -> str:
    names = re.findall(
        r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of an {names[0].strip()}, {memory:.0f} GB of memory"


def main() -> None:
    """Reads the command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--record", nargs=2, type=Path, metavar=("RUN", "LOG"), help="a finished run and its log"
    )
    parser.add_argument("--note", default="", help="what else to say of the machine")
    given = parser.parse_args()
    if given.record:
        run = RunDir(given.record[0])
        facts = record(run, given.record[1].read_text(encoding="utf-8"), given.note)
        picture(build(run), PICTURE)
        write_json(RECORD, facts | {"picture": hashlib.sha256(PICTURE.read_bytes()).hexdigest()})
    facts = json.loads(RECORD.read_text(encoding="utf-8"))
    write_text(README, fill(README.read_text(encoding="utf-8"), facts))
    print(README, file=sys.stderr)


if __name__ == "__main__":
    main()
