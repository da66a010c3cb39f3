"""How the report names and colours the three axes."""

from __future__ import annotations

from typing import NamedTuple


class Axis(NamedTuple):
    """One axis as the report shows it.

    Attributes:
      set_name: the name of the samples that the axis selects.
      colour: CSS class.
      columns: the columns of scores.parquet that decide.
    """

    set_name: str
    colour: str
    columns: tuple[str, ...]


AXES = {
    "complexity": Axis("hard", "c-complexity", ("loss_pre", "loss_post")),
    "diversity": Axis("sparse", "c-diversity", ("knn_mean_sim",)),
    "quality": Axis("low quality", "c-quality", ("quality",)),
}
