"""The processes of a run, and how they are killed and restarted. Ray starts a new process after one has ended.

Handles stay valid for the whole run: Ray restarts an actor in its bundle, and moves the bundle to another node if its
own is lost. A new process has no state until it is started like the first one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from common.errors import RunEnds
from common.health import Health
from common.waiting import WaitedTooLong, within

T = TypeVar("T")

_ASK_S = 2.0  # time-out for a process that may be dead or new
_ASK_AGAIN_S = 0.2


@dataclass(slots=True, kw_only=True)
class Process:
    """One actor. Its operating-system process may change."""

    name: str
    handle: ActorHandle
    start: Callable[[], Awaitable[Any]] | None = None  # makes a new process ready; None if the constructor does
    bundle: int | None = None  # of the placement group; processes in one bundle share its GPU
    health_options: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None  # of the process that answered last

    async def health(self) -> Health:
        health = await self._ask()
        if self.pid is None:
            self.pid = health.pid
        return health

    async def replace(self, timeout_s: float) -> None:
        """Return once Ray has replaced the process. Raises WaitedTooLong.

        A process that is dead already is not killed again, because that might kill its successor.
        """
        deadline_s, is_killed = time.monotonic() + timeout_s, False
        while True:
            try:
                pid = (await within(_ASK_S, self._ask(), "an answer")).pid
                if pid != self.pid and (self.pid is not None or is_killed):
                    self.pid = pid
                    return
                self.pid, is_there = pid, True
            except RayActorError:
                is_there = False
            except WaitedTooLong:
                is_there = True  # probably stopped
            if is_there and not is_killed:
                ray.kill(self.handle, no_restart=False)
                is_killed = True
            if time.monotonic() > deadline_s:
                raise WaitedTooLong(f"waited {timeout_s:g} s for a new process of the {self.name}")
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _ask(self) -> Health:
        health: Health = await self.handle.health.options(**self.health_options).remote()
        return health


def in_turn(
    processes: Sequence[Process], start: Callable[[Process], Awaitable[T]]
) -> list[Coroutine[Any, Any, dict[str, T]]]:
    """Calls that ``start`` all processes, to be awaited concurrently. Each returns its processes' replies by name. The
    processes that share a GPU are in one call, which starts them one after another in the given order, because an
    engine measures the free memory when it starts. The call fails with its first error.
    """
    groups: dict[object, list[Process]] = {}
    for process in processes:
        groups.setdefault(process.name if process.bundle is None else process.bundle, []).append(process)

    async def one_after_the_other(group: Sequence[Process]) -> dict[str, T]:
        return {process.name: await start(process) for process in group}

    return [one_after_the_other(group) for group in groups.values()]


class RunWorkers:
    """All processes of one run. See ``supervised.Workers``."""

    def __init__(
        self,
        *,
        students: Sequence[Process],
        teachers: Sequence[Process],
        controller: Process,
        ranks: Sequence[Process],
        start_learner: Callable[[], Awaitable[object]],
        connect: Callable[[], Awaitable[object]],
        students_share_a_group: bool,
        placement_timeout_s: float,
        call_timeout_s: float,
        shortage: Callable[[], str | None],
    ) -> None:
        """``students_share_a_group``: student engines and learner form one NCCL group, so that no student engine can be
        replaced alone. ``shortage`` returns why Ray can't place a new process, or None.
        """
        self.students = students
        self.teachers = teachers
        self.controller = controller
        self.ranks = ranks
        self.students_lack_weights = False
        self._start_learner = start_learner
        self._connect = connect
        self._students_share_a_group = students_share_a_group
        self._placement_timeout_s = placement_timeout_s
        self._call_timeout_s = call_timeout_s
        self._shortage = shortage

    @property
    def rollout_side(self) -> list[Process]:
        return [self.controller, *self.students, *self.teachers]

    async def process_ids(self) -> dict[str, int]:
        """All process ids, which distinguish a process from its successor."""
        processes = [*self.rollout_side, *self.ranks]
        calls = [within(self._call_timeout_s, process.health(), f"{process.name} to answer") for process in processes]
        answers = await asyncio.gather(*calls)
        return {process.name: health.pid for process, health in zip(processes, answers, strict=True)}

    async def recover_rollouts(self, unhealthy: set[str]) -> None:
        if self._students_share_a_group and any(student.name in unhealthy for student in self.students):
            unhealthy = unhealthy | {student.name for student in self.students}
        self.students_lack_weights |= any(student.name in unhealthy for student in self.students)
        await _all(in_turn([process for process in self.rollout_side if process.name in unhealthy], self._restart))
        if self.controller.name not in unhealthy and self.controller.start is not None:
            await self.controller.start()
        healthy = [engine for engine in (*self.students, *self.teachers) if engine.name not in unhealthy]
        calls = (engine.handle.drop_calls.remote() for engine in healthy)
        await _all(within(self._call_timeout_s, call, "an engine to drop its calls") for call in calls)

    async def restart_learner(self) -> None:
        if self._students_share_a_group:
            await _all(in_turn(self.students, self._restart))
        await _all(map(self._replace, self.ranks))
        await self._start_learner()

    async def connect(self) -> None:
        await self._connect()

    async def _restart(self, process: Process) -> None:
        await self._replace(process)
        if process.start is not None:
            await process.start()

    async def _replace(self, process: Process) -> None:
        try:
            await process.replace(self._placement_timeout_s)
        except WaitedTooLong as error:
            if (shortage := self._shortage()) is not None:
                raise RunEnds(
                    f"placement: {error}: {shortage}; add nodes, or raise placement.timeout_s, and resume"
                ) from error
            raise


async def _all(calls: Iterable[Awaitable[object]]) -> None:
    """Wait for all calls, then raise the first error."""
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer
