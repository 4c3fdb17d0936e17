"""Supervision over stand-ins: who is found unhealthy, what is done about it, what is told, and when a run gives up."""

import asyncio
import errno
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayTaskError

from common.config import Supervision
from common.errors import RunEnds
from common.health import Health
from common.run_dir import RunDir
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.waiting import WaitedTooLong
from deploy.supervision.fatal_errors import clear_end
from deploy.supervision.health_monitor import HealthMonitor, Unhealthy
from deploy.supervision.quarantine import Quarantine
from deploy.supervision.restarts import RestartPolicy
from deploy.supervision.supervised import LearnerLost, SupervisedLearner, SupervisedRollouts
from rollout_server.engines.protocol import EngineCallError
from rollout_server.pool import RolloutError
from trainer.actors import LearnerRankDied
from trainer.loop import StaleSequences
from trainer.probe import WeightSyncError

CONFIG = Supervision(
    health_every_s=0.02, health_timeout_s=0.2, hang_timeout_s=10.0, backoff_first_s=0.01, backoff_last_s=0.02
)
GONE = ActorUnavailableError("the process is gone", None)


@dataclass
class MonitoredProcess:
    name: str
    answer: Health | Exception | None = field(default_factory=lambda: Health(pid=1))  # None: no answer comes

    async def health(self) -> Health:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer


@dataclass
class Item:
    sequence: MixedSequence

    @property
    def reference(self) -> str:
        return f"reference of {self.sequence.sequence_id}"


class House:
    """Workers, rollouts and learner in one, so that the order of all calls is kept."""

    def __init__(self, make_sequence: Callable[..., MixedSequence]) -> None:
        self.calls: list[str] = []
        self.controller, self.student, self.teacher = (
            MonitoredProcess("controller"),
            MonitoredProcess("student engine"),
            MonitoredProcess("teacher"),
        )
        self.rank = MonitoredProcess("learner")
        self.rollout_side = [self.controller, self.student, self.teacher]
        self.ranks, self.students = [self.rank], [self.student]
        self.poison: set[str] = set()  # prompts that end the student's process
        self.on_sequence: Callable[[int], None] = lambda number: None  # called before each that comes
        self.step_gate = asyncio.Event()
        self.step_gate.set()
        self.num_come = 0
        self.students_lack_weights = False
        self.fails_to_mend = self.fails_to_restart = 0  # so many times
        self.kept: list[list[str]] = []
        self._make_sequence = make_sequence

    async def recover_rollouts(self, unhealthy: set[str]) -> None:
        self.calls.append(f"mend {', '.join(sorted(unhealthy))}")
        for process in self.rollout_side:
            process.answer = Health(pid=1)
        self.students_lack_weights |= "student engine" in unhealthy
        if self.fails_to_mend:
            self.fails_to_mend -= 1
            raise WaitedTooLong("waited 1 s for the teacher to start")

    async def restart_learner(self) -> None:
        self.calls.append("restart learner")
        self.rank.answer = Health(pid=1)
        if self.fails_to_restart:
            self.fails_to_restart -= 1
            raise LearnerRankDied("learner rank 0 died while it was waited for the learner to start")

    async def connect(self) -> None:
        self.calls.append("connect")

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Item, None]:
        self.calls.append(f"collect {len(prompts)}")
        self.kept.append([sequence.prompt.prompt_id for sequence in kept])
        for prompt in prompts:
            self.num_come += 1
            self.on_sequence(self.num_come)
            if prompt.prompt_id in self.poison:
                self.student.answer = GONE
            if self.student.answer is GONE:
                raise RolloutError(prompt.sequence_id, "EngineCallError: student engine: gone")
            await asyncio.sleep(0)
            yield Item(self._make_sequence(prompt_id=prompt.prompt_id))

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        self.calls.append(f"evaluate {len(prompts)}")
        if self.poison & {prompt.prompt_id for prompt in prompts}:
            self.student.answer = GONE
            raise RolloutError("whichever", "EngineCallError: student engine: gone")
        return [self._make_sequence(prompt_id=prompt.prompt_id) for prompt in prompts]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        self.calls.append("probe")
        return []

    async def step(self, references: Sequence[Any]) -> Any:
        self.calls.append("step")
        await self.step_gate.wait()
        self._rank_answers()
        return "report"

    async def sync(self, version: int) -> None:
        self.calls.append(f"sync {version}")
        self._rank_answers()
        if self.student.answer is GONE:
            raise EngineCallError("student engine: a weight update failed")

    def _rank_answers(self) -> None:
        if isinstance(self.rank.answer, Exception):
            raise self.rank.answer

    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None: ...
    async def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> Any: ...
    async def save(self, folder: Path) -> None: ...
    async def save_state(self, folder: Path) -> None: ...
    async def load_state(self, folder: Path) -> None: ...


