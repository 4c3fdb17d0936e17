"""START HERE for training. The whole run on one page: prompts -> collect -> train -> sync -> probe -> evaluate.

    PromptStream --prompts--> Rollouts --mixed sequences--> Learner --weights--> the student engines behind Rollouts

Owns the order of these steps. It returns measurements; showing and storing them is the caller's. Knows neither Ray nor
vLLM: ``trainer/actors.py`` and the rollout server's actors stand behind the two protocols.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.config import Trainer
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.weights import WeightVersion
from trainer.evaluate import EvaluationReport, evaluate
from trainer.learner import StepReport
from trainer.probe import ProbeReport
from trainer.prompts import PromptStream


class Collected(Protocol):
    """A sequence to look at, and a reference to pass on without copying it."""

    @property
    def sequence(self) -> MixedSequence: ...
    @property
    def reference(self) -> Any: ...


class Rollouts(Protocol):
    """The rollout server, as the loop sees it."""

    def collect(self, prompts: Sequence[Prompt], step: int) -> AsyncGenerator[Collected, None]: ...
    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]: ...
    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]: ...


class Learner(Protocol):
    """The learner, as the loop sees it."""

    async def step(self, references: Sequence[Any]) -> StepReport: ...
    async def sync(self, version: WeightVersion) -> None: ...
    async def check_probe(self, texts: Sequence[Ids], rows: list[TopLogprobs]) -> ProbeReport: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What evaluation needs."""

    prompts: Sequence[Prompt]
    every_steps: int
    answer_pattern: re.Pattern[str]
    decode: Callable[[Ids], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """One step's sequences. None where no sequence switched, or none was judged."""

    num_sequences: int
    num_tokens: int
    switch_rate: float  # share of the sequences with a switch
    teacher_token_share: float
    mean_switch_position: float | None  # of each sequence's first switch
    mean_divergence: float | None  # nats, over the positions where the student proposed
    num_wasted_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One weight sync: send and load, then the probe; that of the replica that differs most."""

    version: WeightVersion
    seconds: float
    probe: ProbeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One step of the loop."""

    step: int
    rollout: RolloutReport
    training: StepReport
    sync: SyncReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The weights after ``step`` steps, 0 for those the run began with."""

    step: int
    report: EvaluationReport
    seconds: float


async def distill(
    config: Trainer,
    *,
    prompts: PromptStream,
    rollouts: Rollouts,
    learner: Learner,
    held_out: HeldOut | None,
    num_probe_prompts: int,
) -> AsyncIterator[Trained | Evaluated]:
    """Train for ``config.num_steps`` steps, yielding each step's and each evaluation's measurements as they are made.

    Strictly on-policy: a step's sequences are written by the weights of the step before. Raises what the rollouts, the
    learner or the probe raise; closing the iterator ends what is being written.
    """
    if held_out is not None:
        yield await _evaluate(rollouts, held_out, step=0)
    for step in range(1, config.num_steps + 1):
        started_s = time.perf_counter()
        collected: list[Collected] = []
        async with aclosing(rollouts.collect(prompts.take(config.prompts_per_step), step)) as sequences:
            async for sequence in sequences:
                collected.append(sequence)
        # In the order of the prompts, not of arrival: the same sequences give the same step.
        collected.sort(key=lambda item: item.sequence.sequence_id)
        rollout = summarise([item.sequence for item in collected], seconds=time.perf_counter() - started_s)

        training = await learner.step([item.reference for item in collected])
        probe_texts = [_probe_text(item.sequence) for item in collected[:num_probe_prompts]]
        sync = await _synchronise(rollouts, learner, version=step, probe_texts=probe_texts)
        yield Trained(step=step, rollout=rollout, training=training, sync=sync)

        if held_out is not None and (step % held_out.every_steps == 0 or step == config.num_steps):
            yield await _evaluate(rollouts, held_out, step=step)


async def _synchronise(
    rollouts: Rollouts, learner: Learner, *, version: WeightVersion, probe_texts: Sequence[Ids]
) -> SyncReport:
    """Bring the learner's weights to the student engines and check that both now say the same."""
    started_s = time.perf_counter()
    await learner.sync(version)
    probes = [await learner.check_probe(probe_texts, rows) for rows in await rollouts.probe(probe_texts)]
    worst = max(probes, key=lambda probe: probe.max_difference)
    return SyncReport(version=version, seconds=time.perf_counter() - started_s, probe=worst)


async def _evaluate(rollouts: Rollouts, held_out: HeldOut, *, step: int) -> Evaluated:
    started_s = time.perf_counter()
    report = evaluate(await rollouts.evaluate(held_out.prompts), held_out.answer_pattern, held_out.decode)
    return Evaluated(step=step, report=report, seconds=time.perf_counter() - started_s)


def summarise(sequences: list[MixedSequence], *, seconds: float) -> RolloutReport:
    """What a step's sequences look like together."""
    num_tokens = sum(map(len, sequences))
    switches = [sequence.first_switch for sequence in sequences if sequence.first_switch is not None]
    divergences = np.concatenate([sequence.divergences for sequence in sequences]).astype(np.float64)
    judged = divergences[~np.isnan(divergences)]
    return RolloutReport(
        num_sequences=len(sequences),
        num_tokens=num_tokens,
        switch_rate=len(switches) / len(sequences),
        teacher_token_share=sum(sequence.num_teacher_tokens for sequence in sequences) / num_tokens,
        mean_switch_position=float(np.mean(switches)) if switches else None,
        mean_divergence=float(judged.mean()) if judged.size else None,
        num_wasted_tokens=sum(sequence.num_wasted_tokens for sequence in sequences),
        seconds=seconds,
    )


def _probe_text(sequence: MixedSequence) -> Ids:
    """[P + T - 1] Prompt and new tokens but the last: reading a text predicts one more token, for which a sequence that
    fills the context leaves no room.
    """
    return np.concatenate([sequence.prompt.token_ids, sequence.token_ids[:-1]])
