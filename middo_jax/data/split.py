"""Splitting off the held-out part of a dataset."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from middo_jax.data.example import Example
from middo_jax.data.formats import DataError

_log = logging.getLogger(__name__)
_OTHER = "other"  # the pool of rare strata; it is no JSON, so no stratum has this name


def split_heldout(
    examples: Sequence[Example], fraction: float, seed: int, source_column: str
) -> tuple[list[Example], list[Example]]:
    """Splits off the rows that no training sees. The order of the rows does not change which ones these are.

    Rows with the same prompt stay together, so no held-out prompt is trained on; `fraction` is a share of
    the distinct prompts. If all examples have extra[source_column], the split is stratified by it. Values
    that are too rare for a stratum of their own are pooled.

    Returns:
      (train, held-out), both in the examples' order.

    Raises:
      DataError: the fraction is not in 0..1.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction must be at least 0 and less than 1, not {fraction}")
    if fraction == 0:
        return list(examples), []
    first: dict[str, Example] = {}  # prompt -> of the examples with it the one with the smallest id
    for example in sorted(examples, key=lambda example: example.id):
        first.setdefault(example.prompt, example)
    if len(first) < 2:
        _log.warning("nothing is held out: there are fewer than two different prompts")
        return list(examples), []
    # scikit-learn takes a second to import and brings pandas; commands that split nothing skip both.
    from sklearn.model_selection import train_test_split

    n = len(first)
    count = min(max(1, round(fraction * n)), n - 1)
    strata = _strata(list(first.values()), source_column, count)
    # Numbers stand for the prompts: scikit-learn copies what it splits.
    _, chosen = train_test_split(np.arange(n), test_size=count, random_state=seed, stratify=strata)
    prompts = list(first)
    heldout = {prompts[i] for i in chosen}
    return (
        [example for example in examples if example.prompt not in heldout],
        [example for example in examples if example.prompt in heldout],
    )


def _strata(examples: Sequence[Example], source_column: str, count: int) -> np.ndarray | None:
    """[n] The stratum of each example, such that `count` can be drawn from all strata; None: no strata.

    The examples must be sorted: ties between strata of one size are broken by their order.
    """
    values = [example.extra.get(source_column) for example in examples]
    missing = values.count(None)
    if missing:
        if missing < len(values):
            _log.warning(
                "held-out split is not stratified: %d of %d prompts have no %r",
                missing,
                len(values),
                source_column,
            )
        return None
    shared: dict[str, str] = {}  # one text per stratum, not per example
    texts = (json.dumps(value, sort_keys=True) for value in values)
    strata = [shared.setdefault(text, text) for text in texts]
    most = min(count, len(strata) - count)  # both parts need one example of each stratum at least
    sizes = Counter(strata).most_common()
    kept = [stratum for stratum, size in sizes if size > 1]
    if len(kept) < len(sizes) or len(kept) > most:
        kept = kept[: most - 1]
        if kept and len(strata) - sum(size for _, size in sizes[: len(kept)]) == 1:  # they are the largest
            kept.pop()  # the pool needs two members too
        _log.info("held-out split: %d of %d strata are pooled as other", len(sizes) - len(kept), len(sizes))
    if not kept:
        _log.warning("held-out split is not stratified: too few prompts per %r", source_column)
        return None
    chosen = set(kept)
    order = {stratum: i for i, stratum in enumerate(sorted({*chosen, _OTHER}))}
    return np.asarray([order[stratum if stratum in chosen else _OTHER] for stratum in strata])
