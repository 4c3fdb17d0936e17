"""Verdicts for many sequences at once: what is asked for in one turn of the event loop is computed as one.

The verifier's cost is a fixed one per call and a small one per position; a hundred sequences that move together then
pay the fixed one once. A thousand positions at a time are enough for that, and fit the processor's cache.
"""

import asyncio
from collections.abc import Iterator, Sequence

from common.config import Divergence
from common.sequence import Floats, TopLogprobs
from rollout_server.verifier import compare

_BLOCK = 65_536
"""Entries of the lists (positions times k) in one call, about. With k = 64 on one core, a position takes 5.5 us in
calls of 64 positions and 2.5 in calls of 1,024; larger ones gain nothing and touch fresh memory."""

_Asked = tuple[TopLogprobs, TopLogprobs, asyncio.Future[Floats]]


class Verdicts:
    """``compare`` under one divergence. Belongs to one event loop."""

    def __init__(self, kind: Divergence) -> None:
        self._kind = kind
        self._asked: list[_Asked] = []

    async def divergences(self, teacher_top: TopLogprobs, student_top: TopLogprobs) -> Floats:
        """[n] nats. See ``verifier.compare``; a row's value does not depend on what is computed beside it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Floats] = loop.create_future()
        self._asked.append((teacher_top, student_top, answer))
        if len(self._asked) == 1:
            loop.call_soon(self._compute)
        return await answer

    def _compute(self) -> None:
        asked, self._asked = self._asked, []
        for block in _blocks([each for each in asked if not each[2].done()]):
            self._answer(block)

    def _answer(self, block: Sequence[_Asked]) -> None:
        try:
            values = compare(
                TopLogprobs.concatenate([teacher for teacher, _, _ in block]),
                TopLogprobs.concatenate([student for _, student, _ in block]),
                self._kind,
            ).divergences
        except Exception as error:
            for _, _, answer in block:
                answer.set_exception(error)
            return
        end = 0
        for teacher, _, answer in block:
            start, end = end, end + len(teacher)
            answer.set_result(values[start:end])


def _blocks(asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
    """What is asked for, in order, in pieces that end where they reach a block's size."""
    block: list[_Asked] = []
    num_entries = 0
    for each in asked:
        block.append(each)
        num_entries += each[0].token_ids.size
        if num_entries >= _BLOCK:
            yield block
            block, num_entries = [], 0
    if block:
        yield block
