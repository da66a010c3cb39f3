"""Reads the judge's answer: from the probabilities of the eleven ratings "0".."10" to one number."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

MIDDLE = 5  # neither a high rating nor a low one


@dataclasses.dataclass(frozen=True)
class Readout:
    """One number from the probabilities of the ratings; higher is better.

    The probabilities are normalised over the eleven ratings, so other tokens do not count.

    Attributes:
      score: "expected": the sum of n P(n), 0 to 10. "log_odds": log P(n > 5) - log P(n < 5), which does not
        saturate for a model that is sure.
      temperature: log-probabilities are divided by it first.
    """

    score: Literal["expected", "log_odds"] = "expected"
    temperature: float = 1.0

    def __call__(self, log_p: jax.Array) -> jax.Array:
        """[..., 11] float32 log-probabilities of 0..10, up to a constant -> [...] float32."""
        log_p = log_p / self.temperature
        if self.score == "log_odds":
            high, low = log_p[..., MIDDLE + 1 :], log_p[..., :MIDDLE]
            return jax.nn.logsumexp(high, axis=-1) - jax.nn.logsumexp(low, axis=-1)
        return jax.nn.softmax(log_p, axis=-1) @ jnp.arange(11, dtype=jnp.float32)


EXPECTED = Readout()
