"""Waiting with time-outs: the error says what was waited for, and nothing is left running."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class WaitedTooLong(TimeoutError):
    """Something did not finish in time."""


async def within(timeout_s: float, awaitable: Awaitable[T], what: str) -> T:
    """The result, or WaitedTooLong with ``what`` was waited for. On a time-out the awaitable is cancelled."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise WaitedTooLong(f"waited {timeout_s:g} s for {what}") from error
        raise


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Run both at the same time. If one fails or the caller is cancelled, both end; the first error is raised."""
    tasks = asyncio.create_task(first), asyncio.create_task(second)
    try:
        of_first, of_second = await asyncio.gather(*tasks)
        return of_first, of_second
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
