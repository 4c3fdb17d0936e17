"""A run's actors on Ray: where they go, how they start, how they end. The only place that knows every actor.

bundle 0  student engine    its GPUs
bundle 1  teacher engine    its GPUs
bundle 2  rollouts          no GPU
bundle 3  learner           one GPU
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config import RunConfig
from common.errors import UserError
from common.waiting import WaitedTooLong, within
from deploy.preflight import Inputs
from deploy.run_folder import RunFolder
from rollout_server.actors import EngineActor, EngineAddress, RemoteRollouts, RolloutActor
from rollout_server.engine import EngineFacts, EngineSpec
from rollout_server.rollouts import RolloutSpec
from trainer.actors import LearnerActor, LearnerSpec, RemoteLearner, TransferSpec

logger = logging.getLogger(__name__)

STUDENT, TEACHER, ROLLOUTS, LEARNER = range(4)

# Threads are set where they are used; Ray's CPUs only have to add up to less than the smallest machine has.
_CPUS_PER_ACTOR = 0.25
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cluster:
    """The actors of a run, started and checked."""

    rollouts: RemoteRollouts
    learner: RemoteLearner | None
    student: EngineFacts
    teacher: EngineFacts


@asynccontextmanager
async def started(
    config: RunConfig, inputs: Inputs, folder: RunFolder, *, with_learner: bool = True
) -> AsyncIterator[Cluster]:
    """Connect to Ray, start the run's actors, and end them in the reverse order, whatever happens in between.

    Raises UserError for what the user can change (resources that never come, an engine that can't load its model).
    """
    _connect(config.placement.address)
    use_gpus = _use_gpus(config.placement.use_gpus)
    group = await _reserve(config, use_gpus, with_learner=with_learner)
    actors: list[ActorHandle] = []
    try:
        yield await _start(config, inputs, folder, group, use_gpus, actors, with_learner=with_learner)
    finally:
        await _stop(actors, group)


def _connect(address: str | None) -> None:
    """Join the cluster that is named, or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        ray.init(
            address=named or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if named else {"include_dashboard": False}),
        )


def _use_gpus(wanted: Literal["auto"] | bool) -> bool:
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if wanted is True and not num_gpus:
        raise UserError("placement.use_gpus is true, but the cluster has no GPU")
    return bool(num_gpus) if wanted == "auto" else wanted


async def _reserve(config: RunConfig, use_gpus: bool, *, with_learner: bool) -> PlacementGroup:
    def bundle(num_gpus: int) -> dict[str, float]:
        return {"CPU": _CPUS_PER_ACTOR, **({"GPU": num_gpus} if use_gpus and num_gpus else {})}

    engines = config.engines
    bundles = [bundle(engines.student.tensor_parallel_size), bundle(engines.teacher.tensor_parallel_size), bundle(0)]
    if with_learner:
        bundles.append(bundle(1))
    group = placement_group(bundles, strategy=config.placement.strategy)
    try:
        await within(config.placement.timeout_s, group.ready(), "the placement group")
    except WaitedTooLong as error:
        remove_placement_group(group)
        raise UserError(
            f"placement: waited {config.placement.timeout_s:g} s for {bundles} ({config.placement.strategy}), "
            f"the cluster has {ray.available_resources()} free; add nodes, or raise placement.timeout_s"
        ) from error
    return group


