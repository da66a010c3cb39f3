"""What the name of a file in a run means for its copy: whether it is copied, when, and what it declares.

Names are relative to the run, with / between folders.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

LOCK = "middo.lock"
# Marks of complete files, from the innermost outwards: those of data, and last the manifests.
_MARKS = ("_CHECKPOINT_METADATA", "metadata.json", "manifest.json")
_NOT_COPIED = re.compile(
    r"\..+\.tmp-.+|.*orbax-checkpoint-tmp.*|\..+\.bucket-\d+|\.joining-.*|\.shared-.*|middo\.lock.*|"
    r".*\.sqlite-(wal|shm|journal)"
)
_STEP = re.compile(r"(.*/steps/\d+)/.*")
_PIECE = re.compile(r"\d+(\.\d+)*|process_\d+")  # a chunk of an array, or what a process says of its own


def is_copied(name: str) -> bool:
    """Whether a file or folder is copied: locks, logs of databases and temporary files are not."""
    return not any(_NOT_COPIED.fullmatch(part) for part in name.split("/"))


def is_light(name: str) -> bool:
    """Whether a file is none of the weights of a checkpoint or of an export."""
    path = f"/{name}"
    if "/checkpoint/" in path:
        return path.endswith("/checkpoint/metadata.json")
    return "/huggingface/" not in path or not name.endswith(".safetensors")


def is_piece(name: str) -> bool:
    """Whether a file of a checkpoint is written by one process of several, each of which has others."""
    last = name.rpartition("/")[2]
    return "/checkpoint/" in f"/{name}" and _PIECE.fullmatch(last) is not None


def is_below(name: str, folder: str) -> bool:
    """Whether a file is the given one, or below the given folder; `.` is the run."""
    return folder in (".", name) or name.startswith(f"{folder}/")


def is_pattern(name: str) -> bool:
    """Whether a name stands for several, as `glob` reads it."""
    return any(character in name for character in "*?[")


def fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names of a path match a pattern as `glob` reads it, ** being any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(fits(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and fits(names[1:], pattern[1:])


def order(name: str) -> tuple[int, str]:
    """Key that sorts files before marks, and marks of data before manifests."""
    last = name.rpartition("/")[2]
    return (_MARKS.index(last) + 1 if last in _MARKS else 0), name


def is_mark_of_data(name: str) -> bool:
    """Whether a file declares a checkpoint or a saved step complete."""
    return order(name)[0] in (1, 2)


def mark_of(name: str) -> str | None:
    """The file that declares the checkpoint or the export complete to which a file belongs."""
    for folder, mark in (("checkpoint", "metadata.json"), ("huggingface", "config.json")):
        before, found, _ = f"/{name}".partition(f"/{folder}/")
        if found:
            return f"{before}/{folder}/{mark}"[1:]
    return None


def half_steps(names: Iterable[str]) -> set[str]:
    """Those of saved steps of which a push was interrupted: the step has no mark."""
    of_steps = {name: match[1] for name in names if (match := _STEP.fullmatch(name))}
    whole = {step for name, step in of_steps.items() if name == f"{step}/_CHECKPOINT_METADATA"}
    return {name for name, step in of_steps.items() if step not in whole}
