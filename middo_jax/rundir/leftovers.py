"""What killed processes leave behind: temporary files and folders, which name the process that made them.

A temporary is removed if its process has ended, or if it is of another machine and a day old. Whoever holds a
folder's lock may remove all that Orbax left there, and every temporary folder, such as half an export: only
the holder of the lock saves checkpoints and exports. So a machine that was started again sweeps at once.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from middo_jax.rundir.elsewhere import size_elsewhere
from middo_jax.rundir.files import is_reader
from middo_jax.rundir.process import has_ended

_TEMPORARY = re.compile(r"\..+\.tmp-(\d+-[0-9a-f]{8}-[0-9a-f]{8})-\w+")
_ORBAX = "orbax-checkpoint-tmp"
_FRESH_S = 24 * 3600.0


def remove_leftovers(root: Path, say: Callable[[str], None]) -> None:
    """Removes what killed processes left in the folder of a run or command, whose lock the caller holds."""
    if is_reader():
        return
    for path in leftovers(root):
        size = size_of(path)
        remove(path)
        say(f"{path}: removed, {shown_size(size)} that a killed process left there")


def leftovers(root: Path) -> Iterator[Path]:
    """Temporary files and folders of ended processes in a folder, its rounds and their checkpoints."""
    for folder in _folders(root):
        for path in _entries(folder):
            if is_leftover(path) or _ORBAX in path.name or _is_of_another(path):
                yield path


def remove_leftovers_beside(path: Path) -> None:
    """Removes temporaries, of whatever name, that ended processes left in the folder of `path`."""
    if is_reader():
        return
    for entry in _entries(path.parent):
        if is_leftover(entry):
            remove(entry)


def is_leftover(path: Path) -> bool:
    """Whether a path is a temporary of a process that has ended, or an old one of another machine."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    ended = has_ended(match[1])
    if ended is not None:
        return ended
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.lstat().st_mtime > _FRESH_S
    return False


def _is_of_another(path: Path) -> bool:
    """Whether a path is a temporary folder of another machine, or of this one before its last start."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and path.is_dir() and has_ended(match[1]) is None


def remove(path: Path) -> None:
    """Removes a file or a folder; one that is gone is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, with those that are left in its bucket."""
    files = [path] if not path.is_dir() or path.is_symlink() else [p for p in path.rglob("*") if p.is_file()]
    total = size_elsewhere(path)
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def shown_size(size: float) -> str:
    """Such as `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _folders(root: Path) -> Iterator[Path]:
    rounds = [path for path in _entries(root) if re.fullmatch(r"round_\d{2,}|final", path.name)]
    arms = [path for path in _entries(root / "controls") if path.is_dir()]
    seeds = [path for arm in arms for path in _entries(arm) if path.is_dir()]
    for folder in (root, *rounds, *arms, *seeds):
        yield from (
            folder,
            folder / "checkpoint",
            folder / "checkpoint" / "best",
            folder / "checkpoint" / "steps",
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # there is none, or it is a file, or it is not ours to read
        return []
