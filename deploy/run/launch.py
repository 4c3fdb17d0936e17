"""A run on Ray, from the command to its summary: starts its actors, and ends the run."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common.config import RunConfig
from common.config.source import ResolvedConfig
from common.errors import UserError
from common.run_dir import RunDir
from deploy.cluster.actors import ActorClasses, joined
from deploy.cluster.attach import live_name
from deploy.cluster.sigterm import cancel_on_sigterm
from deploy.preflight import Inputs, prepare
from deploy.reporting.progress import ProgressDisplay
from deploy.reporting.terminal import make_console, print_summary
from deploy.run.copies import fetch_if_ahead
from deploy.run.provenance import write_placement
from deploy.run.resume import find_resumable, refuse_other_settings
from deploy.run.run import RunActors, run
from deploy.supervision.fatal_errors import clear_end
from deploy.supervision.health_monitor import HealthMonitor
from deploy.supervision.quarantine import Quarantine
from deploy.supervision.restarts import RestartPolicy
from deploy.supervision.supervised import SupervisedLearner, SupervisedRollouts
from rollout_server.actors import Collected
from rollout_server.engines.protocol import EngineFacts
from trainer.evaluate import EvaluationReport, evaluate

T = TypeVar("T")

logger = logging.getLogger(__name__)


def train(resolved: ResolvedConfig, *, resume: bool = False, actor_classes: ActorClasses | None = None) -> None:
    """Run a distillation, or resume an interrupted one, and print its summary."""
    resumed = None
    if resume:
        fetch_if_ahead(resolved.config)
        resumed = find_resumable(resolved.config)
        refuse_other_settings(resumed.folder, resolved)
        if (summary := resumed.finished_summary(resolved.config.trainer.num_steps)) is not None:
            make_console(stderr=True).print(
                f"{resumed.folder.path} is finished, after step {resumed.state.step}; to continue training, raise "
                "trainer.num_steps"
            )
            print_summary(summary)
            return

    start = partial(started_actors, resolved.config, actor_classes=actor_classes)
    print_summary(_run(run(resolved, start, resumed)))


def evaluate_student(resolved: ResolvedConfig) -> None:
    """Evaluate ``models.student`` on the held-out prompts and print accuracy and divergence."""
    report = _run(_evaluate(resolved))
    print_summary({"student": resolved.config.models.student, **asdict(report)})


@asynccontextmanager
async def started_actors(
    config: RunConfig,
    inputs: Inputs,
    folder: RunDir,
    display: ProgressDisplay,
    *,
    actor_classes: ActorClasses | None = None,
) -> AsyncIterator[RunActors]:
    """Start and connect the run's actors. They are shut down when the block is left."""
    display.note("starting the engines and the learner")
    async with joined(config, actor_classes) as cluster:
        display.note(f"placement: {cluster.plan}")
        write_placement(folder.path, str(cluster.plan))
        pair, learner_actor = await cluster.start(inputs, folder, name=live_name(folder.path.name))
        learner = await cluster.connect_learner(learner_actor, pair)
        await cluster.check_folder_is_shared(folder.path, learner_actor, pair)
        display.note(f"student {_describe(pair.student_facts)}; teacher {_describe(pair.teacher_facts)}")
        probe_prompts = inputs.prompts.peek(config.sync.num_probe_prompts)
        noise = await cluster.measure_probe_noise(learner, pair, probe_prompts)
        display.note(f"student engine and learner differ by {noise.rms:.2g} nats (rms) with the same weights")
        monitor, restarts = HealthMonitor(config.supervision), RestartPolicy(config.supervision, folder)
        workers = cluster.workers(learner_actor, pair)
        logger.info("process ids: %s", await workers.process_ids())
        supervised = SupervisedLearner(learner, workers=workers, monitor=monitor, restarts=restarts)
        rollouts = SupervisedRollouts(
            pair.rollouts,
            learner=supervised,
            workers=workers,
            monitor=monitor,
            restarts=restarts,
            quarantine=Quarantine(folder, inputs.prompts),
            config=config.supervision,
        )
        yield RunActors(
            rollouts=rollouts, learner=supervised, put=Collected.put, recover_learner=supervised.recover_learner
        )


async def _evaluate(resolved: ResolvedConfig) -> EvaluationReport:
    config = resolved.config
    inputs = prepare(config)
    if inputs.held_out is None:
        raise UserError("evaluation: missing, expected the held-out data to evaluate on")
    prompts = inputs.held_out.prompts
    with ProgressDisplay(0) as display:
        display.note("starting the engines")
        async with joined(config, with_learner=False) as cluster:
            pair = await cluster.start_pair(inputs, RunDir(Path(config.run_dir)))
            display.note(f"evaluating {config.models.student} on {len(prompts)} prompts")
            sequences = await pair.rollouts.evaluate(prompts)
    return evaluate(sequences, inputs.held_out.answer_pattern, inputs.held_out.decode)


def _describe(engine: EngineFacts) -> str:
    return f"in {engine.dtype}, {engine.max_model_len} tokens of context, top {engine.top_logprobs} log-probs"


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end. SIGTERM, which stops a job, has the same effect as Ctrl-C: the actors are shut down first."""

    async def until_stopped() -> T:
        cancel_on_sigterm()
        return await work

    try:
        return asyncio.run(until_stopped())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        if (end := clear_end(error)) is not None:
            raise end from error
        raise
