"""The teacher's rows along a text that grows. Owns which rows are known, so that each is asked for once.

Every teacher call also predicts the token to come; that row is kept and is the first of the next chunk's scores. So no
call ever needs a row before the teacher's cached prefix, and a prompt costs no log-probs at all.
"""

import asyncio

import numpy as np

from common.sequence import Ids, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest, Written


class TeacherReading:
    """Reads after ``text``; with ``ahead``, the text itself at once, while the student writes its first proposal.

    Reading ahead spares the log-probs of a long text that is in no cache yet. Must be closed.
    """

    def __init__(self, teacher: Engine, text: Ids, sequence_id: str | None = None, *, ahead: bool = True) -> None:
        self._teacher = teacher
        self._sequence_id = sequence_id
        self._text = text
        self._next: TopLogprobs | None = None  # [1 row] of the token to come
        self._first_read: asyncio.Future[TopLogprobs] | None = None
        if ahead:
            self._first_read = asyncio.ensure_future(self._read(text, start=text.size))

    async def scores(self, proposal: Written, *, is_last: bool) -> TopLogprobs:
        """[len(proposal), k] The teacher's row at each position of the next consecutive piece of student text.

        ``is_last``: after it no other token is to come, and its row, which might lie beyond the context, is not read.
        """
        text = np.concatenate([self._text, proposal.token_ids])
        readable = text[:-1] if is_last else text
        if self._first_read is not None:
            self._next, self._first_read = await self._first_read, None
        rows = [] if self._next is None else [self._next]
        start = self._text.size + len(rows)
        if start <= readable.size:
            rows.append(await self._read(readable, start=start))
        known = TopLogprobs.concatenate(rows)
        self._text = text
        self._next = None if is_last else known[len(proposal) :]
        return known[: len(proposal)]

    async def close(self) -> None:
        """End a read ahead that is still under way."""
        if self._first_read is not None:
            self._first_read.cancel()
            await asyncio.gather(self._first_read, return_exceptions=True)

    async def _read(self, text: Ids, *, start: int) -> TopLogprobs:
        return await self._teacher.score(ScoreRequest(token_ids=text, start=start, sequence_id=self._sequence_id))
