"""SWITCH: the threshold decays with the position."""

import numpy as np

from common.config import Decay
from rollout_server.policies.protocol import Decision, ProposalBasedPolicy, ScoredPositions, first_true


class DecayPolicy(ProposalBasedPolicy):
    """SWITCH (arXiv 2410.19503): JSD_i above tau_0 exp(-lambda i)."""

    guidance_tokens = 1

    def __init__(self, settings: Decay) -> None:
        self._settings = settings

    def decide(self, scored: ScoredPositions) -> Decision:
        positions = np.arange(scored.first, scored.divergences.size)
        thresholds = self._settings.initial_threshold * np.exp(-self._settings.rate * positions)
        thresholds = thresholds.astype(np.float32)
        above = scored.divergences[scored.first :] > thresholds
        return Decision(thresholds=thresholds, switch=first_true(above, scored.first))
