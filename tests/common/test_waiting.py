import asyncio

import pytest

from common.waiting import both


async def test_both_run_at_once_and_give_their_own_answers() -> None:
    here, there = asyncio.Event(), asyncio.Event()

    async def first() -> int:
        here.set()
        await there.wait()
        return 1

    async def second() -> str:
        await here.wait()
        there.set()
        return "two"

    assert await asyncio.wait_for(both(first(), second()), 5) == (1, "two")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_an_error_or_a_cancellation_leaves_neither_running(cancelled: bool) -> None:
    ended = []

    async def waits(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # tidying up takes a turn
            ended.append(name)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise FloatingPointError("not finite")

    if cancelled:
        task = asyncio.create_task(both(waits("a"), waits("b")))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(ended) == ["a", "b"]
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            await both(waits("a"), fails())
        assert ended == ["a"]
