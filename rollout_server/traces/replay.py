"""What a switch policy would have decided on recorded sequences. No engine: only the policies and what was recorded.

A policy sees the same prefix as the recording only up to where the teacher took over, so what is asked is where it
would have switched *first*; from there on the text would have been another one.
"""

from dataclasses import dataclass
from typing import Literal

from common.sequence import FinishReason, Floats, Ids
from rollout_server.policies import ScoredPositions, SwitchPolicy

Outcome = Literal["switch", "no_switch", "unknown"]
Reason = Literal["policy", "student_finished", "length_limit", "given_answer", "teacher_had_taken_over"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedSequence:
    """What a policy can be asked about. T = new tokens."""

    sequence_id: str
    step: int
    seed: int
    finish_reason: FinishReason
    first_switch: int | None
    is_given_answer: bool
    divergences: Floats  # [T] nats; NaN where the student did not propose
    student_ranks: Ids  # [T] -1 where the student did not propose

    @property
    def num_judgeable(self) -> int:
        """Positions at which the student's own proposal, on the student's own text, was scored."""
        if self.first_switch is None:
            return self.divergences.size
        return self.first_switch + int(self.student_ranks[self.first_switch] >= 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What the policy would have done first."""

    outcome: Outcome
    reason: Reason
    first_switch: int | None


def replay(policy: SwitchPolicy, recorded: RecordedSequence) -> Replayed:
    """Judge one recorded sequence. ``unknown`` where the recording ends before the policy's answer is certain."""
    if policy.takes_given_answer(recorded.seed):
        return Replayed(outcome="no_switch", reason="given_answer", first_switch=None)
    limit = policy.exploration_limit(recorded.seed)
    if limit == 0:
        return Replayed(outcome="switch", reason="policy", first_switch=0)
    if recorded.is_given_answer:
        return Replayed(outcome="unknown", reason="given_answer", first_switch=None)
    switch = _first_switch(policy, limit, recorded)
    if switch is not None:
        return Replayed(outcome="switch", reason="policy", first_switch=switch)
    if recorded.first_switch is not None:
        return Replayed(outcome="unknown", reason="teacher_had_taken_over", first_switch=None)
    reason: Reason = "student_finished" if recorded.finish_reason == "stop" else "length_limit"
    return Replayed(outcome="no_switch", reason=reason, first_switch=None)


def _first_switch(policy: SwitchPolicy, limit: int | None, recorded: RecordedSequence) -> int | None:
    """The first position the policy takes among those it can judge."""
    num_judgeable = recorded.num_judgeable
    if limit is not None:
        # The text before the position where the teacher had taken over is the student's, so that position counts too.
        last = recorded.divergences.size - 1 if recorded.first_switch is None else recorded.first_switch
        return limit if limit <= last else None
    if num_judgeable == 0:
        return None
    scored = ScoredPositions(
        first=0,
        divergences=recorded.divergences[:num_judgeable],
        student_ranks=recorded.student_ranks[:num_judgeable],
    )
    return policy.decide(scored).switch
