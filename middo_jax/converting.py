"""`middo convert`: a dataset in another format."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from middo_jax.config import Config
from middo_jax.data.files import require_not_read
from middo_jax.data.mixing import read_configured
from middo_jax.data.repair import strict_hint
from middo_jax.data.sources import commonest_reasons, write
from middo_jax.rundir import local, write_jsonl


class Converted(NamedTuple):
    """What was written.

    Attributes:
      out: the file, or the folder of tfds.
      n: rows in it.
      rejected: rows that could not be used; they are in OUT.rejected.jsonl.
      repaired: rows that were repaired.
      said: lines for people: what was taken of each source, and the commonest reasons.
    """

    out: Path
    n: int
    rejected: int
    repaired: int
    said: list[str]


def convert(config: Config, out: Path, to: str, form: str = "auto") -> Converted:
    """Writes the dataset of the settings `data` in the format `to`.

    Args:
      config: the settings; of them, `data` and `seed` count.
      out: the file to write; a folder for tfds.
      to: alpaca, messages, sharegpt, prompt_completion, parquet or tfds.
      form: the format of the data; auto leaves `data.format` as it is.

    Raises:
      DataError: the data cannot be read, has no usable row, or `out` is a part of it; the format has no place
        for a row.
    """
    settings, beside = config.data, out.with_name(f"{out.name}.rejected.jsonl")
    if form != "auto":
        settings = settings.model_copy(update={"format": form})
    for path in settings.paths:
        require_not_read(path, [out, beside])
    read = read_configured(settings, config.seed)
    said = list(read.said)
    write(read.examples, local(out), to, settings.id_column or "id")
    if read.rejections:
        write_jsonl(beside, (r.to_json() for r in read.rejections))
        said.append(f"{len(read.rejections)} rows could not be used, see {beside}")
        said += commonest_reasons(read.rejections)
    if read.repairs:
        said.append(f"rows were repaired{strict_hint(repair.reason for repair in read.repairs)}:")
        said += commonest_reasons(read.repairs)
    return Converted(out, len(read.examples), len(read.rejections), len(read.repairs), said)
