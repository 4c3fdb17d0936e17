"""Health checks: queries the health of a run's processes while it waits for their work, and explains errors with it.

Knows how Ray reports a dead process. ``supervised`` decides what to do about it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from common.config import Supervision
from common.errors import one_line
from common.health import Health
from common.waiting import WaitedTooLong, within
from rollout_server.engines.protocol import EngineCallError
from rollout_server.pool import RolloutError
from trainer.actors import LearnerRankDied

T = TypeVar("T")
Kind = Literal["died", "silent", "hung", "failed", "out_of_memory"]

_TRANSIENT = (RayError, WaitedTooLong, EngineCallError, RolloutError, LearnerRankDied)
"""Errors that may not occur again on a retry. Any other error of a call, with all processes healthy, is a bug."""

_KNOWN_AFTER_S = 1.0
"""Ray may report the end of a process a moment after the calls that failed because of it."""

_ENDED = "its process has ended"


class MonitoredProcess(Protocol):
    """One process of a run."""

    @property
    def name(self) -> str: ...
    async def health(self) -> Health:
        """Raises RayError if the process is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One failure."""

    kind: Kind
    who: str  # the process's name
    reason: str  # one line
    detected_s: float | None  # since the last successful health check; None if there was none

    def __str__(self) -> str:
        return f"{self.who}: {self.kind}: {self.reason}"


class Unhealthy(RuntimeError):
    """Work can't continue until a process is restarted, or a call failed with a transient error."""

    def __init__(self, faults: Sequence[Fault], *, suspect: str | None = None) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)
        self.suspect = suspect  # the sequence that failed while all processes are healthy

    @property
    def names(self) -> set[str]:
        return {fault.who for fault in self.faults}


class HealthMonitor:
    """Remembers when each process last answered."""

    def __init__(self, config: Supervision) -> None:
        self._config = config
        self._last_healthy_s: dict[str, float] = {}

    async def check(self, processes: Sequence[MonitoredProcess]) -> list[Fault]:
        """Check all processes concurrently. Takes at most ``health_timeout_s``."""
        found = await asyncio.gather(*map(self._check, processes))
        return [fault for fault in found if fault is not None]

    @asynccontextmanager
    async def watching(self, processes: Sequence[MonitoredProcess]) -> AsyncIterator["Guard"]:
        """Check the processes every few seconds until the block is left. Calls that are awaited through the guard fail
        as soon as a process is unhealthy.
        """
        checking = asyncio.create_task(self._until_one_is_unhealthy(processes))
        try:
            yield Guard(self, processes, checking)
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    async def explain(self, error: Exception, processes: Sequence[MonitoredProcess]) -> Unhealthy | None:
        """The unhealthy processes that explain the error, or None if all are healthy and the error is not transient.

        The first process in ``processes`` is the one that was called.
        """
        called, cause = processes[0].name, cause_of(error)
        faults = await self.check(processes)
        if not faults and isinstance(cause, _TRANSIENT):
            await asyncio.sleep(min(self._config.health_every_s, _KNOWN_AFTER_S))
            faults = await self.check(processes)
        if isinstance(error, RayError) and not isinstance(error, RayTaskError) and called not in _names(faults):
            faults.append(self._fault(_kind_of(error), called, _reason_of(error)))
        if faults:
            return Unhealthy(faults)
        if isinstance(cause, _TRANSIENT):
            suspect = cause.sequence_id if isinstance(cause, RolloutError) else None
            return Unhealthy([self._fault("failed", called, cause)], suspect=suspect)
        return None

    async def _until_one_is_unhealthy(self, processes: Sequence[MonitoredProcess]) -> list[Fault]:
        """Consumes the processes' health; waits between checks; stops when a check finds an unhealthy process."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            if faults := await self.check(processes):
                return faults

    async def _check(self, process: MonitoredProcess) -> Fault | None:
        timeout_s = self._config.health_timeout_s
        try:
            health = await within(timeout_s, process.health(), f"{process.name} to report its health")
        except WaitedTooLong:
            return self._fault("silent", process.name, f"no answer for {timeout_s:g} s")
        except RayError as error:
            return self._fault(_kind_of(error), process.name, _reason_of(error))
        if not health.is_ready:
            return self._fault("died", process.name, _ENDED)
        if health.failure is not None:
            return self._fault("died", process.name, health.failure)
        self._last_healthy_s[process.name] = time.monotonic() - health.still_s
        if health.num_busy and health.still_s > self._config.hang_timeout_s:
            reason = f"no progress for {health.still_s:.1f} s, with {health.num_busy} calls running"
            return self._fault("hung", process.name, reason)
        return None

    def _fault(self, kind: Kind, who: str, reason: object) -> Fault:
        last_healthy_s = self._last_healthy_s.get(who)
        return Fault(
            kind=kind,
            who=who,
            reason=one_line(reason),
            detected_s=None if last_healthy_s is None else time.monotonic() - last_healthy_s,
        )


class Guard:
    """Awaits work while its processes are checked. Created by ``HealthMonitor.watching``."""

    def __init__(
        self, monitor: HealthMonitor, processes: Sequence[MonitoredProcess], checking: "asyncio.Task[list[Fault]]"
    ) -> None:
        self._monitor = monitor
        self._processes = processes
        self._checking = checking

    async def __call__(self, work: Awaitable[T]) -> T:
        """The work's result. Raises Unhealthy for an unhealthy process or transient error, otherwise its own error."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._checking}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Unhealthy(self._checking.result())
            return working.result()
        except (Unhealthy, StopAsyncIteration):
            raise
        except Exception as error:
            if (unhealthy := await self._monitor.explain(error, self._processes)) is not None:
                raise unhealthy from error
            raise
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def cause_of(error: BaseException) -> BaseException:
    """The exception in the actor, if Ray wraps one."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def _kind_of(error: RayError) -> Kind:
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    return "died" if isinstance(error, RayActorError) else "failed"


def _reason_of(error: RayError) -> object:
    """Ray's own text only says that the process may have ended and that the call's outcome is unknown."""
    return _ENDED if isinstance(error, RayActorError) else error


def _names(faults: Sequence[Fault]) -> set[str]:
    return {fault.who for fault in faults}
