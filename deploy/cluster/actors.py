"""Starts, connects and stops a run's Ray actors. This is the only module that knows every actor."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import RunConfig
from common.errors import RunEnds, UserError
from common.run_dir import RunDir
from common.sequence import Prompt
from common.waiting import within
from deploy.cluster.attach import NAMESPACE
from deploy.cluster.builds import Builds, choose_device
from deploy.cluster.model_shape import read_shapes
from deploy.cluster.placement import CPUS_PER_ACTOR, Slot
from deploy.cluster.plan import Plan, check_fits, make_plan, processor_plan
from deploy.cluster.reservation import connect, gpu_nodes, num_gpus, reserve, shortage_of
from deploy.preflight import Inputs
from deploy.supervision.workers import Process, RunWorkers, in_turn
from rollout_server.actors import EngineActor, EngineAddress, RemoteRollouts, RolloutActor
from rollout_server.engines.protocol import EngineFacts, EngineSpec
from rollout_server.rollouts import LiveContext, RolloutSpec
from trainer.actors import HEALTH_GROUP, LearnerActor, LearnerSpec, RemoteLearner, TransferSpec, every_rank
from trainer.loop import probe_texts_of
from trainer.probe_statistics import ProbeNoise

logger = logging.getLogger(__name__)

_NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
"""Ray hides other actors' GPUs from an actor that has some, but hides none from an actor without GPUs."""

