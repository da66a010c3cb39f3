"""Bodies are read off the event loop's thread, short ones first, and long ones in limited number."""

from __future__ import annotations

import asyncio
import threading

import pytest

from middo_jax.inference.errors import ApiError
from middo_jax.inference.intake import LONG_BODY, Intake


def order_of(sizes: list[int]) -> list[int]:
    """The places of bodies in the order in which they are read; all come while another one is read."""

    async def read_all() -> list[int]:
        intake, free, order = Intake(0), threading.Event(), list[int]()
        first = asyncio.create_task(intake.run(lambda: free.wait(30), 1))
        await asyncio.sleep(0)
        tasks = [
            asyncio.create_task(intake.run(lambda place=place: order.append(place), size))
            for place, size in enumerate(sizes)
        ]
        await asyncio.sleep(0)
        free.set()
        await asyncio.gather(first, *tasks)
        return order

    return asyncio.run(read_all())


def test_short_bodies_overtake_long_ones() -> None:
    assert order_of([1000, 1000, 10, 20]) == [2, 3, 0, 1]
    assert order_of([5, 5, 5]) == [0, 1, 2]


def test_a_long_body_gets_its_turn_among_short_ones_that_keep_coming() -> None:
    async def until_read() -> int:
        intake, is_read, n_short = Intake(0), False, 0

        def read_long() -> None:
            nonlocal is_read
            is_read = True

        async def short_ones() -> None:
            nonlocal n_short
            while not is_read:
                await intake.run(lambda: None, 10)
                n_short += 1

        others = [asyncio.create_task(short_ones()) for _ in range(3)]
        await asyncio.sleep(0)
        await intake.run(read_long, 1000)
        await asyncio.gather(*others)
        return n_short

    assert 50 < asyncio.run(until_read()) < 1000


def test_who_leaves_while_it_waits_blocks_nobody() -> None:
    async def leave() -> str:
        intake, free = Intake(0), threading.Event()
        first = asyncio.create_task(intake.run(lambda: free.wait(30), 1))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(intake.run(lambda: None, 1)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        first.cancel()  # the thread goes on, and the next one has its turn
        await asyncio.sleep(0)
        waiting[1].cancel()  # it has its turn, which passes to the next
        free.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        return await intake.run(lambda: threading.current_thread().name, 1)

    name = asyncio.run(asyncio.wait_for(leave(), 30))
    assert name != threading.current_thread().name


def test_long_bodies_are_limited_and_short_ones_are_not() -> None:
    intake = Intake(2 * (LONG_BODY + 1))
    with intake.admitted(LONG_BODY + 1), intake.admitted(LONG_BODY + 1), intake.admitted(LONG_BODY):
        with (
            pytest.raises(ApiError, match="wait to be read; try again later") as caught,
            intake.admitted(1 << 20),
        ):
            pass
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
    with intake.admitted(LONG_BODY + 1):
        pass
