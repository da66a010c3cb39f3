"""Files of a run that cannot be used, and where they go: `damaged-TIME/` in the run's folder.

A stage whose files were edited or lost is stale, and the chain redoes it. This module finds the files that
stop a run: a folder in the place of a file or the reverse, a file that cannot be read, a damaged manifest, a
checkpoint without its metadata.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from middo_jax.rundir.chain import Link
from middo_jax.rundir.elsewhere import bring
from middo_jax.rundir.layout import RoundDir, RunDir
from middo_jax.rundir.manifest import Manifest, RunError

FOLDERS = frozenset(("checkpoint", "huggingface"))  # what stages write as folders; all else are files
ASIDE, ROLLED_BACK = "damaged-", "rolled-back-"  # how the folders of what was put aside begin


class Damage(NamedTuple):
    """A file or folder that cannot be used, and why: `is a folder, not a file`."""

    path: Path
    why: str


def damages(run: RunDir, links: Sequence[Link]) -> Iterator[Damage]:
    """The files and folders of a run that cannot be used, in the order of the stages."""
    folders = list(dict.fromkeys(link.folder.path for link in links))
    for path in (run.config, run.events, run.llm_cache, run.report, *(RoundDir(f).manifest for f in folders)):
        yield from _of(path)
    for folder in folders:
        if os.path.lexists(folder) and not folder.is_dir():
            yield Damage(folder, "is not a folder")
    for link in links:
        for path in (*link.writes, *link.may_write):
            yield from _of(path)
    for folder in folders:
        yield from _of_contents(RoundDir(folder))


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
        except (OSError, ValueError):
            yield Damage(folder.checkpoint, "has no readable metadata.json")
