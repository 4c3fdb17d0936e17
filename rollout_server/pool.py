"""Generates many sequences concurrently with a bounded number of workers, each taking one prompt after another."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

from common.sequence import MixedSequence, Prompt
from rollout_server.controller import SwitchingController

logger = logging.getLogger(__name__)


class RolloutError(RuntimeError):
    """A sequence could not be generated. Names the prompt and what failed."""

    def __init__(self, sequence_id: str, reason: str) -> None:
        super().__init__(sequence_id, reason)
        self.sequence_id = sequence_id
        self.reason = reason

    def __str__(self) -> str:
        return f"prompt {self.sequence_id}: {self.reason}"


async def generate_all(
    controller: SwitchingController, prompts: Sequence[Prompt], *, max_in_flight: int
) -> AsyncGenerator[list[MixedSequence], None]:
    """Yield the sequences finished since the last yield, at least one. A slow consumer gets more sequences per yield.

    Consumes prompts, at most ``max_in_flight`` at once; produces sequences in the order they finish; waits for the
    engines; stops when all are generated, or when closed. After closing, no request is left running in an engine.
    Raises RolloutError for the first prompt that fails, after yielding what finished before it and cancelling the rest.
    """
    num_workers = min(len(prompts), max_in_flight)
    queue = iter(prompts)
    finished: asyncio.Queue[MixedSequence | RolloutError] = asyncio.Queue()

    async def work() -> None:
        """Consumes queued prompts one after the other; produces sequences; stops at the first error."""
        for prompt in queue:
            try:
                finished.put_nowait(await controller.generate(prompt, others_wait=len(prompts) > num_workers))
            except Exception as error:
                failure = RolloutError(prompt.sequence_id, f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                finished.put_nowait(failure)
                return

    workers = [asyncio.create_task(work()) for _ in range(num_workers)]
    try:
        num_left = len(prompts)
        while num_left:
            batch, failure = [], None
            first = await finished.get()
            for each in (first, *(finished.get_nowait() for _ in range(finished.qsize()))):
                if isinstance(each, RolloutError):
                    failure = failure or each
                else:
                    batch.append(each)
            if batch:
                num_left -= len(batch)
                yield batch
            if failure is not None:
                logger.error("%s", failure, exc_info=failure.__cause__)
                raise failure
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
