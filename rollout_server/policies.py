"""Switch policies: at which proposed position does the teacher take over? Pure functions of the scored positions.

A policy never calls an engine and never reads the run's configuration beyond its own settings. What it decides depends
only on what lies at and before a position, so judging a finished sequence gives the same switch as judging it chunk by
chunk ("online equals post hoc").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.config import SKD, AdaSwitch, Divergence, ForwardKL, OffPolicy, OnPolicy, Policy
from common.sequence import Floats, Ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredPositions:
    """All positions of a sequence up to the last one scored. n = their number."""

    first: int  # the first position not decided yet
    divergences: Floats  # [n] nats; NaN where the teacher wrote
    student_ranks: Ids  # [n] place of the student's token in the teacher's list, k outside it, -1 where it has none

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

    def exploration_limit(self) -> int | None:
        """Position at which the teacher takes over without looking at the student's tokens; None for nowhere."""
        ...

    def decide(self, scored: ScoredPositions) -> Decision: ...


class AdaSwitchPolicy:
    """AdaSwitch (arXiv 2510.07842): the first d_i above max(K * mean(d_{i-L} .. d_{i-1}), floor)."""

    guidance_tokens = None

    def __init__(self, settings: AdaSwitch) -> None:
        self._settings = settings

    def exploration_limit(self) -> None:
        return None

    def decide(self, scored: ScoredPositions) -> Decision:
        settings = self._settings
        average = moving_average(scored.divergences, settings.window, scored.first)
        thresholds = np.maximum(settings.multiplier * average, settings.floor).astype(np.float32)
        may_switch = np.arange(scored.first, scored.divergences.size) >= settings.first_position
        # A NaN threshold (window not filled) compares false: no switch.
        above = scored.divergences[scored.first :] > thresholds
        return Decision(thresholds=thresholds, switch=_first_true(may_switch & above, scored.first))


class SKDPolicy:
    """Speculative KD (arXiv 2410.11325): the student's token is outside the teacher's top k."""

    guidance_tokens = 1

    def __init__(self, settings: SKD) -> None:
        self._settings = settings

    def exploration_limit(self) -> None:
        return None

    def decide(self, scored: ScoredPositions) -> Decision:
        rejected = scored.student_ranks[scored.first :] >= self._settings.top_k
        return Decision(thresholds=_no_thresholds(scored), switch=_first_true(rejected, scored.first))


class OnPolicyPolicy:
    """The student writes everything."""

    guidance_tokens = None

    def exploration_limit(self) -> None:
        return None

    def decide(self, scored: ScoredPositions) -> Decision:
        return Decision(thresholds=_no_thresholds(scored), switch=None)


class OffPolicyPolicy(OnPolicyPolicy):
    """The teacher writes everything."""

    def exploration_limit(self) -> int:  # type: ignore[override]  # a limit where the parent has none
        return 0


_POLICIES: dict[type, Callable[[Any], SwitchPolicy]] = {
    AdaSwitch: AdaSwitchPolicy,
    SKD: SKDPolicy,
    OnPolicy: lambda _: OnPolicyPolicy(),
    OffPolicy: lambda _: OffPolicyPolicy(),
}


def make_policy(settings: Policy) -> SwitchPolicy:
    """The policy of these settings."""
    return _POLICIES[type(settings)](settings)


def divergence_of(settings: Policy) -> Divergence:
    """What the verifier computes for this policy. Forward KL where the policy itself looks at no divergence."""
    return settings.divergence if isinstance(settings, AdaSwitch) else ForwardKL()


def moving_average(divergences: Floats, window: int, first: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[n - first] nats. Mean of the ``window`` values before each position from ``first`` on.

    NaN where fewer values lie before it, or where one of them is NaN: the average starts anew after the teacher wrote.
    Values are added oldest first in float64, so the result does not depend on how the sequence was cut into chunks.
    """
    num_positions = divergences.size
    average = np.full(num_positions - first, np.nan)
    filled = max(first, window)
    if filled < num_positions:
        total = np.zeros(num_positions - filled)
        for age in range(window, 0, -1):
            total += divergences[filled - age : num_positions - age]
        average[filled - first :] = total / window
    return average


def _no_thresholds(scored: ScoredPositions) -> Floats:
    return np.full(scored.divergences.size - scored.first, np.nan, np.float32)


def _first_true(flags: np.ndarray[Any, np.dtype[np.bool_]], first: int) -> int | None:
    return first + int(flags.argmax()) if flags.any() else None
