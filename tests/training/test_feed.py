"""Laws of the feed: a batch is a function of its step's number; what was made ahead is not waited for."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from support.tiny_training import PACK_LENGTH, SETTINGS, examples, mesh_of

from middo_jax.config import TrainSettings
from middo_jax.data.packing import pack
from middo_jax.training import feed as feed_module
from middo_jax.training.feed import feed
from middo_jax.training.plan import longest_example, plan_epoch, plan_training
from middo_jax.training.step import Batch, put_batch

ONE = mesh_of(1, 1, 1)


def with_settings(**update: object) -> TrainSettings:
    return SETTINGS.model_copy(update=update)


def assert_same(batch: Batch, other: Batch) -> None:
    for a, b in zip(jax.device_get(batch), jax.device_get(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_is_a_function_of_its_number():
    tokenized = examples(60)
    plan = plan_training(list(map(len, tokenized)), SETTINGS, 3, PACK_LENGTH)
    whole = [batch for batch, _ in feed(tokenized, plan, SETTINGS, PACK_LENGTH, ONE)]
    assert len(whole) == len(plan) > 20
    # Started anywhere, and read on any mesh.
    for first, mesh in ((1, ONE), (7, mesh_of(2, 2, 2)), (len(plan) - 1, mesh_of(8, 1, 1)), (len(plan), ONE)):
        again = plan_training(list(map(len, tokenized)), SETTINGS, 3, PACK_LENGTH)[first:]
        resumed = [batch for batch, _ in feed(tokenized, again, SETTINGS, PACK_LENGTH, mesh)]
        assert len(resumed) == len(plan) - first
        for batch, wanted in zip(resumed, whole[first:], strict=True):
            assert_same(batch, wanted)


@pytest.mark.parametrize(
    ("length", "pack_length", "wanted"), [(1, 512, 128), (128, 512, 128), (129, 512, 256), (300, 320, 320)]
)
def test_no_example_exceeds_the_longest(length: int, pack_length: int, wanted: int):
    assert longest_example([length, 1], pack_length) == wanted


def test_batches_lie_where_the_step_wants_them():
    tokenized, settings = examples(60), with_settings(gradient_accumulation=2)
    mesh = mesh_of(2, 2, 2)
    step = plan_training(list(map(len, tokenized)), settings, 3, PACK_LENGTH)[0]
    [(batch, _)] = feed(tokenized, [step], settings, PACK_LENGTH, mesh)
    assert batch.tokens_bt.shape == (2, 4, PACK_LENGTH)
    assert {shard.data.shape for shard in batch.tokens_bt.addressable_shards} == {(2, 1, PACK_LENGTH)}
    packed = pack(tokenized, step.rows, 8, PACK_LENGTH, max_segments=PACK_LENGTH)
    assert_same(batch, put_batch(packed, 2, mesh))


def test_the_wait_is_what_was_not_made_ahead(monkeypatch: pytest.MonkeyPatch):
    tokenized = examples(60)
    plan = plan_training(list(map(len, tokenized)), SETTINGS, 3, PACK_LENGTH)[:6]
    made = feed_module.pack

    def slow(*arguments: Any, **named: Any) -> object:
        time.sleep(0.1)
        return made(*arguments, **named)

    monkeypatch.setattr(feed_module, "pack", slow)
    hurried = [wait_s for _, wait_s in feed(tokenized, plan, SETTINGS, PACK_LENGTH, ONE)]
    assert min(hurried) > 0.05
    waits = []
    for _, wait_s in feed(tokenized, plan, SETTINGS, PACK_LENGTH, ONE):
        waits.append(wait_s)
        time.sleep(0.4)  # the device computes
    assert waits[0] > 0.05
    assert max(waits[1:]) < 0.05


def test_what_fails_while_a_batch_is_made_reaches_the_loop():
    tokenized = examples(10)
    plan = plan_training(list(map(len, tokenized)), SETTINGS, 3, PACK_LENGTH)[:1]
    beyond = [plan[0]._replace(rows=[[99]])]
    with pytest.raises(IndexError):
        list(feed(tokenized, beyond, SETTINGS, PACK_LENGTH, ONE))


def test_a_step_takes_the_wanted_number_of_examples():
    tokenized, settings = examples(57), with_settings(examples_per_step=10)
    steps = plan_epoch(list(map(len, tokenized)), settings, 0, 7, PACK_LENGTH)
    assert [sum(map(len, rows)) for rows in steps] == [10, 10, 10, 10, 10, 7]
    order = [sorted(i for row in rows for i in row) for rows in steps]
    shuffled = np.random.default_rng((7, 0)).permutation(57)
    assert order == [sorted(shuffled[i : i + 10].tolist()) for i in range(0, 57, 10)]
    assert all(sum(len(tokenized[i]) for i in row) <= PACK_LENGTH for rows in steps for row in rows)


def test_what_the_rows_of_a_step_do_not_hold_begins_the_next(caplog: pytest.LogCaptureFixture):
    tokenized, settings = examples(57), with_settings(examples_per_step=10, batch_size=2)
    steps = plan_epoch(list(map(len, tokenized)), settings, 0, 7, PACK_LENGTH)
    assert all(0 < len(rows) <= 2 for rows in steps)
    assert Counter(i for rows in steps for row in rows for i in row) == Counter(range(57))
    assert all(sum(map(len, rows)) <= 10 for rows in steps)
    assert steps == plan_epoch(list(map(len, tokenized)), settings, 0, 7, PACK_LENGTH)
    plan_training(list(map(len, tokenized)), settings, 7, PACK_LENGTH)
    assert "steps take fewer than train.examples_per_step=10" in caplog.text
