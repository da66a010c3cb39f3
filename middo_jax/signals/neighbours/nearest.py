"""The neighbours of samples, as a search returns them. This module is separate because it needs no JAX.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The k nearest other samples of each sample, nearest first; ties go to the lower index.

    Attributes:
      index_nj: int32, -1 for no neighbour.
      similarity_nj: float32 cosine similarity, NaN for no neighbour.
    """

    index_nj: np.ndarray
    similarity_nj: np.ndarray

    def mean_similarity(self) -> np.ndarray:
        """s [n]: the mean over the k neighbours; NaN if one is missing."""
        return self.similarity_nj.mean(axis=1)
