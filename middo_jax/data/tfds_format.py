"""TFDS datasets without TensorFlow: read as a data source, written as array_record.

Import this module only where it is used: `tensorflow_datasets` takes seconds to import and prints to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from middo_jax.data.example import Example
from middo_jax.data.formats import DataError, first_line, plain
from middo_jax.data.layout import to_rows
from middo_jax.data.turns import Row


class MiddoExport(tfds.core.GeneratorBasedBuilder):
    """Conversations, ids, and the extra columns as one JSON text, since TFDS requires fixed types."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS 4.9.10 would find it by importlib_resources, which it does not declare.
    code_path = tfds.core.Path(__file__)

    def __init__(self, records: Sequence[Row] = (), **settings: Any) -> None:
        self._records = records
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text, "weight": np.int32})
        features = tfds.features.FeaturesDict({"id": text, "messages": turns, "extra": text})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Row]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self._records)


def rows(name: str, split: str) -> Iterator[Row]:
    """Rows of a registered dataset, which is downloaded if necessary, or of a prepared directory.

    Raises:
      DataError: no such dataset, directory or split, or it was prepared in a format that needs TensorFlow.
    """
    folder = Path(name).expanduser()
    builder: Any  # TFDS wraps its methods in ways that hide their types
    table: Any
    try:
        if (folder / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(str(folder))
            table = builder.as_data_source(split)
        elif folder.is_dir() or name.startswith(("/", ".", "~")):
            raise DataError(f"tfds: {folder} is not a prepared TFDS directory: no dataset_info.json there")
        else:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                table = tfds.data_source(name, split=split)
    except DataError:
        raise
    except Exception as e:  # the code of any dataset may run here
        raise DataError(f"tfds: cannot read split {split!r} of {name}: {first_line(e)}") from e
    ours = table.dataset_info.name == MiddoExport.name
    for index in range(len(table)):
        row = plain(table[index])
        for key, feature in table.dataset_info.features.items():
            if isinstance(feature, tfds.features.Sequence) and isinstance(row[key], dict):
                # TFDS returns a sequence of objects as an object of sequences.
                row[key] = [
                    dict(zip(row[key], turn, strict=True)) for turn in zip(*row[key].values(), strict=True)
                ]
        yield {"id": row["id"], "messages": row["messages"], **json.loads(row["extra"])} if ours else row


def write(examples: Sequence[Example], path: Path) -> None:
    """Writes a directory for `tfds.builder_from_directory`, whole or not at all; its only split is `train`.

    Raises:
      DataError: tools are used.
      OSError: the directory cannot be made, or is not empty.
    """
    if any(example.has_tools for example in examples):
        raise DataError("tfds has no place for tools; write messages instead")
    records = []
    for example, row in zip(examples, to_rows(examples, "messages"), strict=True):
        # TFDS has no null numbers.
        turns = row.pop("messages")
        messages = [turn | {"weight": 1 if turn.get("weight") is None else turn["weight"]} for turn in turns]
        records.append({"id": example.id, "messages": messages, "extra": json.dumps(row)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        builder = MiddoExport(records, data_dir=temporary, file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            builder.download_and_prepare()
        os.replace(builder.data_path, path)
