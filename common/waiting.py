"""No wait without a time-out, and none that does not say what it waited for."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


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