class Prompts:
    def __init__(self) -> None:
        self.left_out: list[tuple[str, int]] = []

    def leave_out(self, prompt_id: str, sample_index: int) -> None:
        self.left_out.append((prompt_id, sample_index))


@dataclass
class Supervised:
    house: House
    learner: SupervisedLearner
    rollouts: SupervisedRollouts
    folder: RunDir
    prompts: Prompts

    async def collect(self, number: int, step: int = 1) -> list[str]:
        wanted = [Prompt(prompt_id=f"p{n}", token_ids=np.array([n], np.int32), seed=n) for n in range(number)]
        return [item.sequence.prompt.prompt_id async for item in self.rollouts.collect(wanted, step)]


def supervise(house: House, folder: Path, config: Supervision = CONFIG) -> Supervised:
    run_dir, prompts, monitor = RunDir(folder), Prompts(), HealthMonitor(config)
    restarts = RestartPolicy(config, run_dir)
    learner = SupervisedLearner(house, workers=house, monitor=monitor, restarts=restarts)
    rollouts = SupervisedRollouts(
        house,
        learner=learner,
        workers=house,
        monitor=monitor,
        restarts=restarts,
        quarantine=Quarantine(run_dir, prompts),
        config=config,
    )
    return Supervised(house, learner, rollouts, run_dir, prompts)


@pytest.fixture
def house(make_mixed_sequence) -> House:
    return House(make_mixed_sequence)


@pytest.fixture
def supervised(house: House, tmp_path: Path) -> Supervised:
    return supervise(house, tmp_path)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (GONE, "died"),
        (OutOfMemoryError("the node runs low on memory"), "out_of_memory"),
        (None, "silent"),
        (Health(pid=2, is_ready=False), "died"),
        (Health(pid=1, failure="vLLM's engine process is dead"), "died"),
        (Health(pid=1, num_busy=3, still_s=11.0), "hung"),
    ],
)
async def test_what_a_process_answers_or_does_not_answer_is_a_fault_of_its_kind(answer, kind) -> None:
    (fault,) = await HealthMonitor(CONFIG).check([MonitoredProcess("well"), MonitoredProcess("learner", answer)])
    assert (fault.kind, fault.who) == (kind, "learner")


async def test_an_engine_that_works_or_is_idle_is_healthy() -> None:
    answers = [Health(pid=1, num_busy=3, still_s=9.0), Health(pid=1, num_busy=0, still_s=99.0)]
    assert await HealthMonitor(CONFIG).check([MonitoredProcess("a", answer) for answer in answers]) == []


async def test_how_long_it_took_to_notice_counts_from_the_last_sign_of_life() -> None:
    monitor, process = HealthMonitor(CONFIG), MonitoredProcess("learner")
    assert await monitor.check([process]) == []
    await asyncio.sleep(0.1)
    process.answer = GONE
    (fault,) = await monitor.check([process])
    assert fault.detected_s == pytest.approx(0.1, abs=0.08)


async def test_a_process_not_known_to_have_died_yet_is_checked_again() -> None:
    learner, student = MonitoredProcess("learner"), MonitoredProcess("student engine")
    asyncio.get_running_loop().call_later(0.01, setattr, student, "answer", GONE)
    unhealthy = await HealthMonitor(CONFIG).explain(
        EngineCallError("student engine: a weight update failed"), [learner, student]
    )
    assert unhealthy is not None
    assert unhealthy.names == {"student engine"}


async def test_an_engine_that_dies_is_mended_gets_the_weights_and_only_what_is_missing_is_written_again(
    supervised: Supervised,
) -> None:
    house = supervised.house

    def die(number: int) -> None:
        if number == 4:
            house.student.answer = GONE

    house.on_sequence = die
    assert await supervised.collect(6) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert house.calls == ["collect 6", "mend student engine", "connect", "sync 0", "collect 3"]
    assert house.kept[-1] == ["p0", "p1", "p2"]
    (fault,) = supervised.folder.read_faults()
    assert (fault["kind"], fault["who"]) == ("died", "student engine")
    assert fault["recovered_s"] > 0.0
    assert supervised.folder.read_set_aside() == []


