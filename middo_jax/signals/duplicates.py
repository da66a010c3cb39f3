"""Exact duplicates: prompts with equal tokens, found by their hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np

from middo_jax.data.tokenize import TokenizedExample
from middo_jax.rundir.rows import DuplicatesRow


def prompt_hash(example: TokenizedExample) -> str:
    """A hash of everything on which the embedding of a prompt depends: 64 bits, in hexadecimal.

    The embedding depends on the tokens up to the prompt's last one, and on which of them belong to the
    prompt. A decoder has not seen later tokens. So equal hashes mean equal embeddings, up to rounding in
    different batches. The system turn changes the hash, the answer does not.
    """
    prompt = np.flatnonzero(example.in_prompt_n)
    stop = int(prompt[-1]) + 1 if len(prompt) else 0
    tokens, marks = example.tokens_n[:stop].astype("<i4"), np.packbits(example.in_prompt_n[:stop])
    return hashlib.sha256(tokens.tobytes() + marks.tobytes()).hexdigest()[:16]


def groups(keys: Iterable[Hashable]) -> np.ndarray:
    """[n] int32: for each key the index of the first equal key.

    ["a", "b", "a"]  ->  [0, 1, 0]
    """
    first: dict[Hashable, int] = {}
    return np.fromiter((first.setdefault(key, i) for i, key in enumerate(keys)), np.int32)


def count_duplicates(hashes: Iterable[str]) -> DuplicatesRow:
    """The number of groups of equal prompts, and the number of samples in such groups.

    ["a", "b", "a", "c", "a"]  ->  {"n_groups": 1, "n_samples": 3}
    """
    sizes = [size for size in Counter(hashes).values() if size > 1]
    return {"n_groups": len(sizes), "n_samples": sum(sizes)}
