"""How many tokens of an engine's key-value cache are spoken for. First come, first served."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class CacheRoom:
    """Room for ``num_tokens`` tokens. Belongs to one event loop.

    vLLM takes blocks from requests that run, to give them to others, but never from one that waits between two turns.
    When all wait and the cache is full, none could go on. So each takes the room that it may come to need before it
    begins, and gives it back when it has ended.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = self._num_free = num_tokens
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, num_tokens: int) -> AsyncGenerator[None, None]:
        """Wait until there is room for so many tokens, and for who came before; who wants more than all has all."""
        num_tokens = min(num_tokens, self._num_tokens)
        if self._waiting or num_tokens > self._num_free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((num_tokens, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    self._waiting.remove((num_tokens, turn))
                    self._admit()
                else:
                    self._give_back(num_tokens)
                raise
        else:
            self._num_free -= num_tokens
        try:
            yield
        finally:
            self._give_back(num_tokens)

    @asynccontextmanager
    async def hold_all(self) -> AsyncGenerator[None, None]:
        """Wait until nobody holds any room; who comes later waits meanwhile."""
        async with self.hold(self._num_tokens):
            yield

    def _give_back(self, num_tokens: int) -> None:
        self._num_free += num_tokens
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._num_free:
            num_tokens, turn = self._waiting.popleft()
            if not turn.done():
                self._num_free -= num_tokens
                turn.set_result(None)