_STOP_TIMEOUT_S = (
    8.0  # shorter than Ray's wait between asking a job to stop and killing it, which ``deploy.cluster.submit`` sets
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Student and teacher engines, started and checked, and the rollouts that use them. A role's replicas are equal."""

    students: list[Process]
    teachers: list[Process]
    controller: Process
    student_facts: EngineFacts
    teacher_facts: EngineFacts
    rollouts: RemoteRollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnedLearner:
    """A learner that is starting."""

    ranks: list[ActorHandle]
    started: list[Any]  # each rank's pending reply to ``start``


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorClasses:
    """Classes of the actors to start. Tests and dry runs replace them with actors that compute nothing."""

    engine: type = EngineActor
    learner: type = LearnerActor


class Cluster:
    """The actors of one run. Created by ``joined``."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        group: PlacementGroup,
        actor_classes: ActorClasses,
        *,
        hides_gpus: bool,
    ) -> None:
        """``hides_gpus``: hide GPUs from actors that have none."""
        self._config = config
        self.plan = plan
        self._placement = plan.placement
        self._group = group
        self._actor_classes = actor_classes
        self._hides_gpus = hides_gpus
        self._actors: list[ActorHandle] = []
        self._probe_noise: ProbeNoise | None = None  # None until measured

    async def start(self, inputs: Inputs, folder: RunDir, *, name: str) -> tuple[Pair, SpawnedLearner]:
        """Start engines, rollouts and learner concurrently. Those that share a GPU start one after another, the learner
        last: it allocates memory on demand, whereas an engine measures the free memory when it starts.
        """
        learner = None if self._placement.learner_shares_gpu else self.spawn_learner()
        pair = await self.start_pair(inputs, folder, name=name)
        return pair, learner or self.spawn_learner()

    async def start_pair(self, inputs: Inputs, folder: RunDir, *, name: str | None = None) -> Pair:
        """Start all engines and the rollouts that use them. Other processes can find the rollout actor by ``name``.

        Raises UserError if a self-test fails, WaitedTooLong if an engine does not start in time.
        """
        students = self._spawn_engines("student", self._placement.students, inputs, folder)
        teachers = self._spawn_engines("teacher", self._placement.teachers, inputs, folder)
        answers: list[dict[str, EngineFacts]] = await asyncio.gather(*in_turn([*teachers, *students], _start))
        facts = {name: engine for answer in answers for name, engine in answer.items()}
        spec = RolloutSpec(
            policy=self._config.policy,
            sampling=self._config.sampling,
            trace=self._config.trace,
            trace_folder=folder.traces,
            top_logprobs=inputs.top_logprobs,
            stop_token_ids=inputs.stop_token_ids,
            live=LiveContext(max_model_len=inputs.max_model_len, prompts_as_chat=self._config.data.as_chat),
            trust_remote_code=self._config.engines.trust_remote_code,
        )
        # Ray keeps these arguments for restarts and warns about references in them, so engine handles are sent later.
        rollouts = self._spawn(
            RolloutActor, self._placement.rollouts, spec, [], [], self._config.models.student, name=name
        )
        addresses = self._addresses(students), self._addresses(teachers)

        async def connect() -> None:
            timeout_s = self._config.engines.start_timeout_s
            await _answer(rollouts.connect.remote(*addresses), "the controller to start", timeout_s)

        await connect()
        return Pair(
            students=students,
            teachers=teachers,
            controller=Process(name="controller", handle=rollouts, start=connect),
            student_facts=facts[students[0].name],
            teacher_facts=facts[teachers[0].name],
            rollouts=RemoteRollouts(rollouts, timeout_s=self._config.trainer.step_timeout_s),
        )

    def _spawn_engines(
        self, role: Literal["student", "teacher"], slots: list[Slot], inputs: Inputs, folder: RunDir
    ) -> list[Process]:
        """A process for each replica, not started yet."""
        spec, timeout_s = self._engine_spec(role, inputs, folder.path.name), self._config.engines.start_timeout_s
        prefix = inputs.self_test_prefix

        def process(name: str, slot: Slot) -> Process:
            engine = self._spawn(self._actor_classes.engine, slot)
            return Process(
                name=name,
                handle=engine,
                bundle=slot.bundle,
                start=lambda: _answer(engine.start.remote(spec, prefix), f"a {role} engine to start", timeout_s),
            )

        return [process(name, slot) for name, slot in zip(_numbered(f"{role} engine", len(slots)), slots, strict=True)]

    def _addresses(self, replicas: list[Process]) -> list[EngineAddress]:
        timeout_s = self._config.engines.call_timeout_s
        return [EngineAddress(handle=it.handle, name=it.name, call_timeout_s=timeout_s) for it in replicas]

    def spawn_learner(self) -> SpawnedLearner:
        """Start the learner's ranks. They connect to each other and load the model while the engines start."""
        spec = LearnerSpec(
            student=self._config.models.student,
            trainer=self._config.trainer,
            device="cpu" if self.plan.layout is None else "cuda",
            sync_backend=self.plan.sync_backend,
            seed=self._config.seed,
            trust_remote_code=self._config.engines.trust_remote_code,
        )
        ranks = [
            self._spawn(self._actor_classes.learner, slot, rank, spec, concurrency_groups={HEALTH_GROUP: 1})
            for rank, slot in enumerate(self._placement.learner)
        ]
        return SpawnedLearner(ranks=ranks, started=_start_ranks(ranks))

    async def connect_learner(self, learner: SpawnedLearner, pair: Pair) -> RemoteLearner:
        """Wait for all ranks, then open the weight transfer to the student engines."""
        config = self._config
        await _unwrapped(every_rank(learner.started, "the learner to start", timeout_s=config.engines.start_timeout_s))
        await self._connect(learner.ranks, pair)
        return RemoteLearner(
            learner.ranks, step_timeout_s=config.trainer.step_timeout_s, sync_timeout_s=config.sync.timeout_s
        )

    async def measure_probe_noise(self, learner: RemoteLearner, pair: Pair, prompts: Sequence[Prompt]) -> ProbeNoise:
        """Measure the probe's noise while engines and learner both have the initial weights, even in a resumed run.
        Restarted learners get this value. Raises WeightSyncError if the models differ.
        """
        texts = probe_texts_of(prompts)
        rows = await pair.rollouts.probe(texts)
        self._probe_noise = await _unwrapped(learner.measure_probe_noise(texts, rows))
        return self._probe_noise

    async def check_folder_is_shared(self, folder: Path, learner: SpawnedLearner, pair: Pair) -> None:
        """Raise UserError if a machine that writes to the run's folder does not share it with this one."""
        names = ["the controller", *_numbered("the learner", len(learner.ranks))]
        file = folder / f".{uuid4().hex}.unfinished"
        file.touch()
        try:
            calls = [actor.sees.remote(file) for actor in (pair.controller.handle, *learner.ranks)]
            timeout_s = self._config.engines.call_timeout_s
            asked = (
                within(timeout_s, call, f"{name} to see {folder}") for name, call in zip(names, calls, strict=True)
            )
            answers = await asyncio.gather(*asked)
        finally:
            file.unlink()
        if missing := [name for name, sees in zip(names, answers, strict=True) if not sees]:
            raise UserError(
                f"run_dir: {folder} on the machine of {', '.join(missing)} is not the run's; expected a folder that "
                "all machines share"
            )

    def workers(self, learner: SpawnedLearner, pair: Pair) -> RunWorkers:
        """The run's processes, for supervision."""

        async def start_learner() -> None:
            timeout_s = self._config.engines.start_timeout_s
            await _unwrapped(every_rank(_start_ranks(learner.ranks), "the learner to start", timeout_s=timeout_s))

        return RunWorkers(
            students=pair.students,
            teachers=pair.teachers,
            controller=pair.controller,
            ranks=[
                Process(name=name, handle=rank, health_options={"concurrency_group": HEALTH_GROUP})
                for name, rank in zip(_numbered("learner", len(learner.ranks)), learner.ranks, strict=True)
            ],
            start_learner=start_learner,
            connect=lambda: self._connect(learner.ranks, pair),
            students_share_a_group=self.plan.sync_backend == "nccl",
            placement_timeout_s=self._config.placement.timeout_s,
            call_timeout_s=self._config.engines.call_timeout_s,
            shortage=lambda: shortage_of(self._group, self._placement, self._config.placement.strategy),
        )

    async def _connect(self, ranks: list[ActorHandle], pair: Pair) -> None:
        """Open the weight transfer, also again after a restart."""
        config = self._config
        transfer = TransferSpec(
            students=[student.handle for student in pair.students],
            backend=self.plan.sync_backend,
            workers_per_engine=config.engines.student.num_gpus,
            engine_dtype=pair.student_facts.dtype,
            timeout_s=config.sync.timeout_s,
            probe_tolerance=config.sync.probe_tolerance,
            probe_noise=self._probe_noise,
        )
        calls = [rank.connect.remote(transfer) for rank in ranks]
        what, timeout_s = "the weight transfer to open", config.engines.start_timeout_s
        await _unwrapped(every_rank(calls, what, timeout_s=timeout_s))

    async def stop(self) -> None:
        """Stop the actors: first those without resources of their own, then concurrently those that must release some.
        All within one time limit, because a stopped job is killed after a while.
        """
        with_shutdown = [actor for actor in reversed(self._actors) if hasattr(actor, "shutdown")]
        for actor in self._actors:
            if actor not in with_shutdown:
                ray.kill(actor)
        shutdowns = (within(_STOP_TIMEOUT_S, actor.shutdown.remote(), "an actor to end") for actor in with_shutdown)
        for answer in await asyncio.gather(*shutdowns, return_exceptions=True):
            if isinstance(answer, Exception):  # dead already, or never started; it can only be killed
                logger.debug("an actor did not shut down cleanly", exc_info=answer)
        for actor in with_shutdown:
            ray.kill(actor)

    def _spawn(
        self,
        actor_class: type,
        slot: Slot,
        *arguments: Any,
        name: str | None = None,
        concurrency_groups: dict[str, int] | None = None,
    ) -> ActorHandle:
        """Start an actor. Ray restarts its process if it ends, but does not repeat the calls that it was running."""
        remote = ray.remote(concurrency_groups=concurrency_groups or {})(actor_class).options(
            **({"name": name, "namespace": NAMESPACE} if name else {}),
            max_restarts=-1,
            max_task_retries=0,
            **({"runtime_env": _NO_GPU} if self._hides_gpus and not slot.num_gpus else {}),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=slot.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle),
        )
        self._actors.append(remote.remote(*arguments))
        return self._actors[-1]

    def _engine_spec(self, role: Literal["student", "teacher"], inputs: Inputs, run: str) -> EngineSpec:
        engines, models = self._config.engines, self._config.models
        settings = engines.student if role == "student" else engines.teacher
        budget = self.plan.budgets.get(role)
        return EngineSpec(
            name=role,
            run=run,
            model=models.student if role == "student" else models.teacher,
            settings=settings.model_copy(
                update={"max_model_len": inputs.max_model_len, **(asdict(budget) if budget is not None else {})}
            ),
            top_logprobs=inputs.top_logprobs,
            trust_remote_code=engines.trust_remote_code,
            weight_transfer_backend=self.plan.sync_backend if role == "student" else None,
        )


