"""Switch policies: at which proposed position does the teacher take over? Pure functions of the scored positions.

A policy never calls an engine and never reads the run's configuration beyond its own settings. What it decides depends
only on what lies at and before a position, so judging a finished sequence gives the same switch as judging it chunk by
chunk ("online equals post hoc").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.config import (
    JSD,
    SKD,
    AdaSwitch,
    Dataset,
    Decay,
    Divergence,
    Fixed,
    ForwardKL,
    Mixture,
    OffPolicy,
    OnPolicy,
    Policy,
    Relay,
)
from common.seeds import derive_seed
from common.sequence import Floats, Ids

_NEAR = 0.85
"""Share of a sequence's mean divergence below which its last few count as small. Changes speed, never the result."""


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


class _Watching:
    """A policy that decides by what the student proposes."""

    def watches_after(self, num_switches: int) -> bool:
        return True

    def takes_given_answer(self, sequence_seed: int) -> bool:
        return False

    def exploration_limit(self, sequence_seed: int) -> None:
        return None

    def is_near(self, divergences: Floats) -> bool:
        return False


class AdaSwitchPolicy(_Watching):
    """AdaSwitch (arXiv 2510.07842): the first d_i above max(K * mean(d_{i-L} .. d_{i-1}), floor)."""

    guidance_tokens = None

    def __init__(self, settings: AdaSwitch) -> None:
        self._settings = settings

    def decide(self, scored: ScoredPositions) -> Decision:
        settings = self._settings
        average = moving_average(scored.divergences, settings.window, scored.first)
        thresholds = np.maximum(settings.multiplier * average, settings.floor).astype(np.float32)
        may_switch = np.arange(scored.first, scored.divergences.size) >= settings.first_position
        # A NaN threshold (window not filled) compares false: no switch.
        above = scored.divergences[scored.first :] > thresholds
        return Decision(thresholds=thresholds, switch=_first_true(may_switch & above, scored.first))

    def is_near(self, divergences: Floats) -> bool:
        """Where the last L were small the threshold is, and an ordinary divergence crosses it."""
        settings = self._settings
        if divergences.size < settings.window:
            return False
        average = float(divergences[-settings.window :].mean())
        return settings.multiplier * average > settings.floor and average < _NEAR * float(divergences.mean())


class DecayPolicy(_Watching):
    """SWITCH (arXiv 2410.19503): JSD_i above tau_0 exp(-lambda i)."""

    guidance_tokens = 1

    def __init__(self, settings: Decay) -> None:
        self._settings = settings

    def decide(self, scored: ScoredPositions) -> Decision:
        positions = np.arange(scored.first, scored.divergences.size)
        thresholds = self._settings.initial_threshold * np.exp(-self._settings.rate * positions)
        thresholds = thresholds.astype(np.float32)
        above = scored.divergences[scored.first :] > thresholds
        return Decision(thresholds=thresholds, switch=_first_true(above, scored.first))


class SKDPolicy(_Watching):
    """Speculative KD (arXiv 2410.11325): the student's token is outside the teacher's top k."""

    guidance_tokens = 1

    def __init__(self, settings: SKD) -> None:
        self._settings = settings

    def decide(self, scored: ScoredPositions) -> Decision:
        rejected = scored.student_ranks[scored.first :] >= self._settings.top_k
        return Decision(thresholds=_no_thresholds(scored), switch=_first_true(rejected, scored.first))


class RelayPolicy(_Watching):
    """Relay-OPD (arXiv 2607.26057): as SKD, for a few tokens and a few times."""

    def __init__(self, settings: Relay) -> None:
        self._settings = settings
        self.guidance_tokens = settings.guidance_tokens

    def watches_after(self, num_switches: int) -> bool:
        return num_switches < self._settings.max_switches

    def decide(self, scored: ScoredPositions) -> Decision:
        rejected = scored.student_ranks[scored.first :] >= self._settings.top_k
        switch = _first_true(rejected, scored.first) if self.watches_after(scored.num_switches) else None
        return Decision(thresholds=_no_thresholds(scored), switch=switch)


class _Blind:
    """A policy that knows beforehand where the teacher takes over, and to the end."""

    guidance_tokens = None

    def watches_after(self, num_switches: int) -> bool:
        return False

    def takes_given_answer(self, sequence_seed: int) -> bool:
        return False

    def decide(self, scored: ScoredPositions) -> Decision:
        return Decision(thresholds=_no_thresholds(scored), switch=None)

    def is_near(self, divergences: Floats) -> bool:
        return False


class FixedPolicy(_Blind):
    """At one position: none for on-policy, 0 for off-policy."""

    def __init__(self, position: int | None) -> None:
        self._position = position

    def exploration_limit(self, sequence_seed: int) -> int | None:
        return self._position


class DatasetPolicy(FixedPolicy):
    """The given answer, always."""

    def __init__(self) -> None:
        super().__init__(None)

    def takes_given_answer(self, sequence_seed: int) -> bool:
        return True


class MixturePolicy(_Blind):
    """GKD (arXiv 2306.13649): with probability 1 - lambda the teacher from position 0, or the given answer."""

    def __init__(self, settings: Mixture) -> None:
        self._settings = settings

    def takes_given_answer(self, sequence_seed: int) -> bool:
        return self._settings.rest == "dataset" and not self._is_students(sequence_seed)

    def exploration_limit(self, sequence_seed: int) -> int | None:
        return None if self._is_students(sequence_seed) else 0

    def _is_students(self, sequence_seed: int) -> bool:
        draw = derive_seed(sequence_seed, "mixture") / 2**63
        return draw < self._settings.student_share


_POLICIES: dict[type, Callable[[Any], SwitchPolicy]] = {
    AdaSwitch: AdaSwitchPolicy,
    SKD: SKDPolicy,
    Decay: DecayPolicy,
    Relay: RelayPolicy,
    OnPolicy: lambda _: FixedPolicy(None),
    OffPolicy: lambda _: FixedPolicy(0),
    Dataset: lambda _: DatasetPolicy(),
    Mixture: MixturePolicy,
    Fixed: lambda settings: FixedPolicy(settings.position),
}


def make_policy(settings: Policy) -> SwitchPolicy:
    """The policy of these settings."""
    return _POLICIES[type(settings)](settings)


def divergence_of(settings: Policy) -> Divergence:
    """What the verifier computes for this policy. Forward KL where the policy itself looks at no divergence."""
    match settings:
        case AdaSwitch():
            return settings.divergence
        case Decay():
            return JSD()
        case _:
            return ForwardKL()


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
