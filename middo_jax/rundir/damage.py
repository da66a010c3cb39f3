"""Files of a run that cannot be used, and where they go: `damaged-TIME/` in the run's folder.

A stage whose files were edited or lost is stale, and the chain redoes it. This module finds the files that
stop a run: a folder in the place of a file or the reverse, a file that cannot be read, a damaged manifest, a
checkpoint without its metadata, and damaged files that no stage makes: a plan, people's verdicts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from middo_jax.rundir.elsewhere import bring
from middo_jax.rundir.files import DamagedFile, each_jsonl
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.link import Link
from middo_jax.rundir.manifest import Manifest, RunError
from middo_jax.rundir.plans import plan_fault
from middo_jax.rundir.rows import VerdictRow
from middo_jax.rundir.schemas import faults_of

FOLDERS = frozenset(("checkpoint", "huggingface"))  # what stages write as folders; all else are files
ASIDE, ROLLED_BACK = "damaged-", "rolled-back-"  # how the folders of what was put aside begin


class Damage(NamedTuple):
    """A file or folder that cannot be used, and why: `is a folder, not a file`."""

    path: Path
    why: str


def damages(run: RunDir, links: Sequence[Link]) -> Iterator[Damage]:
    """The files and folders of a run that cannot be used, in the order of the stages."""
    folders = list(dict.fromkeys(link.folder.path for link in links))
    of_run = (run.config, run.events, run.llm_cache, run.report, run.plan, run.controls)
    of_people = (RoundDir(folder).verdicts for folder in folders)
    for path in (*of_run, *(RoundDir(folder).manifest for folder in folders), *of_people):
        yield from _of(path)
    for above in dict.fromkeys(path for folder in folders for path in _between(run, folder)):
        if os.path.lexists(above) and not above.is_dir():
            yield Damage(above, "is not a folder")
    for link in links:
        for path in (*link.writes, *link.may_write):
            yield from _of(path)
    for folder in folders:
        yield from _of_contents(RoundDir(folder))
    if run.plan.is_file() and (why := plan_fault(run.plan)) is not None:
        yield Damage(run.plan, f"is not a plan ({why}; `middo plan CONFIG --save` writes it again)")


def refuse_damaged(found: Sequence[Damage]) -> None:
    """Raises RunError with the first damage, and how to go on."""
    if found:
        path, why = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(
            f"{path} {why}{more}: mend it, or let `middo run CONFIG --repair` put it aside and do again what "
            "is missing then; answers that were paid for are kept"
        )


def edited(links: Sequence[Link]) -> Iterator[Damage]:
    """Files that were changed after a stage wrote them. Redoing the stage would overwrite them."""
    for link in links:
        try:
            record = link.folder.stages().get(link.name)
        except RunError:  # `damages` reports the manifest
            continue
        manifest = Manifest(link.folder.path)
        for name in manifest.edited(record) if record is not None else ():
            yield Damage(manifest.folder / name, "is not as it was written")


def put_aside(run: RunDir, found: Sequence[Path], prefix: str = ASIDE) -> dict[Path, Path]:
    """Moves files to a new folder of the run, under their own names; returns where each is now."""
    moved: dict[Path, Path] = {}
    root = run.path / f"{prefix}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for path in dict.fromkeys(found):
        if not os.path.lexists(path):
            continue  # within a folder that was moved
        to = root / path.relative_to(run.path)
        number = 1
        while os.path.lexists(to):
            to, number = to.with_name(f"{path.name}.{number}"), number + 1
        bring(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, to)
        moved[path] = to
    return moved


def _of(path: Path) -> Iterator[Damage]:
    if not os.path.lexists(path):
        return
    is_folder = path.name in FOLDERS
    if path.exists() and path.is_dir() != is_folder:
        yield Damage(path, "is a file, not a folder" if is_folder else "is a folder, not a file")
        return
    for file in (path, *path.rglob("*")) if is_folder else (path,):
        if file.is_dir():
            continue
        try:
            with file.open("rb") as opened:
                opened.read(1)
        except OSError as error:
            yield Damage(file, f"cannot be read ({error.strerror or error})")


def _between(run: RunDir, folder: Path) -> list[Path]:
    """A folder of a run behind the folders that contain it, the run's aside."""
    above = folder.relative_to(run.path).parents
    return [*(run.path / path for path in reversed(above[:-1])), folder]


def _of_contents(folder: RoundDir) -> Iterator[Damage]:
    try:
        folder.stages()
    except RunError as error:
        if folder.manifest.is_file() and "format version" not in str(error):
            yield Damage(folder.manifest, "is not a manifest, or is not as it was written")
    metadata = folder.checkpoint / "metadata.json"
    if os.path.lexists(metadata):
        try:
            if not isinstance(json.loads(metadata.read_bytes()), dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError):
            yield Damage(folder.checkpoint, "has no readable metadata.json")
    if folder.verdicts.is_file() and (why := _not_verdicts(folder.verdicts)) is not None:
        yield Damage(
            folder.verdicts,
            f"has people's verdicts and is damaged ({why}; `middo refine {folder.path} --read-review FILE` "
            "writes it again)",
        )


def _not_verdicts(path: Path) -> str | None:
    """Why a file does not contain verdicts of people; None if it does."""
    try:
        for number, row in enumerate(each_jsonl(path), 1):
            if found := faults_of(row, VerdictRow, ("id", "verdict", "example", "comment")):
                return f"row {number}: {found[0]}"
    except DamagedFile as error:
        return str(error.__cause__)
    except OSError:  # reported as a file that cannot be read
        return None
    return None
