"""Groups take turns."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any, cast

import pytest

from middo_jax.inference.engine import Engine
from middo_jax.inference.fair_queue import FairQueue
from middo_jax.inference.generation import Generation
from middo_jax.inference.sampling import Request
from middo_jax.inference.slots import Completion


def test_groups_take_turns_in_the_order_in_which_they_came() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(item, item[0])
    assert sorted(queue) == ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert len(queue) == 6
    assert [queue.pop() for _ in range(2)] == ["a1", "b1"]
    queue.push("b2", "b")  # its group has no other item: it comes after those that wait
    assert [queue.pop() for _ in range(len(queue))] == ["c1", "a2", "b2", "c2", "a3"]
    assert not queue
    with pytest.raises(KeyError):
        queue.pop()


def test_a_large_group_delays_nobody_by_more_than_a_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(1000):
        queue.push(i, "large")
    queue.push(-1, "small")
    assert [queue.pop(), queue.pop()] == [0, -1]


def test_all_answers_to_one_http_request_are_one_group() -> None:
    groups: list[object] = []

    class Noting(Engine):
        def __init__(self) -> None:
            pass

        def submit(
            self, request: Request, on_step: object = None, group: object = None
        ) -> concurrent.futures.Future[Completion]:
            groups.append(group)
            return concurrent.futures.Future()

    async def asked_twice() -> None:
        for _ in range(2):
            Generation(Noting(), [Request([1], 1)] * 3, cast(Any, None), [], in_pieces=False).close()

    asyncio.run(asked_twice())
    first, second = groups[0], groups[3]
    assert None not in (first, second)
    assert first is not second
    assert groups == [first] * 3 + [second] * 3
