"""Exact duplicates: prompts that a model cannot tell apart, found by the hash of what it reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np

from middo_jax.data.tokenize import TokenizedExample
from middo_jax.rundir.rows import DuplicatesRow


def prompt_hash(example: TokenizedExample) -> str:
    """64 bits, in hexadecimal, of all that the embedding of a prompt depends on.

    That is every token up to the prompt's last and which of them are the prompt's: what follows, a decoder
    has not seen yet. So equal hashes mean equal embeddings, up to the rounding of other batches. Another
    system turn in front makes another hash; another answer behind does not.
    """
    prompt = np.flatnonzero(example.in_prompt_n)
    stop = int(prompt[-1]) + 1 if len(prompt) else 0
    tokens, marks = example.tokens_n[:stop].astype("<i4"), np.packbits(example.in_prompt_n[:stop])
    return hashlib.sha256(tokens.tobytes() + marks.tobytes()).hexdigest()[:16]


def groups(keys: Iterable[Hashable]) -> np.ndarray:
    """[n] int32, equal where the keys are: the number of the first that was like it.

    ["a", "b", "a"]  ->  [0, 1, 0]
    """
    first: dict[Hashable, int] = {}
    return np.fromiter((first.setdefault(key, i) for i, key in enumerate(keys)), np.int32)


def count_duplicates(hashes: Iterable[str]) -> DuplicatesRow:
    """How many groups of equal prompts there are, and how many samples are in one.

    ["a", "b", "a", "c", "a"]  ->  {"n_groups": 1, "n_samples": 3}
    """
    sizes = [size for size in Counter(hashes).values() if size > 1]
    return {"n_groups": len(sizes), "n_samples": sum(sizes)}
