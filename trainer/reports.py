"""The loop's reports of its steps, and the summary of a step's sequences. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.sequence import MixedSequence
from common.weights import WeightVersion
from trainer.evaluate import EvaluationReport
from trainer.learner import StepReport
from trainer.probe_statistics import ProbeReport
from trainer.prompts import PromptCursor


class Collected(Protocol):
    """A sequence to read, and a reference to pass on without a copy."""

    @property
    def sequence(self) -> MixedSequence: ...
    @property
    def reference(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's sequences, collected and not trained yet, in the order of their prompts."""

    items: Sequence[Collected]
    seconds: float  # time to collect them
    num_refused: int = 0  # sequences that were too old and were collected again

    @property
    def sequences(self) -> list[MixedSequence]:
        return [item.sequence for item in self.items]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """Summary of one step's sequences. None if no sequence switched, none was scored, or the student generated none."""

    num_sequences: int
    num_tokens: int
    switch_rate: float  # fraction of the sequences that have a switch
    teacher_token_share: float
    mean_switch_position: float | None  # of each sequence's first switch
    mean_divergence: float | None  # nats, over the positions where the student proposed
    num_wasted_tokens: int
    num_refused: int
    mean_staleness: float | None  # weight versions between a sequence's oldest proposal and the weights trained
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One weight sync: send, load and probe. The probe's report is the one of the replica that differs most."""

    version: WeightVersion
    seconds: float
    probe: ProbeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The measurements of one step of the loop."""

    step: int
    rollout: RolloutReport
    training: StepReport
    sync: SyncReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Evaluation of the weights after ``step`` steps; 0 for the weights at the beginning of the run."""

    step: int
    report: EvaluationReport
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """All of ``step`` has been reported and nothing is running, so that a checkpoint can be taken.

    Together with the learner's state, this is all that the run needs to resume as if it had not stopped.
    """

    step: int
    cursor: PromptCursor  # prompts before it have been trained, or are in ``ahead``
    ahead: Batch | None  # the next step's sequences, if they were collected already


def staleness(sequence: MixedSequence, version: WeightVersion) -> int | None:
    """Weight versions between the sequence's oldest proposal and ``version``. None if the student proposed none."""
    versions = sequence.weight_versions[sequence.weight_versions >= 0]
    return version - int(versions.min()) if versions.size else None


def summarize(batch: Batch, *, version: WeightVersion) -> RolloutReport:
    """Summary of a step's sequences, which are trained with the weights ``version``."""
    sequences = batch.sequences
    num_tokens = sum(map(len, sequences))
    switches = [sequence.first_switch for sequence in sequences if sequence.first_switch is not None]
    divergences = np.concatenate([sequence.divergences for sequence in sequences]).astype(np.float64)
    known = divergences[~np.isnan(divergences)]
    ages = [age for sequence in sequences if (age := staleness(sequence, version)) is not None]
    return RolloutReport(
        num_sequences=len(sequences),
        num_tokens=num_tokens,
        switch_rate=len(switches) / len(sequences),
        teacher_token_share=sum(sequence.num_teacher_tokens for sequence in sequences) / num_tokens,
        mean_switch_position=float(np.mean(switches)) if switches else None,
        mean_divergence=float(known.mean()) if known.size else None,
        num_wasted_tokens=sum(sequence.num_wasted_tokens for sequence in sequences),
        num_refused=batch.num_refused,
        mean_staleness=float(np.mean(ages)) if ages else None,
        seconds=batch.seconds,
    )
