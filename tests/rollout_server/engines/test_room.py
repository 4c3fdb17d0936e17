import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engines.room import CacheRoom


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Guest:
    """Holds room until told to leave."""

    def __init__(self, room: CacheRoom, num_tokens: int | None) -> None:
        self.is_in = False
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._stay(room, num_tokens))

    async def _stay(self, room: CacheRoom, num_tokens: int | None) -> None:
        async with room.hold_all() if num_tokens is None else room.hold(num_tokens):
            self.is_in = True
            try:
                await self._leave.wait()
            finally:
                self.is_in = False

    def leave(self) -> None:
        self._leave.set()


async def guests(room: CacheRoom, *sizes: int | None) -> list[Guest]:
    all_guests = [Guest(room, size) for size in sizes]
    await settle()
    return all_guests


async def test_who_came_first_is_first_even_where_a_later_one_would_fit() -> None:
    first, large, small = await guests(CacheRoom(10), 6, 7, 4)
    assert [guest.is_in for guest in (first, large, small)] == [True, False, False]
    first.leave()
    await settle()
    assert [guest.is_in for guest in (large, small)] == [True, False]
    large.leave()
    await settle()
    assert small.is_in
    small.leave()


async def test_who_wants_more_than_there_is_has_all_of_it() -> None:
    first, second = await guests(CacheRoom(10), 50, 1)
    assert (first.is_in, second.is_in) == (True, False)
    first.leave()
    await settle()
    assert second.is_in
    second.leave()


async def test_all_of_it_is_held_when_the_others_have_left_and_keeps_later_ones_out() -> None:
    first, everything, later = await guests(CacheRoom(10), 3, None, 3)
    assert [guest.is_in for guest in (first, everything, later)] == [True, False, False]
    first.leave()
    await settle()
    assert [guest.is_in for guest in (everything, later)] == [True, False]
    everything.leave()
    await settle()
    assert later.is_in
    later.leave()


@pytest.mark.parametrize("leaves_first", [False, True], ids=["while it waits", "as its turn comes"])
async def test_one_that_is_cancelled_holds_up_nobody(leaves_first: bool) -> None:
    first, cancelled, last = await guests(CacheRoom(10), 10, 8, 4)
    if leaves_first:
        first.leave()
        await asyncio.sleep(0)
    cancelled.task.cancel()
    first.leave()
    await settle()
    assert last.is_in
    last.leave()
    await settle()
    (everything,) = await guests(CacheRoom(10), None)
    assert everything.is_in
    everything.leave()


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_whatever_comes_and_goes_no_more_is_held_than_there_is_and_all_of_it_is_free_in_the_end(
    sizes: list[int], seed: int
) -> None:
    rng, room = random.Random(seed), CacheRoom(10)
    held = 0

    async def visit(num_tokens: int) -> None:
        nonlocal held
        await asyncio.sleep(0)
        async with room.hold(num_tokens):
            held += min(num_tokens, 10)
            assert held <= 10
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            held -= min(num_tokens, 10)

    async def everyone() -> None:
        tasks = [asyncio.create_task(visit(size)) for size in sizes]
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        for task in rng.sample(tasks, len(tasks) // 3):
            if task.cancel() and not task.done():
                held_before = held
                await asyncio.gather(task, return_exceptions=True)
                assert held_before >= 0
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1.0), room.hold_all():
            pass

    asyncio.run(everyone())