async def test_weights_are_brought_though_the_repair_failed_after_the_student_had_been_started(
    supervised: Supervised,
) -> None:
    """Found unhealthy at the first try only: the fault was the teacher's."""
    house = supervised.house

    def die(number: int) -> None:
        if number == 1:
            house.teacher.answer = Health(pid=1, failure="dead")
            house.fails_to_mend = 1
            raise RolloutError("p0.0.0", "EngineCallError: teacher: dead")

    house.on_sequence = die
    mend = house.recover_rollouts

    async def mend_more(unhealthy: set[str]) -> None:
        await mend(unhealthy | ({"student engine"} if house.fails_to_mend else set()))

    house.recover_rollouts = mend_more  # type: ignore[method-assign]
    assert len(await supervised.collect(2)) == 2
    assert house.calls == [
        "collect 2",
        "mend student engine, teacher",
        "mend teacher",
        "connect",
        "sync 0",
        "collect 2",
    ]


async def test_a_member_that_hangs_interrupts_work_that_would_wait_for_ever(supervised: Supervised) -> None:
    house = supervised.house
    house.teacher.answer = Health(pid=1, num_busy=1, still_s=11.0)
    waits = asyncio.Event()

    async def collect(prompts: Sequence[Prompt], step: int, kept: Sequence[Any] = ()) -> AsyncGenerator[Any, None]:
        if house.teacher.answer != Health(pid=1):
            await waits.wait()
        async for item in House.collect(house, prompts, step, kept):
            yield item

    house.collect = collect  # type: ignore[method-assign]
    assert len(await asyncio.wait_for(supervised.collect(2), 5.0)) == 2
    assert house.calls == ["mend teacher", "collect 2"]
    assert supervised.folder.read_faults()[0]["kind"] == "hung"


async def test_new_weights_wait_for_the_step_under_way_and_have_its_version(supervised: Supervised) -> None:
    house = supervised.house
    await supervised.learner.sync(4)
    house.step_gate.clear()
    step = asyncio.create_task(supervised.learner.step([]))
    house.student.answer = GONE
    collecting = asyncio.create_task(supervised.collect(2))
    await asyncio.sleep(0.1)
    assert house.calls[-1] == "mend student engine"
    house.step_gate.set()
    await asyncio.wait_for(asyncio.gather(step, collecting), 5.0)
    assert house.calls[-3:] == ["connect", "sync 5", "collect 2"]


async def test_a_student_engine_that_dies_in_a_sync_is_mended_and_gets_that_version(supervised: Supervised) -> None:
    supervised.house.student.answer = GONE
    await supervised.learner.sync(3)
    assert supervised.house.calls == ["sync 3", "mend student engine", "connect", "sync 3"]


@pytest.mark.parametrize("call", ["step", "sync", "save"])
async def test_a_learner_that_dies_is_lost_whatever_it_was_asked(supervised: Supervised, call: str) -> None:
    supervised.house.rank.answer = GONE
    supervised.house.step_gate.clear()
    supervised.house.save = supervised.house.sync = supervised.house.step  # type: ignore[method-assign,assignment]
    with pytest.raises(LearnerLost, match="learner: died"):
        await asyncio.wait_for(getattr(supervised.learner, call)([]), 5.0)


async def test_a_lost_learner_is_restarted_loaded_and_its_weights_go_to_the_engines(supervised: Supervised) -> None:
    house = supervised.house
    house.rank.answer = house.teacher.answer = GONE

    async def load() -> int:
        house.calls.append("load")
        return 20

    with pytest.raises(LearnerLost) as lost:
        await supervised.learner.sync(23)
    await supervised.learner.recover_learner(lost.value, load)
    assert house.calls == ["sync 23", "mend teacher", "restart learner", "connect", "load", "sync 20"]
    assert [(fault["who"], fault["kind"]) for fault in supervised.folder.read_faults()] == [
        ("learner", "died"),
        ("teacher", "died"),
    ]


