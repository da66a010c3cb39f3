"""The contents of a dataset before any training: usable rows, lengths, one sample as the model reads it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.files import Rejection
from middo_jax.data.packing import first_fit
from middo_jax.data.sources import count_reasons
from middo_jax.data.templates import starts_with_bos
from middo_jax.data.tokenize import TokenizedExample, end_of_turn_token
from middo_jax.data.user_rows import Repair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = {
    "min": 0,
    "5 %": 0.05,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "95 %": 0.95,
    "99 %": 0.99,
    "max": 1,
}


def inspect_rows(
    examples: Sequence[Example], rejections: Sequence[Rejection], repairs: Sequence[Repair] = ()
) -> dict[str, Any]:
    """The number of usable rows, the rejected rows with place and reason, and reasons and repairs counted."""
    return {
        "n": len(examples),
        "rejected": [{"where": r.where, "reason": r.reason} for r in rejections],
        "reasons": [reason._asdict() for reason in count_reasons(rejections)],
        "repairs": [reason._asdict() for reason in count_reasons(repairs)],
    }


def inspect_tokens(
    whole: Sequence[TokenizedExample],
    cut: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    pack_length: int,
    scoring: Mapping[str, Any],
) -> dict[str, Any]:
    """Lengths, cuts, targets and packing of conversations, and the first sample as the model reads it.

    Args:
      whole: at least one conversation.
      cut: the same conversations, cut to `max_length`.
      tokenizer: with the template of the conversations.
      max_length: tokens.
      pack_length: tokens per packed row in training.
      scoring: `fill` and `shapes` of the scoring pass, from its plan.

    Returns:
      tokens: `quantiles` and `histogram` of the lengths before the cut; the number of `truncated`
        conversations and of `tokens_cut`; `total` and `target_share` after the cut; `scoring`; fill and rows
        in `training`.
      sample: `id` of the first sample, whether it is cut, and its text in parts, each of the kind `target`,
        `prompt` or `template`.
      warnings: problems of the template, in words.
    """
    lengths = [len(t) for t in cut]
    rows = first_fit(lengths, pack_length, max_segments=pack_length)
    return {
        "tokens": {
            "quantiles": {
                name: int(np.quantile([len(t) for t in whole], q, method="nearest"))
                for name, q in QUANTILES.items()
            },
            "histogram": length_histogram([len(t) for t in whole], max_length),
            "max_length": max_length,
            "truncated": sum(t.truncated for t in cut),
            "tokens_cut": sum(map(len, whole)) - sum(lengths),
            "total": sum(lengths),
            "target_share": sum(int(t.is_target_n.sum()) for t in cut) / sum(lengths),
            "scoring": dict(scoring),
            "training": {"fill": sum(lengths) / (len(rows) * pack_length), "rows": len(rows)},
            "pack_length": pack_length,
        },
        "sample": {
            "id": cut[0].id,
            "truncated": cut[0].truncated,
            "parts": sample_parts(cut[0], tokenizer),
        },
        "warnings": _warnings(cut[0], tokenizer),
    }


def length_histogram(lengths: Sequence[int], max_length: int) -> list[dict[str, int]]:
    """Counts of lengths in bins `from`..`to` (inclusive), whose edges grow by a factor of 2, or of its root.

    [20, 50, 60, 100], max_length 90  ->  16-22: 1, 23-31: 0, 32-44: 0, 45-63: 2, 64-89: 0, ... 91-127: 1

    One bin begins at max_length + 1, so that no bin contains both cut and whole conversations.
    """
    shortest, longest = min(lengths), max(lengths)
    per_octave = 1 if longest > 64 * shortest else 2
    edges = {round(2 ** (k / per_octave)) for k in range(0, 64 * per_octave)} | {max_length + 1}
    ordered = sorted(edges)
    first = max(i for i, edge in enumerate(ordered) if edge <= shortest)
    last = min(i for i, edge in enumerate(ordered) if edge > longest)
    counts, _ = np.histogram(lengths, ordered[first : last + 1])
    return [
        {"from": low, "to": high - 1, "n": int(n)}
        for low, high, n in zip(ordered[first:last], ordered[first + 1 : last + 1], counts, strict=True)
    ]


def sample_parts(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The text of a conversation in parts of one kind each: `target`, `prompt` or `template`."""
    kinds = np.where(example.is_target_n, "target", np.where(example.in_prompt_n, "prompt", "template"))
    parts, shown, stop = [], "", 0
    for kind, run in itertools.groupby(kinds.tolist()):
        stop += len(list(run))
        # Decoded from the start each time, since a part alone would lose the space before its first word.
        text = str(tokenizer.decode(example.tokens_n[:stop].tolist(), clean_up_tokenization_spaces=False))
        parts.append({"kind": kind, "text": text[len(shown) :]})
        shown = text
    return parts


def _warnings(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    if end_of_turn_token(tokenizer) is None:
        found.append(
            "the template writes no control token after an answer, so the model does not learn where to stop"
        )
    n_bos = int((example.tokens_n[:2] == tokenizer.bos_token_id).sum()) if tokenizer.bos_token_id else 0
    if starts_with_bos(tokenizer) and not n_bos:
        found.append(f"the tokenizer begins every text with {tokenizer.bos_token}, the template does not")
    if n_bos == 2:
        found.append(f"the template begins with {tokenizer.bos_token} twice")
    return found
