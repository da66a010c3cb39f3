"""People judge the accepted rewrites before they are merged: what is behind `middo refine --read-review`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from middo_jax import api, stages
from middo_jax.config import ConfigError, SettingsLike
from middo_jax.refinement.review import ReviewFormat
from middo_jax.results import Refined
from middo_jax.rundir import RoundDir, held
from middo_jax.selecting import PathLike
from middo_jax.session import session_of

FORMATS: tuple[ReviewFormat, ...] = ("argilla", "label-studio")


def write_review(
    folder: PathLike,
    path: PathLike,
    form: str = "argilla",
    *,
    settings: SettingsLike = None,
) -> int:
    """Writes the accepted rewrites of a folder for people to judge; refines it first if that is not done.

    Args:
      folder: see `refine`.
      path: a new file: JSON lines, or one array if it ends in .json. What shows it is written beside it: a
        script for Argilla (.py), a labelling interface for Label Studio (.xml).
      form: argilla or label-studio.
      settings: see `refine`.

    Returns:
      The number of rewrites.

    Raises:
      RunError: a file exists, or no rewrite was accepted.
    """
    known: ReviewFormat | None = next((name for name in FORMATS if name == form), None)
    if known is None:
        raise ConfigError(f"no review format {form!r}; there are {', '.join(FORMATS)}")
    directory = RoundDir(Path(folder))
    if not directory.is_done("refine"):
        api.refine(folder, settings=settings)
    return stages.write_review(directory, Path(path), known)


def read_review(
    folder: PathLike, paths: Sequence[PathLike], *, settings: SettingsLike = None
) -> tuple[Refined, Counter[str]]:
    """Takes people's verdicts on a folder's rewrites, and merges what is left.

    In a run, `middo run` then makes again what depends on the merged dataset.

    Args:
      folder: see `refine`.
      paths: files that Argilla or Label Studio exported, or that were filled in by hand.
      settings: see `refine`.

    Returns:
      The rewrites, and the number of those that got each verdict: accept, reject, edit, none; `strangers`:
      verdicts on other rewrites, which are left out.

    Raises:
      RunError: the folder is not refined.
      DataError: a file cannot be read, or has no verdict on these rewrites; the folder is unchanged.
      RunLocked: another process writes into the folder.
    """
    session, directory = session_of(Path(folder), settings), RoundDir(Path(folder))
    with held(directory.path):
        found = stages.read_review(directory, [Path(path) for path in paths])
        return api.merge_refined(session, directory), found
