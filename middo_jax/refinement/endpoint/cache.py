"""The refiner's answers and their cost, in one SQLite file that rounds and runs may share.

The key of an answer depends on the request only, not on the endpoint's address or its API key.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.endpoint.usage import FIELDS, Usage
from middo_jax.rundir.files import DiskFull, is_disk_full


class CacheError(RuntimeError):
    """The cache file cannot be used; the message says what to do."""


_KEPT = tuple(name for name in FIELDS if name != "from_cache")  # free, and counted anew by every start
_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT NOT NULL, "
    "finish_reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, "
    "cached_tokens INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (run TEXT NOT NULL, round INTEGER NOT NULL, axis TEXT NOT NULL, "
    + "".join(f"{name} NUMERIC NOT NULL, " for name in _KEPT)
    + "PRIMARY KEY (run, round, axis))",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
_ENTER = (
    f"INSERT INTO spent (run, round, axis, {', '.join(_KEPT)}) "
    f"VALUES (?, ?, ?, {', '.join('?' * len(_KEPT))}) "
    f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _KEPT)}"
)


class AnswerCache:
    """Answers by request key, spending by run, round and account, and facts about servers.

    Failures are never stored. Every write is committed at once, so paid answers survive the process. Several
    processes may have the file open; one object is for one thread.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file.

        Raises:
          CacheError: the file is not a cache, or its folder is not writable.
        """
        self.path = Path(path)
        self.said = set[str]()  # names of warnings that were given: each is given once
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30.0)  # seconds to wait for another run's write
            self._db.execute("PRAGMA journal_mode=WAL")
            # In WAL mode with NORMAL, a commit survives the death of the process, not that of the machine.
            self._db.execute("PRAGMA synchronous=NORMAL")
            for table in _TABLES:
                self._db.execute(table)
            self._db.commit()

    def get(self, key: str) -> Answer | None:
        """The stored answer with `from_cache` set, or None."""
        with self._explained():
            row = self._db.execute(
                "SELECT text, finish_reason, prompt_tokens, completion_tokens, cached_tokens FROM answers "
                "WHERE key = ?",
                (key,),
            ).fetchone()
        return Answer(*row, from_cache=True, key=key) if row else None

    def request(self, key: str) -> str | None:
        """The canonical request with this key, if there is an answer to it."""
        with self._explained():
            row = self._db.execute("SELECT request FROM answers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def all(self) -> Iterator[tuple[str, Answer]]:
        """Every canonical request with its answer, in the order of arrival."""
        columns = "request, text, finish_reason, prompt_tokens, completion_tokens"
        query = f"SELECT {columns} FROM answers ORDER BY rowid"
        with self._explained():
            for request, *answer in self._db.execute(query):
                yield request, Answer(*answer, from_cache=True)

    def facts(self) -> dict[str, str]:
        """All facts by name."""
        with self._explained():
            return dict(self._db.execute("SELECT name, value FROM facts").fetchall())

    def enter(
        self,
        run: str,
        round_index: int,
        account: str,
        change: Usage,
        answer: tuple[str, Answer] | None = None,
    ) -> None:
        """Adds to the spending of a run and, in the same transaction, stores an answer.

        Args:
          run: name of the run.
          round_index: round of the run.
          account: account within the round.
          change: is added to the counters.
          answer: (canonical request, answer with its key). The first answer to a request is kept.

        Raises:
          CacheError: the file is no longer writable.
          DiskFull: there is no room for the answer.
        """
        with self._explained(), self._db:
            values = (getattr(change, name) for name in _KEPT)
            self._db.execute(_ENTER, (run, round_index, account, *values))
            if answer is not None:
                request_json, said = answer
                self._db.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        said.key,
                        request_json,
                        said.text,
                        said.finish_reason,
                        said.prompt_tokens,
                        said.completion_tokens,
                        said.cached_tokens,
                    ),
                )

    def spent(self, run: str) -> dict[tuple[int, str], Usage]:
        """The spending of a run over all its starts, by (round, account)."""
        query = f"SELECT round, axis, {', '.join(_KEPT)} FROM spent WHERE run = ?"
        with self._explained():
            rows = self._db.execute(query, (run,)).fetchall()
        return {(row[0], row[1]): Usage(**dict(zip(_KEPT, row[2:], strict=True))) for row in rows}

    def fact(self, name: str) -> str | None:
        """A fact that was found out earlier, or None."""
        with self._explained():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def learn(self, name: str, value: str, replace: bool = False) -> str:
        """Stores a fact and returns the stored one. A known fact is kept unless `replace`."""
        conflict = "REPLACE" if replace else "IGNORE"
        with self._explained(), self._db:
            self._db.execute(f"INSERT OR {conflict} INTO facts VALUES (?, ?)", (name, value))
        return self.fact(name) or value

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as e:
            if is_disk_full(e):
                raise DiskFull(self.path) from e
            raise CacheError(
                f"{self.path}: cannot be used as the refiner's cache ({e}). It has paid answers: make it "
                "writable, or let `middo run CONFIG --repair` put it aside and save what can be read of it"
            ) from e
