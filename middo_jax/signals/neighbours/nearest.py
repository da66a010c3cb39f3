"""The neighbours of samples, as a search returns them; in a module of its own, which needs no JAX.

Axes: k neighbour, n sample.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The k nearest other samples of each sample, nearest first; ties go to the lower index.

    Attributes:
      index_nk: int32, -1 where there is no k-th neighbour.
      similarity_nk: float32 cosine similarity, NaN where there is none.
    """

    index_nk: np.ndarray
    similarity_nk: np.ndarray

    def mean_similarity(self) -> np.ndarray:
        """s_i [n]: mean over the k neighbours, NaN where one is missing."""
        return self.similarity_nk.mean(axis=1)
