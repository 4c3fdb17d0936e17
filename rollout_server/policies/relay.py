"""Relay: like SKD, for several tokens and a limited number of times."""

from common.config import Relay
from rollout_server.policies.protocol import Decision, ProposalBasedPolicy, ScoredPositions, first_true, no_thresholds


class RelayPolicy(ProposalBasedPolicy):
    """Relay-OPD (arXiv 2607.26057): like SKD, with guidance of several tokens and a limited number of switches."""

    def __init__(self, settings: Relay) -> None:
        self._settings = settings
        self.guidance_tokens = settings.guidance_tokens

    def may_switch_after(self, num_switches: int) -> bool:
        return num_switches < self._settings.max_switches

    def decide(self, scored: ScoredPositions) -> Decision:
        rejected = scored.student_ranks[scored.first :] >= self._settings.top_k
        switch = first_true(rejected, scored.first) if self.may_switch_after(scored.num_switches) else None
        return Decision(thresholds=no_thresholds(scored), switch=switch)
