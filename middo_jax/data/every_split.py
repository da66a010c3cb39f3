"""Every split and file of a dataset. Reading data to train on takes the split for training alone.

FOLDER of save_to_disk, of train and test   ->  FOLDER/train, FOLDER/test
FOLDER with main/test.parquet, a/test.json  ->  FOLDER/a/test.json, FOLDER/main/test.parquet
FOLDER of TFDS                              ->  tfds:FOLDER:train, tfds:FOLDER:test
data/*.jsonl                                ->  each file that matches
FILE, hf:NAME:SPLIT, tfds:NAME:SPLIT        ->  itself
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from middo_jax.buckets import here, shown
from middo_jax.data.files import (
    ENDINGS,
    Rejection,
    files_at,
    is_data,
    rows_of_files,
)
from middo_jax.data.formats import DataError
from middo_jax.data.saved import is_saved, json_object, saved_splits
from middo_jax.data.sources import rows_at


def every_split(path: str) -> Iterator[tuple[str, Iterator[tuple[str, Any] | Rejection]]]:
    """The name of each split or file of a dataset, and its rows with their places, see `rows_of_files`.

    Raises:
      DataError: there is none, or one cannot be read.
    """
    if path.startswith(("hf:", "tfds:")):
        yield path, rows_at(path)
        return
    local = here(path)
    folder = Path(local).expanduser()
    if (folder / "features.json").is_file():
        for split in json_object(folder / "dataset_info.json").get("splits", []):
            name = f"tfds:{local}:{split['name']}"
            yield name, rows_at(name)
        return
    parts = list(_parts(folder, set())) if folder.is_dir() else files_at(path)
    if not parts:
        raise DataError(f"{path} has no file that ends in {', '.join(ENDINGS)}, and no folder in it has one")
    for part in parts:
        yield shown(part), rows_of_files([part])


def _parts(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """The files of data in a folder and in all folders below it, and folders of splits that were saved."""
    if folder.resolve() in visited:  # a link to a folder above
        return
    visited.add(folder.resolve())
    if is_saved(folder):
        yield from saved_splits(folder)
        return
    for place in sorted(folder.iterdir()):
        if place.is_dir() and not place.name.startswith("."):
            yield from _parts(place, visited)
        elif place.is_file() and is_data(place):
            yield place
