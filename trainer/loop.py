"""START HERE for training. The whole run on one page: prompts -> collect -> train -> sync -> probe -> evaluate.

    PromptStream --prompts--> Rollouts --mixed sequences--> Learner --weights--> the student engines behind Rollouts

Owns the order of these steps, and how far rollouts may run ahead of training. It returns measurements; showing and
storing them, checkpoints included, is the caller's. Knows neither Ray nor vLLM: ``trainer/actors.py`` and the rollout
server's actors stand behind the two protocols.
"""

import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.config import Trainer
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.waiting import both
from common.weights import WeightVersion
from trainer.evaluate import evaluate
from trainer.learner import StepReport
from trainer.probe_statistics import ProbeReport
from trainer.prompts import PromptStream
from trainer.reports import Batch, Collected, Evaluated, StepDone, SyncReport, Trained, staleness, summarise

_MAX_PROBE_TOKENS = 256  # of a text: the learner reads it in float32, and a few hundred positions tell enough


class Rollouts(Protocol):
    """The rollout server, as the loop sees it. ``kept`` are sequences of the step that are already there, for its
    trace.
    """

    def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]: ...
    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]: ...
    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]: ...


class Learner(Protocol):
    """The learner, as the loop sees it."""

    async def step(self, references: Sequence[Any]) -> StepReport: ...
    async def sync(self, version: WeightVersion) -> None: ...
    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None: ...
    async def check_probe(
        self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]
    ) -> ProbeReport: ...


