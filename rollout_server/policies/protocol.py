"""Input, output and interface of switch policies, and helpers that several policies share."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.sequence import Floats, Ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredPositions:
    """All positions of a sequence up to the last scored one. n = number of positions."""

    first: int  # the first undecided position
    divergences: Floats  # [n] nats; NaN at teacher tokens
    student_ranks: Ids  # [n] rank of the student's token in the teacher's list, k if outside it, -1 if there is none
    num_switches: int = 0  # so far

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.divergences.size, (self.first, self.divergences.size)
        assert self.divergences.size == self.student_ranks.size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """A policy's decision for the positions from ``first`` on. m = number of positions."""

    thresholds: Floats  # [m] nats; NaN where the policy has none
    switch: int | None  # the first position where the teacher takes over, or None to keep all


class SwitchPolicy(Protocol):
    """Decides when the teacher takes over, and for how long."""

    @property
    def guidance_tokens(self) -> int | None:
        """Number of tokens that the teacher generates at a switch, or None for all the rest."""
        ...

    def may_switch_after(self, num_switches: int) -> bool:
        """Whether the student's proposals can cause another switch after ``num_switches`` switches."""
        ...

    def uses_dataset_answer(self, sequence_seed: int) -> bool:
        """Whether the sequence is the prompt's dataset answer, so that no model generates."""
        ...

    def exploration_limit(self, sequence_seed: int) -> int | None:
        """Position where the teacher takes over regardless of the student's tokens, or None."""
        ...

    def decide(self, scored: ScoredPositions) -> Decision: ...

    def switch_is_likely(self, divergences: Floats) -> bool:
        """Whether a switch is more likely than usual in the next few positions, given the [n] nats so far."""
        ...


class ProposalBasedPolicy:
    """A policy that depends on the student's proposals."""

    def may_switch_after(self, num_switches: int) -> bool:
        return True

    def uses_dataset_answer(self, sequence_seed: int) -> bool:
        return False

    def exploration_limit(self, sequence_seed: int) -> None:
        return None

    def switch_is_likely(self, divergences: Floats) -> bool:
        return False


def no_thresholds(scored: ScoredPositions) -> Floats:
    """[m] NaN, for a policy without a threshold."""
    return np.full(scored.divergences.size - scored.first, np.nan, np.float32)


def first_true(flags: np.ndarray[Any, np.dtype[np.bool_]], first: int) -> int | None:
    """The position of the first True flag. ``flags`` [m] start at position ``first``."""
    return first + int(flags.argmax()) if flags.any() else None
