"""Speculative KD: the teacher replaces tokens outside its own top k."""

from common.config import SKD
from rollout_server.policies.protocol import Decision, ProposalBasedPolicy, ScoredPositions, first_true, no_thresholds


class SKDPolicy(ProposalBasedPolicy):
    """Speculative KD (arXiv 2410.11325): the student's token is outside the teacher's top k."""

    guidance_tokens = 1

    def __init__(self, settings: SKD) -> None:
        self._settings = settings

    def decide(self, scored: ScoredPositions) -> Decision:
        rejected = scored.student_ranks[scored.first :] >= self._settings.top_k
        return Decision(thresholds=no_thresholds(scored), switch=first_true(rejected, scored.first))
