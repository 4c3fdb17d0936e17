"""The verdict on a proposal: divergences from the verifier, the switch from the policy. Calls no engine."""

import numpy as np

from common.sequence import TopLogprobs
from rollout_server.engines.protocol import Written
from rollout_server.policies import ScoredPositions, SwitchPolicy
from rollout_server.sequence_builder import Judged, SequenceBuilder
from rollout_server.verifier import Verifier


class Judge:
    """Applies one policy and one verifier. Belongs to one event loop, like the verifier."""

    def __init__(self, policy: SwitchPolicy, verifier: Verifier) -> None:
        self._policy = policy
        self._verifier = verifier

    async def judge(
        self, builder: SequenceBuilder, proposal: Written, scores: TopLogprobs
    ) -> tuple[Judged, int | None]:
        """The proposal [n] with its scores and thresholds, and the index where the teacher takes over, if any.

        ``scores`` [n, k] are the teacher's rows at the proposal's positions, which follow the builder's end.
        """
        divergences = await self._verifier.divergences(scores, proposal.top)
        student_ranks = scores.rank_of(proposal.token_ids)
        decision = self._policy.decide(
            ScoredPositions(
                first=len(builder),
                divergences=np.concatenate([builder.divergences, divergences]),
                student_ranks=np.concatenate([builder.student_ranks, student_ranks]),
                num_switches=builder.num_switches,
            )
        )
        judged = Judged(
            token_ids=proposal.token_ids,
            student_logprobs=proposal.logprobs,
            student_top=proposal.top,
            teacher_top=scores,
            divergences=divergences,
            thresholds=decision.thresholds,
            student_ranks=student_ranks,
            weight_version=proposal.weight_version,
        )
        return judged, None if decision.switch is None else decision.switch - len(builder)
