"""Log-probabilities of tokens under the model's own distribution: no temperature, no top_k, no top_p.

Axes: docs/contributing.md#axes; here n is a row of logits.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.inference.sampling import TOP_LOGPROBS

ROWS_AT_A_TIME = 32  # of a prompt's positions: their logits exist at one time
Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class Logprobs(NamedTuple, Generic[Array]):
    """Log-probabilities in nats of n tokens and of the likeliest tokens in their places.

    Attributes:
      token_n: float32, of the tokens themselves.
      ids_nj: int32, the likeliest tokens, likeliest first; fewer than TOP_LOGPROBS in a smaller vocabulary.
      top_nj: float32, of those.
    """

    token_n: Array
    ids_nj: Array
    top_nj: Array


class TokenLogprob(NamedTuple):
    """The same of one token on the host: its log-probability in nats, and (id, log-probability) pairs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits_nv: jax.Array, tokens_n: jax.Array) -> Logprobs[jax.Array]:
    """Log-probabilities of the tokens and of the likeliest ones."""
    logprobs_nv = jax.nn.log_softmax(logits_nv)
    top_nj, ids_nj = jax.lax.top_k(logprobs_nv, min(TOP_LOGPROBS, logits_nv.shape[-1]))
    token_n = jnp.take_along_axis(logprobs_nv, tokens_n[:, None], axis=-1)[:, 0]
    return Logprobs(token_n, ids_nj.astype(jnp.int32), top_nj)


def no_logprobs(n_rows: int, vocab_size: int) -> Logprobs[jax.Array]:
    """Zeros in the shapes of `logprobs_of`."""
    shape = (n_rows, min(TOP_LOGPROBS, vocab_size))
    return Logprobs(jnp.zeros(n_rows), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def rows(logprobs: Logprobs[jax.Array], n_rows: int) -> list[TokenLogprob]:
    """The first rows, on the host.

    Raises:
      FloatingPointError: the model's output is not finite.
    """
    token_n, ids_nj, top_nj = (np.asarray(x)[:n_rows] for x in logprobs)
    if not np.isfinite(token_n).all():
        raise FloatingPointError("the model's log-probabilities are not finite")
    return [
        TokenLogprob(token, tuple(zip(ids, top, strict=True)))
        for token, ids, top in zip(token_n.tolist(), ids_nj.tolist(), top_nj.tolist(), strict=True)
    ]
