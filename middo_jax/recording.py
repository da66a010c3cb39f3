"""Writes the refiner's answers so far to a file that other runs replay: `middo refine DIR --record FILE`."""

from __future__ import annotations

from pathlib import Path

from middo_jax import api
from middo_jax.config import SettingsLike, replayed_file
from middo_jax.refinement.endpoint.recording import write_recording
from middo_jax.rundir import RoundDir, RunError
from middo_jax.selecting import PathLike
from middo_jax.session import session_of
from middo_jax.stages.endpoint import embedded_name, named_endpoint
from middo_jax.stages.surroundings import answer_cache


def record(folder: PathLike, path: PathLike, *, settings: SettingsLike = None) -> tuple[int, str]:
    """Writes all answers of the refiner that the cache of a folder has; refines it first if that is not done.

    Args:
      folder: see `refine`. Its cache is that of its run, or `refine.cache`.
      path: a new file.
      settings: see `refine`; `refine.model` names the model whose answers are meant.

    Returns:
      (the number of answers, the model that wrote them).

    Raises:
      RunError: the file exists or would be in the folder, the cache has no answer of the model, or the
        answers are replayed themselves.
    """
    session, directory = session_of(Path(folder), settings), RoundDir(Path(folder))
    if (file := replayed_file(session.config.refine.base_url)) is not None:
        raise RunError(f"{file}: these answers are recorded already, and some may be another model's")
    if Path(path).exists():
        raise RunError(f"{path} exists; name another file, or remove it")
    directory.require_elsewhere(Path(path))
    if not directory.is_done("refine"):
        api.refine(folder, settings=settings)
    named = named_endpoint(session.config)
    model = embedded_name(session.config) if named is None else named.model
    with answer_cache(session, directory) as cache:
        return write_recording(Path(path), cache, model), model
