"""Datasets of the Hugging Face hub, and directories that `datasets` reads or wrote, by hf:NAME:SPLIT.

`datasets` is optional (the extra `hub`), so it is imported where it is used. A whole split of a folder
that `save_to_disk` wrote is read without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from middo_jax.data.formats import DataError, first_line
from middo_jax.data.in_memory import rows_in_memory
from middo_jax.data.saved import saved_rows, saved_splits

_log = logging.getLogger(__name__)


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of NAME or NAME:CONFIG, a dataset of the hub or a directory.

    Raises:
      DataError: `datasets` is not installed, or the dataset, config or split cannot be read.
    """
    if (saved := Path(name).expanduser() / split) in saved_splits(Path(name).expanduser()):
        yield from saved_rows(saved)
        return
    table: Any  # `datasets` types its loaders as unions of all that they may return
    try:
        import datasets
    except ImportError as e:
        raise DataError(
            "hf: needs the `datasets` package; install the extra: pip install 'middo-jax[hub]'"
        ) from e
    folder, config = Path(name).expanduser(), None
    if ":" in name and not folder.is_dir():
        name, _, config = name.rpartition(":")
        folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            if name.startswith(("/", ".", "~")):
                raise DataError(f"hf: there is no directory {folder}")
            table = datasets.load_dataset(name, config, split=split)
        elif (folder / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(str(folder))[split]
        elif (folder / "state.json").is_file():
            table = datasets.load_from_disk(str(folder))
            if table.split is not None and str(table.split) != split:
                raise DataError(f"hf: {folder} contains the split {str(table.split)!r}, not {split!r}")
        else:
            table = datasets.load_dataset(str(folder), config, split=split)
    except DataError:
        raise
    except Exception as e:  # many loaders may run here, and several libraries raise network errors
        wanted = f"split {split!r}" + (f" of config {config!r}" if config else "")
        raise DataError(
            f"hf: cannot read {wanted} of {name}: {first_line(e)}{_choices(folder, name, config)}"
        ) from e
    yield from rows_in_memory(table)


def _choices(folder: Path, name: str, config: str | None) -> str:
    """The configs or splits that a dataset has, as the end of a message; "" if they cannot be listed."""
    import datasets

    place = str(folder) if folder.is_dir() else name
    try:
        if (folder / "dataset_dict.json").is_file():
            return (
                f"; its splits: {', '.join(json.loads((folder / 'dataset_dict.json').read_text())['splits'])}"
            )
        configs = datasets.get_dataset_config_names(place)
        if config not in configs and len(configs) > 1:
            return f"; its configs: {', '.join(configs)}. Write hf:NAME:CONFIG:SPLIT"
        splits = datasets.get_dataset_split_names(place, config or configs[0])
    except Exception as e:  # the dataset may be out of reach; the message that this text ends says so
        _log.debug("the configs of %s cannot be listed: %s", place, e)
        return ""
    return f"; its splits: {', '.join(splits)}" + (f"; its configs: {', '.join(configs)}" if config else "")
