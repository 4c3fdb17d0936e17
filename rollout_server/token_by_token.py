"""Both engines advance one token at a time. For policies that replace single tokens often.

    student  --token-->  proposal  --teacher's row there-->  judge  -->  keep it, or take the teacher's token
                             ^                                                        |
                             +------------- both continue after that token -----------+

The teacher scores by generating: the token that it samples at a position is the replacement if the policy switches
there. No token is discarded and no token is scored twice, but each token costs the teacher a decode step.
"""

from contextlib import aclosing
from dataclasses import replace

from common.waiting import both
from rollout_server.engines.protocol import Engine, GoOn, next_piece
from rollout_server.judge import Judge
from rollout_server.policies import SwitchPolicy
from rollout_server.requests import Requests
from rollout_server.schedule import prefers_token_by_token
from rollout_server.sequence_builder import SequenceBuilder


class TokenByToken:
    """Token-by-token generation for one controller."""

    def __init__(
        self, *, student: Engine, teacher: Engine, policy: SwitchPolicy, judge: Judge, requests: Requests
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._policy = policy
        self._judge = judge
        self._requests = requests

    def is_worth_it(self, builder: SequenceBuilder, *, is_running: bool = False) -> bool:
        """Whether the sequence switches so often that this mode is faster. ``is_running``: the mode is active."""
        if self._policy.guidance_tokens != 1 or not self._policy.may_switch_after(builder.num_switches):
            return False
        return prefers_token_by_token(
            num_judged=builder.num_judged, num_switches=builder.num_switches, is_running=is_running
        )

    async def write(self, builder: SequenceBuilder) -> None:
        """Extend the sequence until it ends or switches have become rare.

        A paused stream keeps its slot in the engine. So the teacher's stream starts only after the student's stream has
        a slot. Otherwise there could be a deadlock: sequences that hold teacher slots wait for student slots, while
        sequences that hold student slots wait to be scored.
        """
        proposals_request = self._requests.after(builder, "student", max_tokens=builder.num_left, pause_after=1)
        rows_request = self._requests.after(builder, "teacher", max_tokens=builder.num_left, pause_after=1)
        rows_request = replace(rows_request, stop_token_ids=(), ignore_eos=True)
        async with (
            aclosing(self._student.stream(proposals_request)) as proposals,
            aclosing(self._teacher.stream(rows_request)) as rows,
        ):
            proposal = await next_piece(proposals)
            row = await next_piece(rows)
            while True:
                assert proposal is not None, "the student ended without a finish reason"
                assert row is not None, "the teacher ended before the text did"
                judged, switch = await self._judge.judge(builder, proposal, row.top)
                if switch is None:
                    builder.keep(judged)
                    builder.finish_reason = proposal.finish_reason
                else:
                    builder.num_wasted_tokens += 1
                    builder.take(self._requests.as_one_token(row), judged)
                if builder.finish_reason is not None or proposal.finish_reason is not None:
                    return
                if not self.is_worth_it(builder, is_running=True):
                    return
                go_on = GoOn(num_tokens=1, token_id=builder.last_token_id)
                proposal, row = await both(next_piece(proposals, go_on), next_piece(rows, go_on))