async def _start(
    config: RunConfig,
    inputs: Inputs,
    folder: RunFolder,
    group: PlacementGroup,
    use_gpus: bool,
    actors: list[ActorHandle],
    *,
    with_learner: bool,
) -> Cluster:
    """Start all actors side by side. Each is put into ``actors`` as soon as it exists."""

    def actor(shell: type, bundle: int, num_gpus: int, *arguments: Any) -> ActorHandle:
        remote = ray.remote(shell).options(
            num_cpus=_CPUS_PER_ACTOR,
            num_gpus=num_gpus if use_gpus else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        )
        actors.append(remote.remote(*arguments))
        return actors[-1]

    engines = config.engines
    backend = _backend(config, use_gpus)
    student = actor(EngineActor, STUDENT, engines.student.tensor_parallel_size)
    teacher = actor(EngineActor, TEACHER, engines.teacher.tensor_parallel_size)
    starts = [
        student.start.remote(_engine_spec(config, "student", inputs, backend), inputs.self_test_prefix),
        teacher.start.remote(_engine_spec(config, "teacher", inputs, None), inputs.self_test_prefix),
    ]
    learner = None
    if with_learner:
        learner_spec = LearnerSpec(
            student=config.models.student,
            trainer=config.trainer,
            seed=config.seed,
            trust_remote_code=engines.trust_remote_code,
        )
        learner = actor(LearnerActor, LEARNER, 1, learner_spec)
    student_facts, teacher_facts = [
        await _started(start, role, engines.start_timeout_s)
        for start, role in zip(starts, ("student", "teacher"), strict=True)
    ]
    if learner is not None:
        transfer = TransferSpec(
            students=[student],
            backend=backend,
            workers_per_engine=engines.student.tensor_parallel_size,
            engine_dtype=student_facts.dtype,
            timeout_s=config.sync.timeout_s,
            probe_tolerance=_probe_tolerance(config, student_facts),
        )
        await _started(learner.connect.remote(transfer), "learner", engines.start_timeout_s)
    rollouts = actor(
        RolloutActor,
        ROLLOUTS,
        0,
        _rollout_spec(config, inputs, folder, min(student_facts.top_logprobs, teacher_facts.top_logprobs)),
        EngineAddress(handle=student, name="student engine", call_timeout_s=engines.call_timeout_s),
        EngineAddress(handle=teacher, name="teacher engine", call_timeout_s=engines.call_timeout_s),
        config.models.student,
    )
    return Cluster(
        rollouts=RemoteRollouts(rollouts, timeout_s=config.trainer.step_timeout_s),
        learner=learner
        and RemoteLearner(learner, step_timeout_s=config.trainer.step_timeout_s, sync_timeout_s=config.sync.timeout_s),
        student=student_facts,
        teacher=teacher_facts,
    )


async def _started(start: Any, role: str, timeout_s: float) -> Any:
    """The actor's answer. What the user can change comes back as the UserError it was."""
    try:
        return await within(timeout_s, start, f"the {role} to start")
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise


def _backend(config: RunConfig, use_gpus: bool) -> Literal["host_memory", "nccl"]:
    if config.sync.backend != "auto":
        return config.sync.backend
    return "nccl" if use_gpus else "host_memory"


def _probe_tolerance(config: RunConfig, student: EngineFacts) -> float:
    if config.sync.probe_tolerance is not None:
        return config.sync.probe_tolerance
    return 1e-3 if student.dtype == config.trainer.dtype == "float32" else 0.25


def _engine_spec(
    config: RunConfig, role: Literal["student", "teacher"], inputs: Inputs, backend: str | None
) -> EngineSpec:
    settings = config.engines.student if role == "student" else config.engines.teacher
    return EngineSpec(
        name=role,
        model=config.models.student if role == "student" else config.models.teacher,
        settings=settings.model_copy(update={"max_model_len": inputs.max_model_len}),
        top_logprobs=config.engines.top_logprobs,
        trust_remote_code=config.engines.trust_remote_code,
        weight_transfer_backend=backend,
    )


def _rollout_spec(config: RunConfig, inputs: Inputs, folder: RunFolder, top_logprobs: int) -> RolloutSpec:
    return RolloutSpec(
        policy=config.policy,
        sampling=config.sampling,
        trace=config.trace,
        trace_folder=folder.traces,
        top_logprobs=top_logprobs,
        stop_token_ids=inputs.stop_token_ids,
    )


async def _stop(actors: list[ActorHandle], group: PlacementGroup) -> None:
    """End the actors, those with processes or memory of their own in an orderly way first."""
    for actor in reversed(actors):
        if hasattr(actor, "shutdown"):
            try:
                await within(_STOP_TIMEOUT_S, actor.shutdown.remote(), "an actor to end")
            except Exception:  # it may be dead, or never have started; killing it below is all that is left
                logger.info("an actor did not end in an orderly way", exc_info=True)
        ray.kill(actor)
    remove_placement_group(group)
