"""Laws of packing: every example once, nobody's tokens in another's segment, few shapes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from middo_jax.data.packing import first_fit, pack, plan_buckets
from middo_jax.data.tokenize import TokenizedExample

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def example(length: int, number: int, rng: np.random.Generator) -> TokenizedExample:
    """Tokens that say whose they are; the very first may be a target, which nothing precedes."""
    tokens_n = np.arange(length, dtype=np.int32) + 1000 * (number + 1)
    return TokenizedExample(str(number), tokens_n, rng.random(length) < 0.5, rng.random(length) < 0.5, False)


def test_first_fit_by_hand() -> None:
    assert first_fit([5, 3, 4, 2], 8, 8) == [[0, 1], [2, 3]]
    assert first_fit([5, 4, 3, 2], 8, 8) == [[0, 2], [1, 3]]
    assert first_fit([1, 1, 1], 8, 2) == [[0, 1], [2]]
    assert first_fit([5, 6, 3], 8, 8, open_rows=1) == [[0], [1], [2]]
    assert first_fit([], 8, 8) == []


def test_first_fit_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        first_fit([3, 9], 8, 8)


@given(LENGTHS, st.integers(40, 80), st.integers(1, 6), st.integers(1, 5))
def test_first_fit(lengths: list[int], capacity: int, max_segments: int, open_rows: int) -> None:
    rows = first_fit(lengths, capacity, max_segments, open_rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(1 <= len(row) <= max_segments for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)  # in the order of opening


@given(LENGTHS, st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_pack(lengths: list[int], max_segments: int, spare_rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [example(n, i, rng) for i, n in enumerate(lengths)]
    rows = first_fit(lengths, 48, max_segments)
    batch = pack(examples, rows, len(rows) + spare_rows, 48, max_segments)

    assert {a.shape for a in batch[:-1]} == {(len(rows) + spare_rows, 48)}
    assert batch.example_bs.shape == (len(rows) + spare_rows, max_segments)
    found = Counter(batch.example_bs[batch.example_bs >= 0].tolist())
    assert found == Counter(range(len(examples)))  # each once
    for b, s in zip(*np.nonzero(batch.example_bs >= 0), strict=True):
        e = examples[batch.example_bs[b, s]]
        at = np.flatnonzero(batch.segment_ids_bt[b] == s)
        assert np.array_equal(at, at[0] + np.arange(len(e)))  # in one piece
        assert np.array_equal(batch.tokens_bt[b, at], e.tokens_n)
        assert np.array_equal(batch.positions_bt[b, at], np.arange(len(e)))
        assert np.array_equal(batch.in_prompt_bt[b, at], e.in_prompt_n)
        # The next token, and never that of the next example.
        assert np.array_equal(batch.is_target_bt[b, at[:-1]], e.is_target_n[1:])
        assert not batch.is_target_bt[b, at[-1]]
    padding = batch.segment_ids_bt == -1
    assert padding.sum() == batch.tokens_bt.size - sum(lengths)
    for array in (batch.tokens_bt, batch.positions_bt, batch.is_target_bt, batch.in_prompt_bt):
        assert not array[padding].any()


def test_pack_of_nothing_is_padding_of_the_right_types() -> None:
    batch = pack([], [], 2, 4, 3)
    assert (batch.segment_ids_bt == -1).all()
    assert (batch.example_bs == -1).all()
    assert not batch.is_target_bt.any()


BUCKET_LENGTHS = st.lists(st.integers(1, 5000) | st.integers(1, 200), max_size=120)


@given(
    BUCKET_LENGTHS,
    st.sampled_from([64, 2048, 16384]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([0, 24, 700]),
    st.integers(0, 99),
)
def test_buckets(lengths: list[int], batch_tokens: int, divisor: int, prefix: int, seed: int) -> None:
    buckets = plan_buckets(lengths, batch_tokens, divisor, prefix=prefix)
    planned = [i for bucket in buckets for row in bucket.rows for i in row]
    assert sorted(planned) == list(range(len(lengths)))
    for bucket in buckets:
        assert bucket.rows
        assert all(prefix + sum(lengths[i] for i in row) <= bucket.length for row in bucket.rows)
        assert all(lengths[i] <= bucket.longest for row in bucket.rows for i in row)
        assert all(1 <= len(row) <= bucket.length // 8 for row in bucket.rows)
        assert bucket.batch % divisor == 0
        assert bucket.batch == divisor or bucket.batch * bucket.length <= batch_tokens
        assert [row for rows in bucket.batches() for row in rows] == bucket.rows
        assert all(1 <= len(rows) <= bucket.batch for rows in bucket.batches())
    # Few shapes: one a power of two for the longest example, from 128 on.
    shapes = [(bucket.length, bucket.longest) for bucket in buckets]
    assert len(set(shapes)) == len(shapes) <= 14
    assert shapes == sorted(shapes, reverse=True)
    # The same lengths in any order make the same rows of lengths.
    order = np.random.default_rng(seed).permutation(len(lengths))
    shuffled = plan_buckets([lengths[i] for i in order], batch_tokens, divisor, prefix=prefix)

    def in_lengths(plan: list, of: list[int]) -> list:
        return [(*b[:-1], [[of[i] for i in row] for row in b.rows]) for b in plan]

    assert in_lengths(buckets, lengths) == in_lengths(shuffled, [lengths[i] for i in order])


@pytest.mark.parametrize("median", [66, 90])
@pytest.mark.parametrize("batch_tokens", [2048, 8192])
def test_rows_and_batches_are_full(median: int, batch_tokens: int) -> None:
    """Lengths as Alpaca's and Dolly's are: nearly all that is computed is real."""
    rng = np.random.default_rng(0)
    spread = {66: 1.37, 90: 0.55}[median]  # the 99th percentile is 1,600, or 320
    lengths = np.clip(rng.lognormal(np.log(median), spread, 2000), 10, 2000).astype(int).tolist()
    buckets = plan_buckets(lengths, batch_tokens, prefix=24)
    real = sum(lengths) + 24 * sum(len(bucket.rows) for bucket in buckets)
    computed = sum(b.length * b.batch * len(list(b.batches())) for b in buckets)
    assert real / computed > 0.98
