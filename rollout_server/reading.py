"""The teacher's rows along a text that grows. Owns which rows are known, so that each is asked for once.

Every teacher call also predicts the token to come; that row is kept and is the first of the next chunk's scores. So no
call ever needs a row before the teacher's cached prefix, and a prompt costs no log-probs at all.
"""

import asyncio

import numpy as np

from common.sequence import Ids, TopLogprobs
from rollout_server.engine import Engine, ScoreRequest, Written


class TeacherReading:
    """Starts to read ``text`` at once, while the student writes its first chunk. Must be closed."""

    def __init__(self, teacher: Engine, text: Ids, sequence_id: str | None = None) -> None:
        self._teacher = teacher
        self._sequence_id = sequence_id
        self._text = text
        # [1 row] of the token to come; no rows once the student has finished.
        first_read = teacher.score(ScoreRequest(token_ids=text, start=text.size, sequence_id=sequence_id))
        self._next: asyncio.Future[TopLogprobs] = asyncio.ensure_future(first_read)

    async def scores(self, proposal: Written) -> TopLogprobs:
        """[len(proposal), k] The teacher's row at each position of the next consecutive piece of student text."""
        text = np.concatenate([self._text, proposal.token_ids])
        # After the last token no other is to come, and its row might lie beyond the context.
        readable = text if proposal.finish_reason is None else text[:-1]
        rows = await self._next
        start = self._text.size + 1
        if start <= readable.size:
            request = ScoreRequest(token_ids=readable, start=start, sequence_id=self._sequence_id)
            fresh = await self._teacher.score(request)
            rows = TopLogprobs.concatenate([rows, fresh])
        self._text = text
        self._next = _known(rows[len(proposal) :])
        return rows[: len(proposal)]

    async def close(self) -> None:
        """End a read that is still under way."""
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)


def _known(rows: TopLogprobs) -> asyncio.Future[TopLogprobs]:
    future: asyncio.Future[TopLogprobs] = asyncio.get_running_loop().create_future()
    future.set_result(rows)
    return future
