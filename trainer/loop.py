"""START HERE for training. The whole run in one file: prompts -> collect -> train -> sync -> probe -> evaluate.

    PromptStream --prompts--> Rollouts --mixed sequences--> Learner --weights--> the student engines behind Rollouts

Owns the order of these steps, and how far rollouts may run ahead of training. It returns measurements; the caller
shows and stores them, and writes checkpoints. Does not depend on Ray or vLLM: ``trainer/actors.py`` and the rollout
server's actors implement the two protocols.
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
from trainer.reports import Batch, Collected, Evaluated, StepDone, SyncReport, Trained, staleness, summarize

_MAX_PROBE_TOKENS = 256  # per text; the learner scores it in float32, and a few hundred positions are enough


class Rollouts(Protocol):
    """The rollout server, as the loop uses it. ``kept`` sequences of the step were collected before, for its trace."""

    def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]: ...
    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]: ...
    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]: ...


class Learner(Protocol):
    """The learner, as the loop uses it."""

    async def step(self, references: Sequence[Any]) -> StepReport: ...
    async def sync(self, version: WeightVersion) -> None: ...
    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None: ...
    async def check_probe(
        self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]
    ) -> ProbeReport: ...


class StaleSequences(RuntimeError):
    """Sequences were too old a second time: an engine does not hold the weights that it was sent. Ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Prompts and settings of the evaluation."""

    prompts: Sequence[Prompt]
    every_steps: int
    answer_pattern: re.Pattern[str]
    decode: Callable[[Ids], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The step at which the run begins. Unless it is 0, the learner already holds its weights, but the engines do
    not.
    """

    step: int = 0
    ahead: Batch | None = None  # the next step's sequences, if they were collected already


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
    """Train up to step ``config.num_steps``. Yields each step's and each evaluation's measurements as they are made.

    The weights after step n are weight version n. With ``max_staleness`` 0, the weights of the previous step generate
    a step's sequences. With 1, the next step's sequences are generated while this one trains, and are complete before
    the new weights are sent. So no sequence mixes two versions, rollouts are at most one step ahead, and nothing is
    running when this yields. A step without sequences trains nothing.

    Raises the errors of the rollouts, the learner and the probe, and StaleSequences. Closing the iterator stops the
    sequences that are being generated.
    """
    if start.step > 0:
        probe_texts = probe_texts_of(prompts.peek(num_probe_prompts))
        await _synchronize(rollouts, learner, version=start.step, probe_texts=probe_texts)
    elif held_out is not None:
        yield await _evaluate(rollouts, held_out, step=0)
    batch = start.ahead
    for step in range(start.step + 1, config.num_steps + 1):
        if batch is None:
            batch = await _collect(rollouts, prompts.take(config.prompts_per_step), step=step)
        batch = await _refuse_stale(batch, rollouts, step=step, max_staleness=config.max_staleness)

        ahead: Batch | None = None
        if not batch.items:  # all its prompts are quarantined, so the weights stay the same
            await learner.sync(step)
        else:
            probe_texts = [_probe_text(sequence) for sequence in batch.sequences[:num_probe_prompts]]
            scoring_s = await _score_before_step(rollouts, learner, probe_texts)
            references = [item.reference for item in batch.items]
            if config.max_staleness > 0 and step < config.num_steps:
                next_prompts = prompts.take(config.prompts_per_step)
                training, ahead = await both(learner.step(references), _collect(rollouts, next_prompts, step=step + 1))
            else:
                training = await learner.step(references)

            sync = await _synchronize(rollouts, learner, version=step, probe_texts=probe_texts, scoring_s=scoring_s)
            yield Trained(step=step, rollout=summarize(batch, version=step - 1), training=training, sync=sync)

        if held_out is not None and (step % held_out.every_steps == 0 or step == config.num_steps):
            yield await _evaluate(rollouts, held_out, step=step)
        yield StepDone(step=step, cursor=prompts.cursor, ahead=ahead)
        batch = ahead


async def _collect(
    rollouts: Rollouts, prompts: Sequence[Prompt], *, step: int, kept: Sequence[MixedSequence] = ()
) -> Batch:
    """The prompts' sequences, sorted by prompt and not by arrival, so that the same sequences give the same step."""
    started_s = time.perf_counter()
    collected: list[Collected] = []
    async with aclosing(rollouts.collect(prompts, step, kept)) as sequences:
        async for sequence in sequences:
            collected.append(sequence)
    return Batch(items=sorted(collected, key=_sequence_id), seconds=time.perf_counter() - started_s)


async def _refuse_stale(batch: Batch, rollouts: Rollouts, *, step: int, max_staleness: int) -> Batch:
    """The batch, after sequences that are too old for this step were collected again, once."""

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


async def _score_before_step(rollouts: Rollouts, learner: Learner, probe_texts: Sequence[Ids]) -> float:
    """Score the probe texts on both sides with the old weights, for the check after the sync. Returns the seconds."""
    started_s = time.perf_counter()
    await learner.read_probe(probe_texts, await rollouts.probe(probe_texts))
    return time.perf_counter() - started_s


async def _synchronize(
    rollouts: Rollouts,
    learner: Learner,
    *,
    version: WeightVersion,
    probe_texts: Sequence[Ids],
    scoring_s: float = 0.0,
) -> SyncReport:
    """Send the learner's weights to the student engines and check that they hold them."""
    started_s = time.perf_counter()
    await learner.sync(version)
    probe = await learner.check_probe(probe_texts, await rollouts.probe(probe_texts))
    return SyncReport(version=version, seconds=scoring_s + time.perf_counter() - started_s, probe=probe)


async def _evaluate(rollouts: Rollouts, held_out: HeldOut, *, step: int) -> Evaluated:
    started_s = time.perf_counter()
    report = evaluate(await rollouts.evaluate(held_out.prompts), held_out.answer_pattern, held_out.decode)
    return Evaluated(step=step, report=report, seconds=time.perf_counter() - started_s)


def _sequence_id(item: Collected) -> str:
    return item.sequence.sequence_id


def _probe_text(sequence: MixedSequence) -> Ids:
    """[P + T - 1] Prompt and new tokens without the last. Scoring a text predicts one more token, and a sequence that
    fills the context has no room for it.
    """
    text: Ids = np.concatenate([sequence.prompt.token_ids, sequence.token_ids[:-1]])[:_MAX_PROBE_TOKENS]
    return text


def probe_texts_of(prompts: Sequence[Prompt]) -> list[Ids]:
    """The tokens of each prompt, once even if it has several samples."""
    return [prompt.token_ids[:_MAX_PROBE_TOKENS] for prompt in prompts if prompt.sample_index == 0]
