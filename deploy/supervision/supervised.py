"""A run that goes on when a part of it dies or hangs: rollouts and learner as the loop sees them, mended underneath.

    SupervisedRollouts   an engine or the controller is ill: mend it, bring it the weights, ask for what is missing
    SupervisedLearner    the learner is ill, its state lost: raises LearnerLost; ``steps`` goes on from a checkpoint

Owns what is done about whom, and which prompts the run goes on without. How a process is ended and started is
``staff``'s; how often that is tried, and when the run gives up, is ``repairs``'.
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
from deploy.supervision.bisection import Search
from deploy.supervision.health_monitor import Fault, Ill, Member, Watch
from deploy.supervision.quarantine import Data, SetAside
from deploy.supervision.restarts import Repairs
from trainer.learner import StepReport
from trainer.loop import Learner, Rollouts
from trainer.probe_statistics import ProbeReport
from trainer.reports import Collected

T = TypeVar("T")


class StoredLearner(Learner, Protocol):
    """A learner that can be stored, to be served or to go on from, and brought back."""

    async def save(self, folder: Path) -> None: ...
    async def save_state(self, folder: Path) -> None: ...
    async def load_state(self, folder: Path) -> None: ...


class Staff(Protocol):
    """Everyone who works on a run, and how they are mended. Defined here, implemented over Ray by ``staff``."""

    students_lack_weights: bool  # True from a student engine's new start until its user says otherwise

    @property
    def rollout_side(self) -> Sequence[Member]:
        """The controller, then the engines."""
        ...

    @property
    def ranks(self) -> Sequence[Member]: ...
    @property
    def students(self) -> Sequence[Member]: ...
    async def mend_rollouts(self, ill: set[str]) -> None:
        """Start anew whoever of the rollout side is named, and have the rest forget them."""
        ...

    async def restart_learner(self) -> None:
        """All ranks, which then hold what the run began with."""
        ...

    async def connect(self) -> None:
        """Open the weight transfer between the ranks and the student engines that there are now."""
        ...


class LearnerLost(RuntimeError):
    """A rank of the learner is gone or hangs, and with it model and optimizer: a checkpoint has them."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)


class SupervisedLearner:
    """The loop's learner. Raises LearnerLost from every call that a rank's end or silence has ended."""

    def __init__(self, learner: StoredLearner, *, staff: Staff, watch: Watch, repairs: Repairs) -> None:
        self._learner = learner
        self._staff = staff
        self._watch = watch
        self._repairs = repairs
        self._turn = asyncio.Lock()  # a step, a sync or a new connection at a time
        self._version: WeightVersion = 0  # that the learner's weights have, or will be sent under

    async def step(self, references: Sequence[Any]) -> StepReport:
        async with self._turn:
            report = await self._guarded(self._learner.step(references))
            self._version += 1
            return report

    async def sync(self, version: WeightVersion) -> None:
        """A student engine that is ill is mended, which brings it the weights."""
        self._version = version
        try:
            async with self._turn:
                await self._to_students(self._learner.sync(version))
        except Ill as ill:
            await self.mend_rollouts(ill)
        self._repairs.step_finished(version)

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

    async def mend_rollouts(self, ill: Ill, *, counts: bool = True) -> None:
        """Bring the rollout side back, with the weights that the learner holds when no step of it is under way."""

        async def cure(faults: list[Fault]) -> None:
            await self._staff.mend_rollouts(ill.names | await self._look_for_more(faults))
            if self._staff.students_lack_weights:
                async with self._turn:
                    await self._to_students(self._staff.connect())
                    await self._to_students(self._learner.sync(self._version))
                self._staff.students_lack_weights = False

        await self._repairs.make(ill.faults, cure, what="the rollouts go on", counts=counts)

    async def bring_back(self, lost: LearnerLost, load: Callable[[], Awaitable[WeightVersion]]) -> None:
        """Start the learner anew, and whoever else is ill; ``load`` its state, which says the weights' version; bring
        them to the engines.
        """

        async def cure(faults: list[Fault]) -> None:
            try:
                await self._staff.mend_rollouts(await self._look_for_more(faults))
                await self._staff.restart_learner()
                await self._to_students(self._staff.connect())
                self._version = await load()
                await self._to_students(self._learner.sync(self._version))
                self._staff.students_lack_weights = False
            except LearnerLost as again:
                raise Ill(again.faults) from again

        await self._repairs.make(lost.faults, cure, what="the learner goes on")

    async def _look_for_more(self, faults: list[Fault]) -> set[str]:
        """Who of the rollout side is ill now; faults that are new are added."""
        found = await self._watch.look(self._staff.rollout_side)
        known = {fault.who for fault in faults}
        faults += [fault for fault in found if fault.who not in known]
        return {fault.who for fault in found}

    async def _to_students(self, work: Awaitable[T]) -> T:
        """Raises Ill where it is student engines alone that are."""
        try:
            async with self._watch.over([*self._staff.ranks, *self._staff.students]) as guard:
                return await guard(work)
        except Ill as ill:
            if ill.names <= {student.name for student in self._staff.students}:
                raise
            raise LearnerLost(ill.faults) from ill

    async def _guarded(self, work: Awaitable[T]) -> T:
        try:
            async with self._watch.over(self._staff.ranks) as guard:
                return await guard(work)
        except Ill as ill:
            raise LearnerLost(ill.faults) from ill


