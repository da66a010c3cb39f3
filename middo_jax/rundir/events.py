"""events.jsonl: a log to which processes append, and which therefore may be torn.

A process that is killed leaves half a line, a power cut leaves a block of NUL bytes. Such lines are skipped
and counted; no command fails because of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.rundir.files import full_disk_named, json_line
from middo_jax.rundir.manifest import RunError
from middo_jax.rundir.schemas import newer


class Events(NamedTuple):
    """The events of a run in order, and how many lines could not be read."""

    rows: list[dict[str, Any]]
    n_unreadable: int


def read_events(path: Path) -> Events:
    """Reads events.jsonl; a missing file is an empty log.

    A line that is no JSON object, or no UTF-8, is counted and skipped. NUL bytes around an object are
    ignored, and so is white space.

    Raises:
      RunError: a newer version wrote the last two lines.
    """
    rows, n_unreadable = list[dict[str, Any]](), 0
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Events([], 0)
    except OSError:  # a folder, or a file without permission to read: the log is lost, the run is not
        return Events([], 1)
    for line in lines:
        text = line.strip(b"\0 \t\r\v\f")
        if not line.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            n_unreadable += 1
    # A newer program would have written several lines at the end. A single newer number may be a flipped bit,
    # which is no reason to stop.
    found = [row.get("version", 0) for row in rows[-2:]]
    version = min((number for number in found if isinstance(number, int)), default=0) if len(rows) > 1 else 0
    if (reason := newer(path.name, version, path)) is not None:
        raise RunError(reason)
    return Events(rows, n_unreadable)


def append_event(path: Path, row: dict[str, Any]) -> None:
    """Appends one line. It begins on a line of its own, also behind one that was cut short."""
    with full_disk_named(path), path.open("a+b") as file:
        end = file.seek(0, 2)
        if end > 0:
            file.seek(end - 1)
            is_torn = file.read(1) != b"\n"
            file.write(b"\n" if is_torn else b"")
        file.write(json_line(row).encode())
