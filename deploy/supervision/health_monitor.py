"""Who of a run is ill: asks its processes how they are while their work is waited for, and explains errors by that.

Knows how Ray says that a process is gone. What is done about it is ``supervision``'s.
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
from rollout_server.controller import RolloutError
from rollout_server.engines.protocol import EngineCallError
from trainer.actors import LearnerRankDied

T = TypeVar("T")
Kind = Literal["died", "silent", "hung", "failed", "out_of_memory"]

_PASSING = (RayError, WaitedTooLong, EngineCallError, RolloutError, LearnerRankDied)
"""What may go well at the next try. Any other error of a call, where nobody is ill, is a fault of the program."""

_KNOWN_AFTER_S = 1.0
"""A process that has ended may be known to have a moment after the calls that it took with it."""

_ENDED = "its process has ended"


class Member(Protocol):
    """One process of a run."""

    @property
    def name(self) -> str: ...
    async def health(self) -> Health:
        """Raises RayError where the process is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that went wrong."""

    kind: Kind
    who: str  # the member's name
    reason: str  # one line
    detected_s: float | None  # since the last sign of life; None where there was none before

    def __str__(self) -> str:
        return f"{self.who}: {self.kind}: {self.reason}"


class Ill(RuntimeError):
    """Work can't go on before somebody is mended, or did fail in passing."""

    def __init__(self, faults: Sequence[Fault], *, suspect: str | None = None) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)
        self.suspect = suspect  # the sequence that failed while everybody is well

    @property
    def names(self) -> set[str]:
        return {fault.who for fault in self.faults}


class Watch:
    """Remembers when each member was last heard."""

    def __init__(self, config: Supervision) -> None:
        self._config = config
        self._heard_s: dict[str, float] = {}

    async def look(self, members: Sequence[Member]) -> list[Fault]:
        """Ask all at once. Takes ``health_timeout_s`` at most."""
        found = await asyncio.gather(*map(self._ask, members))
        return [fault for fault in found if fault is not None]

    @asynccontextmanager
    async def over(self, members: Sequence[Member]) -> AsyncIterator["Guard"]:
        """Look at the members every few seconds until the block is left; what is awaited in it through the guard fails
        as soon as one is ill.
        """
        looking = asyncio.create_task(self._until_one_is_ill(members))
        try:
            yield Guard(self, members, looking)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def explain(self, error: Exception, members: Sequence[Member]) -> Ill | None:
        """Who is ill that the members' work failed so. None where nobody is and the error is no passing one.

        The first member is the one that was called.
        """
        called, cause = members[0].name, cause_of(error)
        faults = await self.look(members)
        if not faults and isinstance(cause, _PASSING):
            await asyncio.sleep(min(self._config.health_every_s, _KNOWN_AFTER_S))
            faults = await self.look(members)
        if isinstance(error, RayError) and not isinstance(error, RayTaskError) and called not in _names(faults):
            faults.append(self._fault(_kind_of(error), called, _reason_of(error)))
        if faults:
            return Ill(faults)
        if isinstance(cause, _PASSING):
            suspect = cause.sequence_id if isinstance(cause, RolloutError) else None
            return Ill([self._fault("failed", called, cause)], suspect=suspect)
        return None

    async def _until_one_is_ill(self, members: Sequence[Member]) -> list[Fault]:
        """Consumes the members' answers; waits between two looks; stops at the first that finds somebody ill."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            if faults := await self.look(members):
                return faults

    async def _ask(self, member: Member) -> Fault | None:
        timeout_s = self._config.health_timeout_s
        try:
            health = await within(timeout_s, member.health(), f"{member.name} to say how it is")
        except WaitedTooLong:
            return self._fault("silent", member.name, f"no answer for {timeout_s:g} s")
        except RayError as error:
            return self._fault(_kind_of(error), member.name, _reason_of(error))
        if not health.is_ready:
            return self._fault("died", member.name, _ENDED)
        if health.failure is not None:
            return self._fault("died", member.name, health.failure)
        self._heard_s[member.name] = time.monotonic() - health.still_s
        if health.num_busy and health.still_s > self._config.hang_timeout_s:
            reason = f"nothing has moved for {health.still_s:.1f} s, with {health.num_busy} calls under way"
            return self._fault("hung", member.name, reason)
        return None

    def _fault(self, kind: Kind, who: str, reason: object) -> Fault:
        heard_s = self._heard_s.get(who)
        return Fault(
            kind=kind,
            who=who,
            reason=one_line(reason),
            detected_s=None if heard_s is None else time.monotonic() - heard_s,
        )


class Guard:
    """Awaits work beside a look at its members. Made by ``Watch.over``."""

    def __init__(self, watch: Watch, members: Sequence[Member], looking: "asyncio.Task[list[Fault]]") -> None:
        self._watch = watch
        self._members = members
        self._looking = looking

    async def __call__(self, work: Awaitable[T]) -> T:
        """The work's result. Raises Ill when a member is, or the work failed in passing; else the work's own error."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._looking}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Ill(self._looking.result())
            return working.result()
        except (Ill, StopAsyncIteration):
            raise
        except Exception as error:
            if (ill := await self._watch.explain(error, self._members)) is not None:
                raise ill from error
            raise
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def cause_of(error: BaseException) -> BaseException:
    """What an actor raised, where Ray brings it."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def _kind_of(error: RayError) -> Kind:
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    return "died" if isinstance(error, RayActorError) else "failed"


def _reason_of(error: RayError) -> object:
    """Ray says that it may have ended, and that it does not know what became of the call."""
    return _ENDED if isinstance(error, RayActorError) else error


def _names(faults: Sequence[Fault]) -> set[str]:
    return {fault.who for fault in faults}