async def test_a_prompt_that_ends_an_engine_every_time_is_set_aside_and_all_others_come(
    supervised: Supervised,
) -> None:
    supervised.house.poison = {"p11"}
    come = await supervised.collect(64, step=7)
    assert sorted(come) == sorted({f"p{n}" for n in range(64)} - {"p11"})
    assert (supervised.house.calls[-1], supervised.house.kept[-1]) == ("collect 0", come), "the trace holds all"
    (line,) = supervised.folder.read_set_aside()
    assert (line["prompt_id"], line["sample_index"], line["step"], line["data"]) == ("p11", 0, 7, "data")
    assert "student engine: died" in line["reason"]
    assert supervised.prompts.left_out == [("p11", 0)]


async def test_held_out_prompts_are_set_aside_apart_and_not_asked_for_again(supervised: Supervised) -> None:
    supervised.house.poison = {"p1"}
    wanted = [Prompt(prompt_id=f"p{n}", token_ids=np.array([n], np.int32), seed=n) for n in range(4)]
    for _ in range(2):
        assert len(await supervised.rollouts.evaluate(wanted)) == 3
    assert supervised.prompts.left_out == []
    assert [line["data"] for line in supervised.folder.read_set_aside()] == ["evaluation.data"]
    assert supervised.house.calls[-1] == "evaluate 3"


async def test_engines_that_write_nothing_any_more_set_no_prompt_aside_and_end_the_run(supervised: Supervised) -> None:
    supervised.house.poison = {f"p{n}" for n in range(64)}
    with pytest.raises(RunEnds, match=r"no prompt succeeds any more: 17 failures in a row, the last: student"):
        await supervised.collect(64)
    assert supervised.folder.read_set_aside() == []
    assert len(supervised.folder.read_faults()) == 16, "an hour of repairs that help nobody is no search"


async def test_steps_in_which_nothing_is_written_set_no_prompt_aside_until_something_is(supervised: Supervised) -> None:
    supervised.house.poison = {"p0", "p1"}
    assert await supervised.collect(2, 1) == []
    await supervised.learner.sync(1)
    assert supervised.folder.read_set_aside() == []
    assert await supervised.collect(3, 2) == ["p2"]
    lines = [(line["prompt_id"], line["step"]) for line in supervised.folder.read_set_aside()]
    assert sorted(lines[:2]) == [("p0", 1), ("p1", 1)]


async def test_engines_that_write_nothing_in_step_after_step_end_the_run(supervised: Supervised) -> None:
    supervised.house.poison = {"p0", "p1"}
    for step in (1, 2):
        assert await supervised.collect(2, step) == []
        await supervised.learner.sync(step)
    with pytest.raises(RunEnds, match="6 prompts in a row failed"):
        await supervised.collect(2, 3)
    assert supervised.folder.read_set_aside() == []


@pytest.mark.parametrize("bad", [range(5), range(59, 64), range(0, 64, 13)], ids=["first", "last", "spread"])
async def test_a_handful_of_bad_prompts_is_found(supervised: Supervised, bad: range) -> None:
    supervised.house.poison = {f"p{n}" for n in bad}
    assert len(await supervised.collect(64)) == 59
    assert {line["prompt_id"] for line in supervised.folder.read_set_aside()} == supervised.house.poison
    assert len(supervised.folder.read_faults()) > CONFIG.max_repairs, "a search does not use them up"


async def test_a_prompt_that_is_to_fail_often_on_its_own_is_found_too(house: House, tmp_path: Path) -> None:
    supervised = supervise(house, tmp_path, CONFIG.model_copy(update={"max_prompt_failures": 20}))
    house.poison = {"p3"}
    assert len(await supervised.collect(8)) == 7
    assert [line["prompt_id"] for line in supervised.folder.read_set_aside()] == ["p3"]


async def test_a_prompt_s_own_fault_mends_nobody(supervised: Supervised) -> None:
    house = supervised.house

    async def collect(prompts: Sequence[Prompt], step: int, kept: Sequence[Any] = ()) -> AsyncGenerator[Any, None]:
        for prompt in prompts:
            if prompt.prompt_id == "p1":
                raise RolloutError(prompt.sequence_id, "ValueError: too long")
            yield Item(house._make_sequence(prompt_id=prompt.prompt_id))

    house.collect = collect  # type: ignore[method-assign]
    assert sorted(await supervised.collect(3)) == ["p0", "p2"]
    assert house.calls == []
    assert supervised.folder.read_faults() == []
    assert "too long" in supervised.folder.read_set_aside()[0]["reason"]