@dataclass(frozen=True, slots=True, kw_only=True)
class _GivenUp:
    """A prompt that failed again and again, and is set aside once another has been written."""

    prompt: Prompt
    reason: str
    data: Data
    step: int | None


class SupervisedRollouts:
    """The loop's rollouts. Every call goes on, from what has come, after a repair."""

    def __init__(
        self,
        rollouts: Rollouts,
        *,
        learner: SupervisedLearner,
        staff: Staff,
        watch: Watch,
        repairs: Repairs,
        set_aside: SetAside,
        config: Supervision,
    ) -> None:
        self._rollouts = rollouts
        self._learner = learner
        self._staff = staff
        self._watch = watch
        self._repairs = repairs
        self._set_aside = set_aside
        self._config = config
        self._given_up: list[_GivenUp] = []  # since the last sequence that came

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        come = list(kept)

        def ask(group: Sequence[Prompt]) -> AsyncGenerator[Collected, None]:
            return self._rollouts.collect(group, step, tuple(come))

        gathered = self._gather(prompts, ask, lambda item: item.sequence.sequence_id, data="data", step=step)
        async with aclosing(gathered) as items:
            async for item in items:
                come.append(item.sequence)
                yield item

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        async def ask(group: Sequence[Prompt]) -> AsyncGenerator[MixedSequence, None]:
            for sequence in await self._rollouts.evaluate(group):
                yield sequence

        prompts = self._set_aside.sift_held_out(prompts)
        gathered = self._gather(prompts, ask, lambda it: it.sequence_id, data="evaluation.data", step=None)
        async with aclosing(gathered) as sequences:
            return [sequence async for sequence in sequences]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        while True:
            try:
                async with self._watch.over(self._staff.rollout_side) as guard:
                    return await guard(self._rollouts.probe(texts))
            except Ill as ill:
                await self._learner.mend_rollouts(ill)

    async def _gather(
        self,
        prompts: Sequence[Prompt],
        ask: Callable[[Sequence[Prompt]], AsyncGenerator[T, None]],
        id_of: Callable[[T], str],
        *,
        data: Data,
        step: int | None,
    ) -> AsyncGenerator[T, None]:
        """Consumes what the rollouts write; produces each prompt's once; waits for repairs; stops when all have come
        but those that are set aside.

        A prompt is set aside only where others are written: it may be the engines that write nothing any more. Then
        the run ends. Raises RunEnds.
        """
        search = Search(prompts, max_failures=self._config.max_prompt_failures)
        num_come = num_in_vain = 0
        while (group := search.next_group()) is not None:
            try:
                async with AsyncExitStack() as stack:
                    guard = await stack.enter_async_context(self._watch.over(self._staff.rollout_side))
                    items = await stack.enter_async_context(aclosing(ask(group)))
                    while True:
                        try:
                            item = await guard(anext(items))
                        except StopAsyncIteration:
                            break
                        search.came(id_of(item))
                        num_come, num_in_vain = num_come + 1, 0
                        self._set_given_up_aside()
                        yield item
                search.succeeded()
            except Ill as ill:
                if ill.suspect is None:
                    num_in_vain += 1
                    if num_in_vain > self._most_in_vain(len(prompts)):
                        raise RunEnds(
                            f"no prompt can be written any more: {num_in_vain} failures without one, the last: {ill}"
                        ) from ill
                    await self._learner.mend_rollouts(ill, counts=not search.is_narrowing)
                if (prompt := search.failed(ill.suspect)) is not None:
                    self._given_up.append(_GivenUp(prompt=prompt, reason=str(ill), data=data, step=step))
                if len(self._given_up) > self._config.max_repairs:
                    raise RunEnds(
                        f"{len(self._given_up)} prompts one after the other could not be written, the last for: {ill}"
                    ) from ill
        if num_come:
            self._set_given_up_aside()

    def _most_in_vain(self, num_prompts: int) -> int:
        """Failures without a sequence in between that some bad prompts among so many may cause: the search halves its
        groups down to the first of them, where others may stand beside it, and asks for each alone again and again.
        """
        config = self._config
        return 2 * num_prompts.bit_length() + config.max_repairs * config.max_prompt_failures

    def _set_given_up_aside(self) -> None:
        for each in self._given_up:
            self._set_aside.add(each.prompt, data=each.data, step=each.step, reason=each.reason)
            self._repairs.set_aside()
        self._given_up.clear()
