"""A run's actors on Ray: how they start, how they are wired, how they end. The only place that knows every actor."""

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
from deploy.cluster.placement import CPUS_PER_ACTOR, Seat
from deploy.cluster.plan import Plan, make_plan, processor_plan, refuse_unfit
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
"""Ray hides the GPUs of others from an actor that has some, and none from one that has none."""

_STOP_TIMEOUT_S = (
    8.0  # less than what ``deploy.cluster.submit`` has Ray wait between asking a job to stop and killing it
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Student and teacher engines, started and checked, and the rollouts over them. Replicas of a role are alike."""

    students: list[Process]
    teachers: list[Process]
    controller: Process
    student_facts: EngineFacts
    teacher_facts: EngineFacts
    rollouts: RemoteRollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnedLearner:
    """The learner on its way."""

    ranks: list[ActorHandle]
    started: list[Any]  # each rank's answer to ``start``, to be awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorClasses:
    """Whose processes are started; others than the run's own stand for engines that compute nothing."""

    engine: type = EngineActor
    learner: type = LearnerActor


class Cluster:
    """The actors of one run. Made by ``joined``."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        group: PlacementGroup,
        actor_classes: ActorClasses,
        *,
        hides_gpus: bool,
    ) -> None:
        """``hides_gpus``: from actors that have none, where there are some that a package could use."""
        self._config = config
        self.plan = plan
        self._seating = plan.seating
        self._group = group
        self._actor_classes = actor_classes
        self._hides_gpus = hides_gpus
        self._actors: list[ActorHandle] = []
        self._probe_noise: ProbeNoise | None = None  # until it has been measured

    async def start(self, inputs: Inputs, folder: RunDir, *, name: str) -> tuple[Pair, SpawnedLearner]:
        """Engines, rollouts and learner, side by side. On a GPU that they share they start one after the other, the
        learner last: it takes memory as it needs it, and an engine measures what is free as it starts.
        """
        learner = None if self._seating.learner_shares_gpu else self.spawn_learner()
        pair = await self.start_pair(inputs, folder, name=name)
        return pair, learner or self.spawn_learner()

    async def start_pair(self, inputs: Inputs, folder: RunDir, *, name: str | None = None) -> Pair:
        """Start all engines and the rollouts over them, which others find under ``name``.

        Raises UserError when a self-test fails, WaitedTooLong when an engine does not come up in time.
        """
        students = self._spawn_engines("student", self._seating.students, inputs, folder)
        teachers = self._spawn_engines("teacher", self._seating.teachers, inputs, folder)
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
        # No engine's handle among what Ray keeps for a restart: it warns of arguments that refer to anything.
        rollouts = self._spawn(
            RolloutActor, self._seating.rollouts, spec, [], [], self._config.models.student, name=name
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
        self, role: Literal["student", "teacher"], seats: list[Seat], inputs: Inputs, folder: RunDir
    ) -> list[Process]:
        """A process for each replica, still to be started."""
        spec, timeout_s = self._engine_spec(role, inputs, folder.path.name), self._config.engines.start_timeout_s
        prefix = inputs.self_test_prefix

        def process(name: str, place: Seat) -> Process:
            engine = self._spawn(self._actor_classes.engine, place)
            return Process(
                name=name,
                handle=engine,
                bundle=place.bundle,
                start=lambda: _answer(engine.start.remote(spec, prefix), f"a {role} engine to start", timeout_s),
            )

        return [
            process(name, place) for name, place in zip(_numbered(f"{role} engine", len(seats)), seats, strict=True)
        ]

    def _addresses(self, replicas: list[Process]) -> list[EngineAddress]:
        timeout_s = self._config.engines.call_timeout_s
        return [EngineAddress(handle=it.handle, name=it.name, call_timeout_s=timeout_s) for it in replicas]

    def spawn_learner(self) -> SpawnedLearner:
        """Start the learner's ranks; they meet and load the model while the engines start."""
        spec = LearnerSpec(
            student=self._config.models.student,
            trainer=self._config.trainer,
            device="cpu" if self.plan.layout is None else "cuda",
            sync_backend=self.plan.sync_backend,
            seed=self._config.seed,
            trust_remote_code=self._config.engines.trust_remote_code,
        )
        ranks = [
            self._spawn(self._actor_classes.learner, place, rank, spec, concurrency_groups={HEALTH_GROUP: 1})
            for rank, place in enumerate(self._seating.learner)
        ]
        return SpawnedLearner(ranks=ranks, started=_start_ranks(ranks))

    async def connect_learner(self, learner: SpawnedLearner, pair: Pair) -> RemoteLearner:
        """Open the weight transfer from the learner, once all of it is there, to the student engines."""
        config = self._config
        await _unwrapped(every_rank(learner.started, "the learner to start", timeout_s=config.engines.start_timeout_s))
        await self._connect(learner.ranks, pair)
        return RemoteLearner(
            learner.ranks, step_timeout_s=config.trainer.step_timeout_s, sync_timeout_s=config.sync.timeout_s
        )

    async def measure_probe_noise(self, learner: RemoteLearner, pair: Pair, prompts: Sequence[Prompt]) -> ProbeNoise:
        """What the probe finds now, while engines and learner hold what they loaded, whatever step the run goes on
        from. Learners that are started again are told. Raises WeightSyncError where they are not the same model.
        """
        texts = probe_texts_of(prompts)
        rows = await pair.rollouts.probe(texts)
        self._probe_noise = await _unwrapped(learner.measure_probe_noise(texts, rows))
        return self._probe_noise

    async def refuse_unshared(self, folder: Path, learner: SpawnedLearner, pair: Pair) -> None:
        """Raise UserError where a machine that writes into the run's folder has another one of that name."""
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
        if blind := [name for name, sees in zip(names, answers, strict=True) if not sees]:
            raise UserError(
                f"run_dir: {folder} on the machine of {', '.join(blind)} is not the run's; expected a folder that all "
                "machines share"
            )

    def workers(self, learner: SpawnedLearner, pair: Pair) -> RunWorkers:
        """The run's processes, as they are looked after."""

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
            shortage=lambda: shortage_of(self._group, self._seating, self._config.placement.strategy),
        )

    async def _connect(self, ranks: list[ActorHandle], pair: Pair) -> None:
        """Open the weight transfer, again where there was one."""
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
        """End the actors: first those that only call others, then, side by side, those that hold something and give it
        back. All within one limit, for whoever stops a job waits only so long before it is killed.
        """
        holders = [actor for actor in reversed(self._actors) if hasattr(actor, "shutdown")]
        for actor in self._actors:
            if actor not in holders:
                ray.kill(actor)
        goodbyes = (within(_STOP_TIMEOUT_S, actor.shutdown.remote(), "an actor to end") for actor in holders)
        for answer in await asyncio.gather(*goodbyes, return_exceptions=True):
            if isinstance(answer, Exception):  # dead already, or never started: killing it is all that is left
                logger.debug("an actor did not end in an orderly way", exc_info=answer)
        for actor in holders:
            ray.kill(actor)

    def _spawn(
        self,
        shell: type,
        place: Seat,
        *arguments: Any,
        name: str | None = None,
        concurrency_groups: dict[str, int] | None = None,
    ) -> ActorHandle:
        """Ray puts a new process in place of one that ends; what it was doing is not done again by itself."""
        remote = ray.remote(concurrency_groups=concurrency_groups or {})(shell).options(
            **({"name": name, "namespace": NAMESPACE} if name else {}),
            max_restarts=-1,
            max_task_retries=0,
            **({"runtime_env": _NO_GPU} if self._hides_gpus and not place.num_gpus else {}),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=place.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=place.bundle
            ),
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
    """For the first time. Raises RunEnds naming it where it dies meanwhile."""
    assert process.start is not None, process.name
    try:
        return await process.start()
    except RayActorError as error:
        if isinstance(error, RayTaskError):  # somebody else's end
            raise
        raise RunEnds(
            f"{process.name}: its process ended while it started; its log is in Ray's session folder"
        ) from error


