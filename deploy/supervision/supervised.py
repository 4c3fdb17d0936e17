"""The training loop's rollouts and learner, with recovery when a worker dies or hangs.

    SupervisedRollouts   an engine or the controller is unhealthy: restart it, send the weights, collect what is missing
    SupervisedLearner    a learner rank is unhealthy, its state is lost: raise LearnerLost; ``run`` resumes a checkpoint

Decides what is done for which worker, and which prompts are quarantined. ``workers`` replaces the processes;
``restarts`` limits how often that is tried before the run ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.config import Supervision
from common.errors import RunEnds
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.weights import WeightVersion
from deploy.supervision.health_monitor import Fault, HealthMonitor, MonitoredProcess, Unhealthy
from deploy.supervision.quarantine import Data, Quarantine
from deploy.supervision.restarts import RestartPolicy
from deploy.supervision.search import Search
from trainer.learner import StepReport
from trainer.loop import Learner, Rollouts
from trainer.probe_statistics import ProbeReport
from trainer.reports import Collected

T = TypeVar("T")


class StoredLearner(Learner, Protocol):
    """A learner that can be saved, for serving or resuming, and loaded again."""

    async def save(self, folder: Path) -> None: ...
    async def save_state(self, folder: Path) -> None: ...
    async def load_state(self, folder: Path) -> None: ...


class Workers(Protocol):
    """All processes of a run, and how to restart them. Implemented with Ray in ``workers``."""

    students_lack_weights: bool  # True from the restart of a student engine until it has the learner's weights

    @property
    def rollout_side(self) -> Sequence[MonitoredProcess]:
        """The controller, followed by the engines."""
        ...

    @property
    def ranks(self) -> Sequence[MonitoredProcess]: ...
    @property
    def students(self) -> Sequence[MonitoredProcess]: ...
    async def recover_rollouts(self, unhealthy: set[str]) -> None:
        """Restart the named processes of the rollout side, and make the others drop their calls."""
        ...

    async def restart_learner(self) -> None:
        """Restart all ranks. They then hold the run's initial weights."""
        ...

    async def connect(self) -> None:
        """Open the weight transfer between the ranks and the present student engines."""
        ...


class LearnerLost(RuntimeError):
    """A learner rank died or hangs, so model and optimizer are lost. They are restored from a checkpoint."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)


class SupervisedLearner:
    """The learner that the training loop uses. Every call raises LearnerLost if a rank died or hangs."""

    def __init__(
        self, learner: StoredLearner, *, workers: Workers, monitor: HealthMonitor, restarts: RestartPolicy
    ) -> None:
        self._learner = learner
        self._workers = workers
        self._monitor = monitor
        self._restarts = restarts
        self._lock = asyncio.Lock()  # allows one step, sync or new connection at a time
        self._version: WeightVersion = 0  # of the learner's weights, sent or about to be sent

    async def step(self, references: Sequence[Any]) -> StepReport:
        async with self._lock:
            report = await self._guarded(self._learner.step(references))
            self._version += 1
            return report

    async def sync(self, version: WeightVersion) -> None:
        """Send the weights. An unhealthy student engine is restarted first."""
        self._version = version
        try:
            async with self._lock:
                await self._reach_students(self._learner.sync(version))
        except Unhealthy as unhealthy:
            await self.recover_rollouts(unhealthy)
        self._restarts.step_finished(version)

    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        await self._guarded(self._learner.read_probe(texts, rows_of_engines))

    async def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        return await self._guarded(self._learner.check_probe(texts, rows_of_engines))

    async def save(self, folder: Path) -> None:
        await self._guarded(self._learner.save(folder))

    async def save_state(self, folder: Path) -> None:
        await self._guarded(self._learner.save_state(folder))

    async def load_state(self, folder: Path) -> None:
        await self._guarded(self._learner.load_state(folder))

    async def recover_rollouts(self, unhealthy: Unhealthy, *, counts: bool = True) -> None:
        """Restart the unhealthy processes of the rollout side, and send the learner's weights between two steps."""

        async def recover(faults: list[Fault]) -> None:
            await self._workers.recover_rollouts(unhealthy.names | await self._find_more(faults))
            if self._workers.students_lack_weights:
                async with self._lock:
                    await self._reach_students(self._workers.connect())
                    await self._reach_students(self._learner.sync(self._version))
                self._workers.students_lack_weights = False

        await self._restarts.run(unhealthy.faults, recover, what="rollouts recovered", counts=counts)

    async def recover_learner(self, lost: LearnerLost, load: Callable[[], Awaitable[WeightVersion]]) -> None:
        """Restart the learner and all other unhealthy processes, ``load`` the learner's state, and send the engines its
        weights. ``load`` returns their version.
        """

        async def recover(faults: list[Fault]) -> None:
            try:
                await self._workers.recover_rollouts(await self._find_more(faults))
                await self._workers.restart_learner()
                await self._reach_students(self._workers.connect())
                self._version = await load()
                await self._reach_students(self._learner.sync(self._version))
                self._workers.students_lack_weights = False
            except LearnerLost as again:
                raise Unhealthy(again.faults) from again

        await self._restarts.run(lost.faults, recover, what="learner recovered")

    async def _find_more(self, faults: list[Fault]) -> set[str]:
        """The names of unhealthy processes of the rollout side. Their new faults are added to ``faults``."""
        found = await self._monitor.check(self._workers.rollout_side)
        known = {fault.who for fault in faults}
        faults += [fault for fault in found if fault.who not in known]
        return {fault.who for fault in found}

    async def _reach_students(self, work: Awaitable[T]) -> T:
        """Raises Unhealthy if only student engines are unhealthy, LearnerLost if a rank is."""
        try:
            async with self._monitor.watching([*self._workers.ranks, *self._workers.students]) as guard:
                return await guard(work)
        except Unhealthy as unhealthy:
            if unhealthy.names <= {student.name for student in self._workers.students}:
                raise
            raise LearnerLost(unhealthy.faults) from unhealthy

    async def _guarded(self, work: Awaitable[T]) -> T:
        try:
            async with self._monitor.watching(self._workers.ranks) as guard:
                return await guard(work)
        except Unhealthy as unhealthy:
            raise LearnerLost(unhealthy.faults) from unhealthy


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    """A prompt that failed repeatedly. It is quarantined once another prompt has succeeded."""

    prompt: Prompt
    reason: str
    data: Data
    step: int | None


