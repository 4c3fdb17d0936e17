"""One run: records the loop's reports in the run's folder, trackers and display, and takes checkpoints when due.

Uses the loop's protocols, not their implementations: Ray actors in a real run, local objects in tests.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

from common.config import Checkpoints
from common.config.source import ResolvedConfig
from common.run_dir import RunDir
from common.sequence import MixedSequence
from common.weights import WeightVersion
from deploy.preflight import Inputs, prepare
from deploy.reporting.progress import ProgressDisplay, StepLine
from deploy.reporting.trackers import Trackers
from deploy.run.copies import copied_names, kept_copied
from deploy.run.provenance import hardware, write_versions
from deploy.run.records import metrics_of, summarize_run
from deploy.run.resume import Resumable, found_again, last_resumable, rewind, rewind_to_beginning
from deploy.supervision.supervised import LearnerLost, StoredLearner
from trainer.checkpoint import AHEAD, LEARNER, STUDENT, RunState, prune, write_checkpoint
from trainer.loop import BEGINNING, Rollouts, Start, distill
from trainer.prompts import PromptCursor
from trainer.reports import Collected, Evaluated, StepDone, Trained
from trainer.sequence_files import write_sequences

RecoverLearner = Callable[[LearnerLost, Callable[[], Awaitable[WeightVersion]]], Awaitable[None]]
"""Restarts the learner, has its state loaded, and sends the engines its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunActors:
    """The actors of a run, as the loop uses them."""

    rollouts: Rollouts
    learner: StoredLearner
    put: Callable[[MixedSequence], Collected]  # wraps a sequence from a checkpoint like those from rollouts
    recover_learner: RecoverLearner | None = None  # used after LearnerLost


StartActors = Callable[[Inputs, RunDir, ProgressDisplay], AbstractAsyncContextManager[RunActors]]


async def run(
    resolved: ResolvedConfig, start_actors: StartActors, resumed: Resumable | None = None
) -> dict[str, object]:
    """Run from the beginning or from a checkpoint, and return the summary."""
    config, started_s = resolved.config, time.perf_counter()
    with ExitStack() as stack:
        if resumed is not None:
            stack.enter_context(resumed.folder.locked())
            resumed = found_again(resumed, config.trainer.num_steps)
        inputs = prepare(config, cursor=None if resumed is None else resumed.state.cursor)
        folder = _new_folder(resolved) if resumed is None else resumed.folder
        after_step = 0 if resumed is None else resumed.state.step
        if resumed is None:
            stack.enter_context(folder.locked())
        else:
            rewind(resumed, resolved)
            started_s -= resumed.state.seconds
        num_resumed = write_versions(folder.path, after_step=after_step) - 1
        changed = stack.enter_context(kept_copied(config.storage, folder.path))
        trackers = stack.enter_context(Trackers.open(config, folder.path))
        display = stack.enter_context(ProgressDisplay(config.trainer.num_steps, first_step=after_step + 1))
        display.note(f"run folder {folder.path}; {hardware()}")
        async with start_actors(inputs, folder, display) as actors:
            checkpoints = CheckpointTaker(
                config.checkpoints, folder, actors.learner, num_steps=config.trainer.num_steps, started_s=started_s
            )
            start: Start | None = None  # None until the learner's state has been loaded
            while True:
                try:
                    if start is None:
                        start = await _first_start(resumed, actors, display)
                    steps = distill(
                        config.trainer,
                        prompts=inputs.prompts,
                        rollouts=actors.rollouts,
                        learner=actors.learner,
                        held_out=inputs.held_out,
                        num_probe_prompts=config.sync.num_probe_prompts,
                        start=start,
                    )
                    async with aclosing(steps):
                        await _record(steps, checkpoints, folder, trackers, display, changed)
                    display.note("saving the student")
                    await actors.learner.save(folder.student)
                    break
                except LearnerLost as lost:
                    start = await _recover_learner(lost, actors, resolved, inputs, folder, display)
        seconds = time.perf_counter() - started_s
        summary = summarize_run(
            folder.read_metrics(),
            run_dir=folder.path,
            seconds=seconds,
            num_resumed=num_resumed,
            num_faults=len(folder.read_faults()),
            set_aside=[line["prompt_id"] for line in folder.read_set_aside()],
        )
        folder.write_summary(summary)
    return summary


def _new_folder(resolved: ResolvedConfig) -> RunDir:
    """A new folder whose name no run has, locally or in the store."""
    config = resolved.config
    return RunDir.create(config.run_dir, resolved, taken=copied_names(config.storage))


