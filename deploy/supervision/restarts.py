"""Limits and reports recoveries, and ends the run after too many. ``supervised`` does the recovery."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from ray.exceptions import RayError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from common.config import Supervision
from common.errors import RunEnds, one_line
from common.metrics import FAULTS, PROMPTS_SET_ASIDE
from common.run_dir import RunDir
from common.waiting import WaitedTooLong
from deploy.supervision.fatal_errors import what_to_lower
from deploy.supervision.health_monitor import Fault, Unhealthy
from rollout_server.ray_metrics import Exported
from trainer.actors import LearnerRankDied

logger = logging.getLogger(__name__)

_TRANSIENT = (RayError, WaitedTooLong, LearnerRankDied, Unhealthy)  # a recovery with these errors is tried again


class RestartPolicy:
    """The recoveries of one run."""

    def __init__(self, config: Supervision, folder: RunDir) -> None:
        self._config = config
        self._folder = folder
        self._exported = Exported([FAULTS, PROMPTS_SET_ASIDE], {"run": folder.path.name})
        self._num_in_a_row = 0
        self._last_step = 0

    def step_finished(self, step: int) -> None:
        """Reset the count, unless the step was only repeated."""
        if step > self._last_step:
            self._last_step, self._num_in_a_row = step, 0

    def count_quarantined(self) -> None:
        self._exported.add(PROMPTS_SET_ASIDE, 1)

    async def run(
        self,
        faults: Sequence[Fault],
        recover: Callable[[list[Fault]], Awaitable[None]],
        *,
        what: str,
        counts: bool = True,
    ) -> None:
        """Call ``recover`` until it succeeds. ``recover`` adds further faults that it finds.

        Raises RunEnds if too many recoveries in a row were not followed by a finished step.
        """
        faults = list(faults)
        noticed, noticed_s = time.time(), time.monotonic()
        for fault in faults:
            logger.warning("%s", fault)
        recovered_s = None
        try:
            if counts:
                self._count(faults)
            await asyncio.sleep(self._pause_s())
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_TRANSIENT), wait=self._wait, before_sleep=self._again, reraise=True
            ):
                with attempt:
                    await recover(faults)
            recovered_s = time.monotonic() - noticed_s
            logger.warning("%s after %.1f s", what, recovered_s)
        finally:
            for fault in faults:
                self._exported.add(FAULTS, 1)
                self._folder.append_fault(
                    {
                        "time": noticed,
                        "kind": fault.kind,
                        "who": fault.who,
                        "reason": fault.reason,
                        "detected_s": fault.detected_s,
                        "recovered_s": recovered_s,
                    }
                )

    def _count(self, faults: Sequence[Fault]) -> None:
        if self._num_in_a_row >= self._config.max_repairs:
            advice = [f"; lower {what_to_lower(it.who)}" for it in faults if it.kind == "out_of_memory"]
            raise RunEnds(
                f"{'; '.join(map(str, faults))}{''.join(advice)}; {self._num_in_a_row} restarts in a row without a "
                "finished step (supervision.max_repairs); resume (--resume) from the last checkpoint, if there is one"
            )
        self._num_in_a_row += 1

    def _again(self, state: RetryCallState) -> None:
        """A failed recovery counts as another one."""
        assert state.outcome is not None
        error = state.outcome.exception()
        reason = f"{type(error).__name__}: {one_line(error)}"
        logger.warning("recovery failed: %s", reason)
        self._count([Fault(kind="failed", who="recovery", reason=reason, detected_s=None)])

    def _wait(self, _: RetryCallState) -> float:
        return self._pause_s()

    def _pause_s(self) -> float:
        """The wait before the next recovery; 0 for the first in a row."""
        if self._num_in_a_row < 2:
            return 0.0
        return min(self._config.backoff_first_s * 2.0 ** (self._num_in_a_row - 2), self._config.backoff_last_s)
