"""What is in a dataset before anything is computed: usable rows, lengths, one sample as the model sees it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.packing import plan_buckets
from middo_jax.data.sources import Rejection
from middo_jax.data.tokenize import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = {"min": 0.0, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}


def inspect_rows(examples: Sequence[Example], rejections: Sequence[Rejection]) -> dict[str, Any]:
    """Counts, and the rows that cannot be used."""
    return {"n": len(examples), "rejected": [{"where": r.where, "reason": r.reason} for r in rejections]}


def inspect_tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, batch_tokens: int
) -> dict[str, Any]:
    """Lengths, what is learnt, what is cut, how well packing fills; the first sample with targets marked."""
    tokenized = [tokenize(e, tokenizer, max_length) for e in examples]
    lengths = [len(t) for t in tokenized]
    buckets = plan_buckets(lengths, batch_tokens)
    computed = sum(b.length * b.batch * -(-len(b.rows) // b.batch) for b in buckets)
    parts = []
    for learnt, run in itertools.groupby(
        zip(tokenized[0].tokens_n, tokenized[0].is_target_n, strict=True), key=lambda pair: bool(pair[1])
    ):
        text = tokenizer.decode([int(token) for token, _ in run])
        parts.append(f"[[{text}]]" if learnt else text)
    return {
        "tokens": {
            "total": sum(lengths),
            "quantiles": {
                name: int(np.quantile(lengths, q, method="nearest")) for name, q in QUANTILES.items()
            },
            "target_share": sum(int(t.is_target_n.sum()) for t in tokenized) / sum(lengths),
            "max_length": max_length,
            "truncated": sum(t.truncated for t in tokenized),
            "fill": sum(lengths) / computed,
            "shapes": len(buckets),
        },
        "rendered": "".join(parts),
    }