class SupervisedRollouts:
    """The rollouts that the training loop uses. After a restart, every call continues with what is missing."""

    def __init__(
        self,
        rollouts: Rollouts,
        *,
        learner: SupervisedLearner,
        workers: Workers,
        monitor: HealthMonitor,
        restarts: RestartPolicy,
        quarantine: Quarantine,
        config: Supervision,
    ) -> None:
        self._rollouts = rollouts
        self._learner = learner
        self._workers = workers
        self._monitor = monitor
        self._restarts = restarts
        self._quarantine = quarantine
        self._config = config
        self._suspects: list[_Suspect] = []  # since the last sequence that succeeded

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        done = list(kept)

        def ask(group: Sequence[Prompt]) -> AsyncGenerator[Collected, None]:
            return self._rollouts.collect(group, step, tuple(done))

        gathered = self._gather(prompts, ask, lambda item: item.sequence.sequence_id, data="data", step=step)
        async with aclosing(gathered) as items:
            async for item in items:
                done.append(item.sequence)
                yield item

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        async def ask(group: Sequence[Prompt]) -> AsyncGenerator[MixedSequence, None]:
            for sequence in await self._rollouts.evaluate(group):
                yield sequence

        prompts = self._quarantine.without_quarantined(prompts)
        gathered = self._gather(prompts, ask, lambda it: it.sequence_id, data="evaluation.data", step=None)
        async with aclosing(gathered) as sequences:
            return [sequence async for sequence in sequences]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        while True:
            try:
                async with self._monitor.watching(self._workers.rollout_side) as guard:
                    return await guard(self._rollouts.probe(texts))
            except Unhealthy as unhealthy:
                await self._learner.recover_rollouts(unhealthy)

    async def _gather(
        self,
        prompts: Sequence[Prompt],
        ask: Callable[[Sequence[Prompt]], AsyncGenerator[T, None]],
        id_of: Callable[[T], str],
        *,
        data: Data,
        step: int | None,
    ) -> AsyncGenerator[T, None]:
        """Consumes the rollouts' sequences; produces one item per prompt; waits for restarts; stops when every prompt
        has an item or is quarantined.

        A prompt is quarantined only if others succeed. Otherwise the engines may be at fault, and the run ends with
        RunEnds.
        """
        search = Search(prompts, max_failures=self._config.max_prompt_failures)
        num_done = num_failures = 0
        while (group := search.next_group()) is not None:
            try:
                async with AsyncExitStack() as stack:
                    guard = await stack.enter_async_context(self._monitor.watching(self._workers.rollout_side))
                    items = await stack.enter_async_context(aclosing(ask(group)))
                    while True:
                        try:
                            item = await guard(anext(items))
                        except StopAsyncIteration:
                            break
                        search.done(id_of(item))
                        num_done, num_failures = num_done + 1, 0
                        self._quarantine_suspects()
                        yield item
                search.succeeded()
            except Unhealthy as unhealthy:
                if unhealthy.suspect is None:
                    num_failures += 1
                    if num_failures > self._max_failures_in_a_row():
                        raise RunEnds(
                            f"no prompt succeeds any more: {num_failures} failures in a row, the last: {unhealthy}"
                        ) from unhealthy
                    await self._learner.recover_rollouts(unhealthy, counts=not search.is_narrowing)
                if (prompt := search.failed(unhealthy.suspect)) is not None:
                    self._suspects.append(_Suspect(prompt=prompt, reason=str(unhealthy), data=data, step=step))
                if len(self._suspects) > self._config.max_repairs:
                    raise RunEnds(
                        f"{len(self._suspects)} prompts in a row failed, the last one: {unhealthy}"
                    ) from unhealthy
        if num_done:
            self._quarantine_suspects()

    def _max_failures_in_a_row(self) -> int:
        """Maximum failures in a row that ``max_repairs`` bad prompts can cause. Their group fails twice, then each bad
        prompt alone and the rest together in turn, and finally each alone until it is quarantined.
        """
        return 1 + self._config.max_repairs * (self._config.max_prompt_failures + 1)

    def _quarantine_suspects(self) -> None:
        for each in self._suspects:
            self._quarantine.add(each.prompt, data=each.data, step=each.step, reason=each.reason)
            self._restarts.count_quarantined()
        self._suspects.clear()