async def test_repairs_in_a_row_end_the_run_with_one_line_and_finished_steps_allow_more(
    house: House, tmp_path: Path
) -> None:
    supervised = supervise(house, tmp_path, CONFIG.model_copy(update={"max_repairs": 2}))
    for step in (1, 2, 3):
        house.student.answer = GONE
        await supervised.collect(1, step)
        await supervised.learner.sync(step)
    for again in (2, 3):  # made already, before a lost learner: no progress
        house.student.answer = GONE
        await supervised.collect(1, again)
        await supervised.learner.sync(again)
    house.student.answer = GONE
    with pytest.raises(RunEnds, match=r"student engine: died: .*2 restarts in a row") as end:
        await supervised.collect(1, 4)
    assert "\n" not in str(end.value)
    assert supervised.folder.read_faults()[-1]["recovered_s"] is None


async def test_a_repair_that_fails_is_tried_again_and_counts(house: House, tmp_path: Path) -> None:
    supervised = supervise(house, tmp_path, CONFIG.model_copy(update={"max_repairs": 3}))

    async def fails() -> None:
        raise Unhealthy(await HealthMonitor(CONFIG).check([MonitoredProcess("learner", GONE)]))

    house.connect = fails  # type: ignore[method-assign]
    house.rank.answer = GONE
    with pytest.raises(LearnerLost) as lost:
        await supervised.learner.step([])
    with pytest.raises(RunEnds, match="recovery: failed: Unhealthy: learner: died"):
        await supervised.learner.recover_learner(lost.value, lambda: asyncio.sleep(0, 1))
    assert house.calls.count("restart learner") == 3


async def test_memory_that_runs_out_names_what_to_lower(house: House, tmp_path: Path) -> None:
    supervised = supervise(house, tmp_path, CONFIG.model_copy(update={"max_repairs": 1}))

    async def run_out_and_come_back() -> None:
        house.rank.answer = OutOfMemoryError("the node runs low on memory")
        with pytest.raises(LearnerLost) as lost:
            await supervised.learner.step([])
        await supervised.learner.recover_learner(lost.value, lambda: asyncio.sleep(0, 0))

    house.step_gate.clear()
    await run_out_and_come_back()
    with pytest.raises(RunEnds, match=r"out_of_memory: the node runs low.*lower trainer\.tokens_per_micro_batch"):
        await run_out_and_come_back()


@pytest.mark.parametrize("fails", [2, 9])
async def test_a_learner_that_dies_while_it_is_started_again_is_started_once_more(
    supervised: Supervised, fails
) -> None:
    supervised.house.fails_to_restart = fails
    supervised.house.rank.answer = GONE
    with pytest.raises(LearnerLost) as lost:
        await supervised.learner.step([])
    bringing = supervised.learner.recover_learner(lost.value, lambda: asyncio.sleep(0, 0))
    if fails > CONFIG.max_repairs:
        with pytest.raises(RunEnds, match=r"learner rank 0 died .*5 restarts in a row without a finished step"):
            await bringing
    else:
        await bringing
        assert supervised.house.calls.count("restart learner") == fails + 1


def test_a_full_disk_is_one_line_and_a_fault_of_ours_is_none() -> None:
    end = clear_end(OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl"))
    assert str(end) == "/runs/a/metrics.jsonl: No space left on device; free space, then resume (--resume)"
    assert clear_end(OSError(errno.ENOENT, "No such file", "x")) is None
    assert clear_end(ValueError("x")) is None


@pytest.mark.parametrize(
    "error",
    [
        WaitedTooLong("waited 600 s for a teacher engine to start"),
        LearnerRankDied("learner rank 0 of 1 died during the learner to start:\n  gone"),
        WeightSyncError("student engine behaves as if lm_head.weight had kept its old values"),
        StaleSequences("step 2 trains weight version 1"),
        RolloutError("held-out-3", "EngineCallError: teacher engine: gone"),
        GONE,
    ],
    ids=lambda error: type(error).__name__,
)
def test_who_did_not_come_died_or_does_not_hold_the_weights_is_one_line(error: Exception) -> None:
    for raised in (error, RayTaskError("start", "the actor's traceback", error)):
        end = clear_end(raised)
        assert end is not None
        assert " ".join(str(error).split()) in str(end)
        assert "\n" not in str(end)