def _numbered(name: str, number: int) -> list[str]:
    return [name] if number == 1 else [f"{name} {each}" for each in range(number)]


async def _start(process: Process) -> Any:
    """Start a process for the first time. Raises RunEnds with its name if it dies."""
    assert process.start is not None, process.name
    try:
        return await process.start()
    except RayActorError as error:
        if isinstance(error, RayTaskError):  # raised inside the actor, about another process
            raise
        # Ray's text: a sentence, indented ids of the actor, the reason.
        reason = " ".join(line for line in str(error).splitlines()[-3:] if line and not line[0].isspace())
        raise RunEnds(
            f"{process.name}: its process ended while it started; its log is in Ray's session folder. "
            f"Ray says: {reason}"
        ) from error


def _start_ranks(ranks: list[ActorHandle]) -> list[Any]:
    """Each rank's pending reply to ``start``."""
    meeting_point = ranks[0].meeting_point.remote()
    return [rank.start.remote(meeting_point) for rank in ranks]


@asynccontextmanager
async def joined(
    config: RunConfig, actor_classes: ActorClasses | None = None, *, with_learner: bool = True
) -> AsyncIterator[Cluster]:
    """Connect to Ray and reserve a run's resources. On exit, stop all its actors and release the resources.

    Raises UserError if the run does not fit on the cluster, or the resources do not become available in time.
    """
    connect(config.placement.address)
    plan = _plan(config, with_learner=with_learner)
    logger.info("placement: %s", plan)
    placement = config.placement
    group = await reserve(plan.placement, strategy=placement.strategy, timeout_s=placement.timeout_s)
    hides_gpus = num_gpus() > 0 or Builds.installed().torch == "CUDA"
    cluster = Cluster(config, plan, group, actor_classes or ActorClasses(), hides_gpus=hides_gpus)
    try:
        yield cluster
    finally:
        await cluster.stop()
        remove_placement_group(group)


def _plan(config: RunConfig, *, with_learner: bool) -> Plan:
    """The run's plan on the connected cluster. Raises UserError if there is none."""
    device = choose_device(config.placement.use_gpus, num_gpus=num_gpus(), builds=Builds.installed())
    if not device.use_gpus:
        return processor_plan(config, device.why, with_learner=with_learner)
    plan = make_plan(config, read_shapes(config), gpu_nodes(), with_learner=with_learner)
    check_fits(plan)
    return plan


async def _answer(call: Any, what: str, timeout_s: float) -> Any:
    """An actor's reply. A UserError in the actor is raised again as such."""
    return await _unwrapped(within(timeout_s, call, what))


async def _unwrapped(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
