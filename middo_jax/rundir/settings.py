"""The settings that a folder was made with."""

from __future__ import annotations

from pathlib import Path

from middo_jax.config import Config, SettingsLike, layers_of, load
from middo_jax.rundir.layout import local
from middo_jax.rundir.manifest import RunError


def settings_of(directory: Path, settings: SettingsLike = None) -> Config:
    """Returns the settings of a folder or of its run, overridden by `settings`.

    Raises:
      RunError: there is no config.yaml.
    """
    directory = local(directory)
    for path in (directory / "config.yaml", directory.parent / "config.yaml"):
        if path.exists():
            return load(path, layers_of(settings))
    raise RunError(
        f"{directory}: no config.yaml there or above; `middo score --data F --model M --out DIR` writes one"
    )
