"""Verdicts for many sequences at once: what is asked for in one turn of the event loop is computed as one.

The verifier's cost is a fixed one per call and a small one per position; a hundred sequences that move together then
pay the fixed one once.
"""

import asyncio

from common.config import Divergence
from common.sequence import Floats, TopLogprobs
from rollout_server.verifier import compare


class Verdicts:
    """``compare`` under one divergence. Belongs to one event loop."""

    def __init__(self, kind: Divergence) -> None:
        self._kind = kind
        self._asked: list[tuple[TopLogprobs, TopLogprobs, asyncio.Future[Floats]]] = []

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
        waiting = [(teacher, student, answer) for teacher, student, answer in asked if not answer.done()]
        if not waiting:
            return
        try:
            values = compare(
                TopLogprobs.concatenate([teacher for teacher, _, _ in waiting]),
                TopLogprobs.concatenate([student for _, student, _ in waiting]),
                self._kind,
            ).divergences
        except Exception as error:
            for _, _, answer in waiting:
                answer.set_exception(error)
            return
        end = 0
        for teacher, _, answer in waiting:
            start, end = end, end + len(teacher)
            answer.set_result(values[start:end])
