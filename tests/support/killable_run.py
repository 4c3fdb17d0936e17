"""A small run that can be killed: ``python -m tests.support.killable_run CONFIG [--resume]``.

Everything but Ray and vLLM is the product's: loop, learner, controller, traces, checkpoints, the run's folder. The
student engine writes by another script for each weight version, so that a resumed run whose engine holds any other
version than the uninterrupted run's ends with other weights. Not a test: test_resume.py starts it, kills it and looks.
"""

import asyncio
import os
import random
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.config import RunConfig
from common.config.source import read_config
from common.run_dir import RunDir
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.weights import WeightUpdate
from deploy.preflight import Inputs
from deploy.reporting.progress import ProgressDisplay
from deploy.run.copies import fetch_if_ahead
from deploy.run.resume import find_resumable, refuse_other_settings
from deploy.run.run import RunActors, run
from rollout_server.engines.replicas import ReplicatedEngine
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from rollout_server.rollouts import Rollouts, RolloutSpec
from tests.support.unprobed import Unprobed
from trainer.learner import Learner, StepReport

TOP_LOGPROBS = 8
EOS_TOKEN_ID = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A sequence without an object store."""

    sequence: MixedSequence

    @property
    def reference(self) -> MixedSequence:
        return self.sequence

    @classmethod
    def put(cls, sequence: MixedSequence) -> "Collected":
        return cls(sequence=sequence)


class LocalRollouts:
    """Rollouts in this process."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        async for finished in self._rollouts.collect(prompts, step, kept):
            for sequence in finished:
                yield Collected(sequence=sequence)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        return await self._rollouts.evaluate(prompts)

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        return await self._rollouts.probe(texts)


class LocalLearner(Unprobed):
    """The learner in a thread of this process; a sync gives the engine the version's script."""

    def __init__(self, learner: Learner, student: ScriptedEngine) -> None:
        self._learner = learner
        self._student = student

    async def step(self, references: Sequence[MixedSequence]) -> StepReport:
        return await asyncio.to_thread(self._learner.step, list(references))

    async def sync(self, version: int) -> None:
        await self._student.load_weights(WeightUpdate(version=version))

    async def save(self, folder: Path) -> None:
        await asyncio.to_thread(self._learner.save, folder)

    async def save_state(self, folder: Path) -> None:
        await asyncio.to_thread(self._learner.save_state, folder)

    async def load_state(self, folder: Path) -> None:
        await asyncio.to_thread(self._learner.load_state, folder)


@asynccontextmanager
async def started_actors(
    config: RunConfig, inputs: Inputs, folder: RunDir, display: ProgressDisplay
) -> AsyncIterator[RunActors]:
    """Scripted engines, which take their time so that a kill finds a batch half collected, and a real learner."""
    teacher_script = HashedScript(vocabulary_size=len(inputs.tokenizer), seed=1, eos_token_id=EOS_TOKEN_ID)
    delays = random.Random(os.getpid())  # another timing in every process; the sequences must not depend on it

    def engine(script: HashedScript | None = None) -> ScriptedEngine:
        return ScriptedEngine(
            script or teacher_script.student(seed=0),
            top_logprobs=TOP_LOGPROBS,
            delay=lambda: delays.uniform(0.0, 0.01),
            script_of=lambda update: teacher_script.student(seed=update.version),
        )

    student = engine()
    spec = RolloutSpec(
        policy=config.policy,
        sampling=config.sampling,
        trace=config.trace,
        trace_folder=folder.traces,
        top_logprobs=TOP_LOGPROBS,
        stop_token_ids=(EOS_TOKEN_ID,),
    )
    rollouts = Rollouts(
        spec, student=ReplicatedEngine([student]), teacher=engine(teacher_script), decoder=inputs.tokenizer
    )
    learner = Learner(config.models.student, config.trainer, seed=config.seed)
    yield RunActors(rollouts=LocalRollouts(rollouts), learner=LocalLearner(learner, student), put=Collected.put)


def main(path: str, *, resume: bool) -> None:
    resolved = read_config(path)
    if resume:
        fetch_if_ahead(resolved.config)
    resumed = find_resumable(resolved.config) if resume else None
    if resumed is not None:
        refuse_other_settings(resumed.folder, resolved)
    asyncio.run(run(resolved, partial(started_actors, resolved.config), resumed))


if __name__ == "__main__":
    main(sys.argv[1], resume="--resume" in sys.argv[2:])
