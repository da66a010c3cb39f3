"""Folders that `datasets` wrote with save_to_disk, read without that package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from middo_jax.data.formats import DataError
from middo_jax.data.in_memory import arrow_rows


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder of `save_to_disk`; of one with several splits, those of `train`.

    Raises:
      DataError: there is no such split, or a file is missing or damaged.
    """
    splits = saved_splits(folder)
    if splits != [folder]:
        if folder / "train" not in splits:
            named = ", ".join(f"hf:{folder}:{split.name}" for split in splits)
            raise DataError(f"{folder} has no split train; give one of {named}")
        folder = folder / "train"
    for entry in json_object(folder / "state.json").get("_data_files", []):
        file = folder / entry["filename"]
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
                yield from arrow_rows(batches, batches.schema)
        except (OSError, pa.ArrowException) as e:
            raise DataError(f"{file}: not a readable Arrow file: {e}") from e


def saved_splits(folder: Path) -> list[Path]:
    """The folders of the splits in a folder of `save_to_disk`; the folder itself if it is one split.

    Raises:
      DataError: the list of splits cannot be read.
    """
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return [folder]
    return [folder / split for split in json_object(listing).get("splits", [])]


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that describes a dataset.

    Raises:
      DataError: the file cannot be read, or is no such object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise DataError(f"{file} must be a JSON object")
    return value
