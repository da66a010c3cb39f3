"""A damaged file of answers: what can be read of it goes into a new one, and the old one stays beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from middo_jax.refinement.endpoint.cache import AnswerCache

_TABLES = ("answers", "spent", "facts")


def is_whole(path: Path) -> bool:
    """Whether SQLite finds no damage in a file. It reads all of it."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return [*db.execute("PRAGMA integrity_check")] == [("ok",)]
    except sqlite3.Error:
        return False


def salvage(path: Path) -> tuple[Path, int, int]:
    """Moves a damaged file aside and copies what can be read of it into a new one at its place.

    Returns:
      Where the damaged file is now, and how many answers and entries of costs the new one has.
    """
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    for suffix in ("-wal", "-shm", ""):  # the log first: it belongs to the file
        if (old := path.with_name(path.name + suffix)).exists():
            os.rename(old, aside.with_name(aside.name + suffix))
    AnswerCache(path).close()
    counts = dict.fromkeys(_TABLES, 0)
    with contextlib.closing(sqlite3.connect(path)) as new:
        for table in _TABLES:
            for row in _readable(aside, table):
                marks = ", ".join("?" * len(row))
                with contextlib.suppress(sqlite3.Error):  # a row of another shape, or out of a damaged page
                    counts[table] += new.execute(
                        f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row
                    ).rowcount
        new.commit()
    return aside, counts["answers"], counts["spent"]


def _readable(path: Path, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table that can be read, from its start and, behind a damaged page, from its end."""
    for order in ("ASC", "DESC"):
        try:
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.text_factory = _text
                yield from db.execute(f"SELECT * FROM {table} ORDER BY rowid {order}")
                return
        except (sqlite3.Error, UnicodeDecodeError):
            continue


def _text(raw: bytes) -> str:
    return raw.decode()
