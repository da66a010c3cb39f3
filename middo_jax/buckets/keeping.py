"""Folders in a bucket to which files are only added: compiled programs, for other machines."""

from __future__ import annotations

from pathlib import Path

from middo_jax.buckets.mirror import Mirror
from middo_jax.buckets.places import Place
from middo_jax.rundir.files import is_reader

_kept: dict[Place, Mirror] = {}


def kept(url: Place) -> Path:
    """The copy on this machine of a folder in a bucket; the first call per process fills it.

    What is added to it is pushed with what else this process publishes. Several processes may add to it.

    Raises:
      BucketError: the bucket cannot be read.
    """
    if url not in _kept:
        mirror = Mirror(url, url.copy)
        mirror.pull(keeps=lambda name: True)
        _kept[url] = mirror
    return _kept[url].folder


def push_kept() -> None:
    """Pushes what was added; in a job only process 0 does. Raises BucketError if that fails."""
    if not is_reader():
        for mirror in _kept.values():
            mirror.push(removes=False)