def _start_ranks(ranks: list[ActorHandle]) -> list[Any]:
    """Each rank's answer to ``start``, to be awaited."""
    meeting_point = ranks[0].meeting_point.remote()
    return [rank.start.remote(meeting_point) for rank in ranks]


@asynccontextmanager
async def joined(
    config: RunConfig, actor_classes: ActorClasses | None = None, *, with_learner: bool = True
) -> AsyncIterator[Cluster]:
    """Connect to Ray and reserve a run's resources; end all its actors and give everything back in the end.

    Raises UserError when the run does not fit on what the cluster has, or the resources never come.
    """
    connect(config.placement.address)
    plan = _plan(config, with_learner=with_learner)
    logger.info("placement: %s", plan)
    placement = config.placement
    group = await reserve(plan.seating, strategy=placement.strategy, timeout_s=placement.timeout_s)
    hides_gpus = num_gpus() > 0 or Builds.installed().torch == "CUDA"
    cluster = Cluster(config, plan, group, actor_classes or ActorClasses(), hides_gpus=hides_gpus)
    try:
        yield cluster
    finally:
        await cluster.stop()
        remove_placement_group(group)


def _plan(config: RunConfig, *, with_learner: bool) -> Plan:
    """How a run lies on the cluster that has been joined. Raises UserError where it can't."""
    device = choose_device(config.placement.use_gpus, num_gpus=num_gpus(), builds=Builds.installed())
    if not device.use_gpus:
        return processor_plan(config, device.why, with_learner=with_learner)
    plan = make_plan(config, read_shapes(config), gpu_nodes(), with_learner=with_learner)
    refuse_unfit(plan)
    return plan


async def _answer(call: Any, what: str, timeout_s: float) -> Any:
    """An actor's answer. What the user can change comes back as the UserError it was."""
    return await _unwrapped(within(timeout_s, call, what))


async def _unwrapped(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
