"""What a folder is refined with: held-out rows, answers, number and model of its round.

The loop and `middo refine DIR` both call this, so that `middo refine RUN/round_02` is the loop's stage.
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
    """The held-out rows of the run that the folder is a round of; None where nothing is held out."""
    run = directory.run
    return run.heldout if run is not None and run.heldout.exists() else None


def heldout_of(directory: RoundDir) -> list[Example]:
    """What no rewrite may repeat."""
    path = heldout_file(directory)
    return [] if path is None else [Example.from_json(row) for row in read_jsonl(path)]


def model_of(directory: RoundDir) -> Path | None:
    """The model that measures rewrites: a round's own; None for the one that the folder's manifest names."""
    is_trained = directory.run is not None and (directory.checkpoint / "metadata.json").exists()
    return directory.checkpoint if is_trained else None


@contextlib.contextmanager
def answer_cache(session: Session, directory: RoundDir) -> Iterator[AnswerCache]:
    """The refiner's answers: the file of `refine.cache`, the run's, or the folder's own."""
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
    """Replaces a damaged file of answers by one with what can be read of it; says so, None if it is whole.

    The damaged file is put aside beside it and never removed: it has answers that were paid for.
    """
    if not path.is_file() or is_whole(path):
        return None
    aside, n_answers, n_spent = salvage(path)
    return (
        f"{path}: damaged, put aside as {aside}; {n_answers:,} answers and {n_spent:,} costs could be saved"
    )