class StaleSequences(RuntimeError):
    """Sequences came back too old a second time: an engine does not hold the weights it was sent. Stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What evaluation needs."""

    prompts: Sequence[Prompt]
    every_steps: int
    answer_pattern: re.Pattern[str]
    decode: Callable[[Ids], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where the run begins. Past step 0 the learner holds that step's weights and the engines do not yet."""

    step: int = 0
    ahead: Batch | None = None  # the next step's sequences, where they had been collected already


BEGINNING = Start()


async def distill(
    config: Trainer,
    *,
    prompts: PromptStream,
    rollouts: Rollouts,
    learner: Learner,
    held_out: HeldOut | None,
    num_probe_prompts: int,
    start: Start = BEGINNING,
) -> AsyncGenerator[Trained | Evaluated | StepDone, None]:
    """Train up to step ``config.num_steps``, yielding each step's and each evaluation's measurements as they are made.

    The weights after step n are weight version n. With ``max_staleness`` 0 a step's sequences are written by the
    weights of the step before. With 1 the next step's are written while this one trains, and are whole before the
    new weights go out: no sequence is torn between two versions, rollouts are never more than one step ahead, and
    nothing is under way whenever this yields. A step without sequences trains nothing.

    Raises what the rollouts, the learner or the probe raise, and StaleSequences; closing the iterator ends what is
    being written.
    """
    if start.step > 0:
        probe_texts = probe_texts_of(prompts.peek(num_probe_prompts))
        await _synchronise(rollouts, learner, version=start.step, probe_texts=probe_texts)
    elif held_out is not None:
        yield await _evaluate(rollouts, held_out, step=0)
    batch = start.ahead
    for step in range(start.step + 1, config.num_steps + 1):
        if batch is None:
            batch = await _collect(rollouts, prompts.take(config.prompts_per_step), step=step)
        batch = await _refuse_stale(batch, rollouts, step=step, max_staleness=config.max_staleness)

        ahead: Batch | None = None
        if not batch.items:  # every prompt of it is set aside: the weights stay as they are
            await learner.sync(step)
        else:
            probe_texts = [_probe_text(sequence) for sequence in batch.sequences[:num_probe_prompts]]
            reading_s = await _read_before_step(rollouts, learner, probe_texts)
            references = [item.reference for item in batch.items]
            if config.max_staleness > 0 and step < config.num_steps:
                next_prompts = prompts.take(config.prompts_per_step)
                training, ahead = await both(learner.step(references), _collect(rollouts, next_prompts, step=step + 1))
            else:
                training = await learner.step(references)

            sync = await _synchronise(rollouts, learner, version=step, probe_texts=probe_texts, reading_s=reading_s)
            yield Trained(step=step, rollout=summarise(batch, version=step - 1), training=training, sync=sync)

        if held_out is not None and (step % held_out.every_steps == 0 or step == config.num_steps):
            yield await _evaluate(rollouts, held_out, step=step)
        yield StepDone(step=step, cursor=prompts.cursor, ahead=ahead)
        batch = ahead


async def _collect(
    rollouts: Rollouts, prompts: Sequence[Prompt], *, step: int, kept: Sequence[MixedSequence] = ()
) -> Batch:
    """The prompts' sequences, in the order of the prompts and not of arrival: the same sequences give the same step."""
    started_s = time.perf_counter()
    collected: list[Collected] = []
    async with aclosing(rollouts.collect(prompts, step, kept)) as sequences:
        async for sequence in sequences:
            collected.append(sequence)
    return Batch(items=sorted(collected, key=_sequence_id), seconds=time.perf_counter() - started_s)


async def _refuse_stale(batch: Batch, rollouts: Rollouts, *, step: int, max_staleness: int) -> Batch:
    """The batch, with the sequences that are too old to be trained in this step collected again, once."""

    def is_stale(item: Collected) -> bool:
        return (staleness(item.sequence, step - 1) or 0) > max_staleness

    refused = [item.sequence for item in batch.items if is_stale(item)]
    if not refused:
        return batch
    kept = [item for item in batch.items if not is_stale(item)]
    prompts = [sequence.prompt for sequence in refused]
    again = await _collect(rollouts, prompts, step=step, kept=[item.sequence for item in kept])
    if stale := [item.sequence.sequence_id for item in again.items if is_stale(item)]:
        raise StaleSequences(
            f"step {step} trains weight version {step - 1}; {len(stale)} of {len(refused)} sequences collected again "
            f"were still more than {max_staleness} versions older (trainer.max_staleness), the first {stale[0]}"
        )
    return Batch(
        items=sorted([*kept, *again.items], key=_sequence_id),
        seconds=batch.seconds + again.seconds,
        num_refused=len(refused),
    )


async def _read_before_step(rollouts: Rollouts, learner: Learner, probe_texts: Sequence[Ids]) -> float:
    """Have both sides read the probe texts with the old weights, for the check after the sync. The seconds it took."""
    started_s = time.perf_counter()
    await learner.read_probe(probe_texts, await rollouts.probe(probe_texts))
    return time.perf_counter() - started_s


async def _synchronise(
    rollouts: Rollouts,
    learner: Learner,
    *,
    version: WeightVersion,
    probe_texts: Sequence[Ids],
    reading_s: float = 0.0,
) -> SyncReport:
    """Bring the learner's weights to the student engines and check that they hold them."""
    started_s = time.perf_counter()
    await learner.sync(version)
    probe = await learner.check_probe(probe_texts, await rollouts.probe(probe_texts))
    return SyncReport(version=version, seconds=reading_s + time.perf_counter() - started_s, probe=probe)


async def _evaluate(rollouts: Rollouts, held_out: HeldOut, *, step: int) -> Evaluated:
    started_s = time.perf_counter()
    report = evaluate(await rollouts.evaluate(held_out.prompts), held_out.answer_pattern, held_out.decode)
    return Evaluated(step=step, report=report, seconds=time.perf_counter() - started_s)


def _sequence_id(item: Collected) -> str:
    return item.sequence.sequence_id


def _probe_text(sequence: MixedSequence) -> Ids:
    """[P + T - 1] Prompt and new tokens but the last: reading a text predicts one more token, for which a sequence that
    fills the context leaves no room.
    """
    text: Ids = np.concatenate([sequence.prompt.token_ids, sequence.token_ids[:-1]])[:_MAX_PROBE_TOKENS]
    return text


def probe_texts_of(prompts: Sequence[Prompt]) -> list[Ids]:
    """Each prompt once, however many samples of it are wanted."""
    return [prompt.token_ids[:_MAX_PROBE_TOKENS] for prompt in prompts if prompt.sample_index == 0]