async def _first_start(resumed: Resumable | None, actors: RunActors, display: ProgressDisplay) -> Start:
    """The step at which this process starts. The learner's state is loaded."""
    if resumed is None:
        return BEGINNING
    display.note(f"resuming after step {resumed.state.step}")
    await actors.learner.load_state(resumed.checkpoint / LEARNER)
    return resumed.start(actors.put)


async def _recover_learner(
    lost: LearnerLost,
    actors: RunActors,
    resolved: ResolvedConfig,
    inputs: Inputs,
    folder: RunDir,
    display: ProgressDisplay,
) -> Start:
    """Restart the learner, and rewind the run to its last good checkpoint, or to its beginning."""
    if actors.recover_learner is None:
        raise lost
    resumable = last_resumable(folder)
    if resumable is None:
        rewind_to_beginning(folder)
    else:
        rewind(resumable, resolved)
    inputs.prompts.go_to(PromptCursor() if resumable is None else resumable.state.cursor)

    async def load() -> WeightVersion:
        if resumable is None:
            return 0
        await actors.learner.load_state(resumable.checkpoint / LEARNER)
        return resumable.state.step

    await actors.recover_learner(lost, load)
    display.note(f"resuming after step {0 if resumable is None else resumable.state.step}")
    return BEGINNING if resumable is None else resumable.start(actors.put)


async def _record(
    steps: AsyncIterator[Trained | Evaluated | StepDone],
    checkpoints: "CheckpointTaker",
    folder: RunDir,
    trackers: Trackers,
    display: ProgressDisplay,
    changed: Callable[[], None],
) -> None:
    """Record the loop's reports up to its last step. ``changed`` is called when the run's folder has new content."""
    accuracy = None  # of the present weights
    async for record in steps:
        if isinstance(record, StepDone):
            await checkpoints.take_if_due(record, accuracy)
            changed()
            continue
        accuracy = record.report.accuracy if isinstance(record, Evaluated) else None
        folder.append_metrics(metrics_of(record))
        trackers.log(metrics_of(record))
        _show(display, record)


class CheckpointTaker:
    """Takes a run's checkpoints when they are due, and removes old ones."""

    def __init__(
        self, config: Checkpoints, folder: RunDir, learner: StoredLearner, *, num_steps: int, started_s: float
    ) -> None:
        """``started_s``: when an uninterrupted run would have started, on ``time.perf_counter``'s clock."""
        self._config = config
        self._folder = folder
        self._learner = learner
        self._num_steps = num_steps
        self._started_s = started_s

    async def take_if_due(self, done: StepDone, accuracy: float | None) -> None:
        """``accuracy``: held-out accuracy of these weights, if they were evaluated."""
        every_steps = self._config.every_steps
        if every_steps is None or (done.step % every_steps and done.step != self._num_steps):
            return
        ahead = done.ahead

        async def save(unfinished: Path) -> None:
            await self._learner.save_state(unfinished / LEARNER)
            await self._learner.save(unfinished / STUDENT)
            if ahead is not None:
                write_sequences(unfinished / AHEAD, ahead.sequences)

        state = RunState(
            step=done.step,
            weight_version=done.step,
            cursor=done.cursor,
            seconds=time.perf_counter() - self._started_s,
            accuracy=accuracy,
            ahead_seconds=None if ahead is None else ahead.seconds,
        )
        self._folder.sync_metrics()
        if await write_checkpoint(self._folder.checkpoints, state, save) is not None:
            prune(self._folder.checkpoints, keep_last=self._config.keep_last, keep_best=self._config.keep_best)


def _show(display: ProgressDisplay, record: Trained | Evaluated) -> None:
    if isinstance(record, Evaluated):
        report = record.report
        accuracy = "" if report.accuracy is None else f"accuracy {report.accuracy:.3f}  "
        divergence = "" if report.mean_divergence is None else f"divergence {report.mean_divergence:.4f} nats"
        display.note(f"held out after {record.step} steps: {accuracy}{divergence}")
        return
    display.step(
        StepLine(
            step=record.step,
            loss=record.training.loss,
            switch_rate=record.rollout.switch_rate,
            teacher_share=record.rollout.teacher_token_share,
            tokens_per_s=record.rollout.num_tokens / record.rollout.seconds,
            rollout_s=record.rollout.seconds,
            train_s=record.training.seconds,
            sync_s=record.sync.seconds,
            probe=record.sync.probe.rms,
        )
    )
