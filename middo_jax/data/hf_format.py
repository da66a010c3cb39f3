"""Datasets of the Hugging Face hub, and directories that `datasets` reads or wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from middo_jax.data.formats import DataError

_log = logging.getLogger(__name__)


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of NAME or NAME:CONFIG, a dataset of the hub or a directory.

    Raises:
      DataError: `datasets` is not installed, or no such dataset, config or split can be read.
    """
    table: Any  # `datasets` types its loaders as unions of everything they may return
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
                raise DataError(f"hf: {folder} holds the split {str(table.split)!r}, not {split!r}")
        else:
            table = datasets.load_dataset(str(folder), config, split=split)
    except DataError:
        raise
    except Exception as e:  # loaders of many kinds run here, and network errors of several libraries
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        wanted = f"split {split!r}" + (f" of config {config!r}" if config else "")
        raise DataError(
            f"hf: cannot read {wanted} of {name}: {reason}{_choices(folder, name, config)}"
        ) from e
    for batch in table.with_format("arrow").iter(batch_size=4096):
        yield from batch.to_pylist()


def _choices(folder: Path, name: str, config: str | None) -> str:
    """What can be read of a dataset, as the end of a message; nothing if that cannot be told either."""
    import datasets

    source = str(folder) if folder.is_dir() else name
    try:
        if (folder / "dataset_dict.json").is_file():
            return (
                f"; its splits: {', '.join(json.loads((folder / 'dataset_dict.json').read_text())['splits'])}"
            )
        configs = datasets.get_dataset_config_names(source)
        if config not in configs and len(configs) > 1:
            return f"; its configs: {', '.join(configs)}. Write hf:NAME:CONFIG:SPLIT"
        splits = datasets.get_dataset_split_names(source, config or configs[0])
    except Exception as e:  # the dataset itself may be what cannot be reached; that is what the message says
        _log.debug("the configs of %s cannot be listed: %s", source, e)
        return ""
    return f"; its splits: {', '.join(splits)}" + (f"; its configs: {', '.join(configs)}" if config else "")
