"""Inputs of refinement from the run around a folder: held-out rows, cached answers, the round's model.

The loop and `middo refine DIR` both use this module, so `middo refine RUN/round_02` equals the loop's stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from middo_jax.data.example import Example
from middo_jax.refinement import AnswerCache
from middo_jax.refinement.endpoint.salvage import is_whole, salvage
from middo_jax.rundir import RoundDir, read_jsonl
from middo_jax.session import Session


def heldout_file(directory: RoundDir) -> Path | None:
    """Returns the file of held-out rows of the folder's run; None if there is none."""
    run = directory.run
    return run.heldout if run is not None and run.heldout.exists() else None


def heldout_of(directory: RoundDir) -> list[Example]:
    """Returns the held-out examples, which no rewrite may repeat."""
    path = heldout_file(directory)
    return [] if path is None else [Example.from_json(row) for row in read_jsonl(path)]


def model_of(directory: RoundDir) -> Path | None:
    """Returns the checkpoint of the folder's round, which measures rewrites; None if it has none."""
    is_trained = directory.run is not None and (directory.checkpoint / "metadata.json").exists()
    return directory.checkpoint if is_trained else None


def id_columns_of(directory: RoundDir) -> tuple[str, ...]:
    """Returns the columns of the user's data that name a row; () of a folder of an earlier version."""
    run = directory.run
    first = directory if run is None else run.round(0)
    return tuple(first.stages().get("prepare", {}).get("id_columns", ()))


@contextlib.contextmanager
def answer_cache(session: Session, directory: RoundDir) -> Iterator[AnswerCache]:
    """Opens the cache of the refiner's answers: `refine.cache`, else the run's file, else the folder's."""
    run = directory.run
    own = directory / "llm_cache.sqlite" if run is None else run.llm_cache
    cache = AnswerCache(session.config.refine.cache or own)
    try:
        yield cache
    finally:
        cache.close()


def check_cache(path: Path) -> None:
    """Raises CacheError if there is a file of answers that cannot be used."""
    if path.exists():
        AnswerCache(path).close()


def save_answers(path: Path) -> str | None:
    """Replaces a damaged file of answers by its readable part; returns a line about it, None if it is intact.

    The damaged file is put aside beside it and never removed: it has answers that were paid for.
    """
    if not path.is_file() or is_whole(path):
        return None
    aside, n_answers, n_spent = salvage(path)
    return (
        f"{path}: damaged, put aside as {aside}; {n_answers:,} answers and {n_spent:,} costs could be saved"
    )
