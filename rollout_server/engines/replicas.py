"""Several engines with the same weights used as one. Assigns sequences to replicas, and handles replica failures.

A sequence stays on the replica that has its prefix in the KV cache. A new sequence goes to the replica with the fewest
calls. A failed call is retried once on another replica. A failed stream continues there after the last token delivered,
because the same request gives the same tokens. If the tokens differ, as they may in low precision, the stream fails. A
failed replica gets no new sequences for a while, unless it is the only one left.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

import numpy as np

from common.sequence import TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import (
    Engine,
    EngineCallError,
    GoOn,
    ScoreRequest,
    WriteRequest,
    Written,
    next_piece,
    write_whole,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_ASSIGNED = 65_536  # sequences with an assigned replica; the least recently used is dropped
_COOLDOWN_S = 60.0
"""A failed replica gets sequences again after this time, because one failed call does not mean it is down."""


class ReplicatedEngine:
    """Engine protocol over replicas of one role. Belongs to one event loop."""

    def __init__(self, replicas: Sequence[Engine]) -> None:
        assert replicas, "expected at least one replica"
        self.replicas = tuple(replicas)
        self._num_running = [0] * len(replicas)
        self._failed_s: dict[int, float] = {}  # replica -> when, on the monotonic clock
        self._replica_of: OrderedDict[str, int] = OrderedDict()  # sequence id -> replica

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        taken, go_on = np.empty(0, np.int32), None
        sent: dict[int, GoOn | None] = {}  # number of tokens so far -> what the consumer sent
        with self._counted(self._replica_for(request.sequence_id)) as replica:
            try:
                async with aclosing(self.replicas[replica].stream(request)) as pieces:
                    while (written := await next_piece(pieces, go_on)) is not None:
                        taken = np.concatenate([taken, written.token_ids])
                        go_on = sent[taken.size] = yield written
                return
            except EngineCallError as error:
                failed, other = replica, self._move(request.sequence_id, replica, error)
        num_written, go_on = 0, None
        with self._counted(other) as replica:
            async with aclosing(self.replicas[replica].stream(request)) as pieces:
                while (written := await next_piece(pieces, go_on)) is not None:
                    known = taken[num_written : num_written + len(written)]
                    num_written += len(written)
                    ends_early = written.finish_reason is not None and num_written <= taken.size
                    if ends_early or (written.token_ids[: known.size] != known).any():
                        raise EngineCallError(
                            f"replica {replica} generates other tokens than replica {failed} did before it failed "
                            f"(within the first {num_written} tokens), so the sequence can't continue there"
                        )
                    if known.size == len(written):
                        go_on = sent.get(num_written)
                    else:
                        go_on = yield written[known.size :]

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return await self._retried(request.sequence_id, lambda engine: engine.score(request))

    async def load_weights(self, update: WeightUpdate) -> None:
        for engine in self.replicas:
            await engine.load_weights(update)

    async def _retried(self, sequence_id: str | None, call: Callable[[Engine], Awaitable[T]]) -> T:
        with self._counted(self._replica_for(sequence_id)) as replica:
            try:
                return await call(self.replicas[replica])
            except EngineCallError as error:
                other = self._move(sequence_id, replica, error)
        with self._counted(other) as replica:
            return await call(self.replicas[replica])

    def _replica_for(self, sequence_id: str | None) -> int:
        """The sequence's replica. A new sequence gets the least loaded one that has not failed recently."""
        alive = self._alive()
        if sequence_id is None:
            return self._least_loaded(alive)
        if self._replica_of.get(sequence_id) not in alive:
            self._replica_of[sequence_id] = self._least_loaded(alive)
        self._replica_of.move_to_end(sequence_id)
        if len(self._replica_of) > _MAX_ASSIGNED:
            self._replica_of.popitem(last=False)
        return self._replica_of[sequence_id]

    def _move(self, sequence_id: str | None, replica: int, error: EngineCallError) -> int:
        """Assign the sequence to another replica. Raises ``error`` if there is none."""
        self._failed_s[replica] = time.monotonic()
        others = self._alive() - {replica}
        if not others:
            raise error
        logger.warning("sequence_id=%s moves to another replica: %s", sequence_id, error)
        other = self._least_loaded(others)
        if sequence_id is not None:
            self._replica_of[sequence_id] = other
        return other

    def _alive(self) -> set[int]:
        """Replicas that have not failed recently."""
        now_s = time.monotonic()
        self._failed_s = {replica: at_s for replica, at_s in self._failed_s.items() if now_s - at_s < _COOLDOWN_S}
        return set(range(len(self.replicas))) - self._failed_s.keys()

    def _least_loaded(self, candidates: set[int]) -> int:
        return min(candidates or range(len(self.replicas)), key=lambda replica: (self._num_running[replica], replica))

    @contextmanager
    def _counted(self, replica: int) -> Iterator[int]:
        """Count a running call."""
        self._num_running[replica] += 1
        try:
            yield replica
        finally:
            self._num_running[replica] -= 1
