"""What a switch policy sees and says, and what several policies share."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.sequence import Floats, Ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredPositions:
    """All positions of a sequence up to the last one scored. n = their number."""

    first: int  # the first position not decided yet
    divergences: Floats  # [n] nats; NaN where the teacher wrote
    student_ranks: Ids  # [n] place of the student's token in the teacher's list, k outside it, -1 where it has none
    num_switches: int = 0  # so far

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.divergences.size, (self.first, self.divergences.size)
        assert self.divergences.size == self.student_ranks.size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """What a policy says of the positions from ``first`` on. m = their number."""

    thresholds: Floats  # [m] nats; NaN where the policy has none
    switch: int | None  # the first position the teacher takes, None to keep all


class SwitchPolicy(Protocol):
    """When the teacher takes over, and for how long."""

    @property
    def guidance_tokens(self) -> int | None:
        """How many tokens the teacher writes at a switch; None for all the rest."""
        ...

    def watches_after(self, num_switches: int) -> bool:
        """Whether, after so many switches, what the student proposes can bring another one on."""
        ...

    def takes_given_answer(self, sequence_seed: int) -> bool:
        """Whether the prompt's own answer is the sequence, and nobody writes."""
        ...

    def exploration_limit(self, sequence_seed: int) -> int | None:
        """Position at which the teacher takes over without looking at the student's tokens; None for nowhere."""
        ...

    def decide(self, scored: ScoredPositions) -> Decision: ...

    def is_near(self, divergences: Floats) -> bool:
        """Whether a switch is likelier than usual in the next few positions, by the [n] nats so far."""
        ...


class Watching:
    """A policy that decides by what the student proposes."""

    def watches_after(self, num_switches: int) -> bool:
        return True

    def takes_given_answer(self, sequence_seed: int) -> bool:
        return False

    def exploration_limit(self, sequence_seed: int) -> None:
        return None

    def is_near(self, divergences: Floats) -> bool:
        return False


def no_thresholds(scored: ScoredPositions) -> Floats:
    """[m] NaN, for a policy without a threshold."""
    return np.full(scored.divergences.size - scored.first, np.nan, np.float32)


def first_true(flags: np.ndarray[Any, np.dtype[np.bool_]], first: int) -> int | None:
    """The position of the first flag that is set; ``flags`` [m] start at position ``first``."""
    return first + int(flags.argmax()) if flags.any() else None
