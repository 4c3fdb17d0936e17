"""What a switch policy would have decided on recorded sequences. Uses only policies and recordings, no engine.

A policy sees the same prefix as the recording only up to the recorded switch. So the replay finds where the policy
would have switched *first*; after that the text would have been different.
"""

from dataclasses import dataclass
from typing import Literal

from common.sequence import FinishReason, Floats, Ids
from rollout_server.policies import ScoredPositions, SwitchPolicy

Outcome = Literal["switch", "no_switch", "unknown"]
Reason = Literal["policy", "student_finished", "length_limit", "given_answer", "teacher_had_taken_over"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedSequence:
    """The recorded values that a policy needs. T = new tokens."""

    sequence_id: str
    step: int
    seed: int
    finish_reason: FinishReason
    first_switch: int | None
    is_given_answer: bool
    divergences: Floats  # [T] nats; NaN where the student made no proposal
    student_ranks: Ids  # [T] -1 where the student made no proposal

    @property
    def num_judgeable(self) -> int:
        """Number of positions where the student's proposal, after only student tokens, was scored."""
        if self.first_switch is None:
            return self.divergences.size
        return self.first_switch + int(self.student_ranks[self.first_switch] >= 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The policy's first decision."""

    outcome: Outcome
    reason: Reason
    first_switch: int | None


def replay(policy: SwitchPolicy, recorded: RecordedSequence) -> Replayed:
    """Replay one sequence. ``unknown`` if the recording ends before the policy's decision is certain."""
    if policy.uses_dataset_answer(recorded.seed):
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
    """The first position where the policy switches, among those that it can judge."""
    num_judgeable = recorded.num_judgeable
    if limit is not None:
        # Before the recorded switch the text is the student's, so that position counts too.
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
