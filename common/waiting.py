"""Waiting: never without a time-out that says what was waited for, and never leaving anything behind."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class WaitedTooLong(TimeoutError):
    """Something did not come within its time."""


async def within(timeout_s: float, awaitable: Awaitable[T], what: str) -> T:
    """The result, or WaitedTooLong naming ``what`` was waited for. What was awaited is cancelled then."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise WaitedTooLong(f"waited {timeout_s:g} s for {what}") from error
        raise


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Both at once. When one fails or the caller is cancelled neither goes on; the error is the one that came first."""
    tasks = asyncio.create_task(first), asyncio.create_task(second)
    try:
        of_first, of_second = await asyncio.gather(*tasks)
        return of_first, of_second
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
