"""AdaSwitch: the threshold is a multiple of the moving average of the preceding divergences."""

from typing import Any

import numpy as np

from common.config import AdaSwitch
from common.sequence import Floats
from rollout_server.policies.protocol import Decision, ProposalBasedPolicy, ScoredPositions, first_true

_NEAR = 0.85
"""A recent mean below this share of the sequence's mean divergence counts as small. Affects speed, never the result."""


class AdaSwitchPolicy(ProposalBasedPolicy):
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
        return Decision(thresholds=thresholds, switch=first_true(may_switch & above, scored.first))

    def switch_is_likely(self, divergences: Floats) -> bool:
        """True if the last L divergences were small: then the threshold is low, and an ordinary one exceeds it."""
        settings = self._settings
        if divergences.size < settings.window:
            return False
        average = float(divergences[-settings.window :].mean())
        return settings.multiplier * average > settings.floor and average < _NEAR * float(divergences.mean())


def moving_average(divergences: Floats, window: int, first: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[n - first] nats. Mean of the ``window`` values before each position, for positions from ``first`` on.

    NaN if there are fewer values, or if one of them is NaN: the average starts again after teacher tokens. Values are
    added in float64, oldest first, so the result does not depend on how the sequence was split into chunks.
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
