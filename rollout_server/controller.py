"""START HERE. How one prompt becomes a mixed sequence.

    student  --stream-->  proposal  --teacher score-->  scores  --verifier-->  divergences  --policy-->  keep | switch
                             ^                                                                  |           |
                             +---------------------- the student never stopped ----------------+           v
                                                                            teacher generates from its cached prefix

Owns the order of these steps for one sequence; ``pool`` runs many sequences concurrently. Does not know about Ray,
vLLM, or which replica answers. P = prompt tokens, T = new tokens, k = length of a top-k list.
"""

from contextlib import aclosing
from dataclasses import replace

from common.config import Policy, Sampling
from common.sequence import MixedSequence, Prompt
from rollout_server.dataset_answers import score_answer
from rollout_server.engines.protocol import Engine, GoOn, WriteRequest, next_piece
from rollout_server.judge import Judge
from rollout_server.policies import divergence_of, make_policy
from rollout_server.requests import Requests
from rollout_server.schedule import uninterrupted_chunk, until_pause_before_the_switch, until_pause_between_switches
from rollout_server.sequence_builder import Judged, SequenceBuilder
from rollout_server.teacher_token import can_draw, draw_token
from rollout_server.token_by_token import TokenByToken
from rollout_server.verifier import TeacherScores, Verifier


class SwitchingController:
    """Generates mixed sequences under one switch policy. The result does not depend on any engine's timing.

    ``stop_token_ids`` must contain every token that ends the generation of either engine. With ``live``, the tokens
    of both models are always appended in chunks, so that they can be displayed early. It does not change any token.
    """

    def __init__(
        self,
        *,
        student: Engine,
        teacher: Engine,
        policy: Policy,
        sampling: Sampling,
        top_logprobs: int,
        stop_token_ids: tuple[int, ...],
        live: bool = False,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._policy_name = policy.type
        self._policy = make_policy(policy)
        self._judge = Judge(self._policy, Verifier(divergence_of(policy)))
        self._sampling = sampling
        self._requests = Requests(sampling=sampling, stop_token_ids=stop_token_ids)
        self._token_by_token = TokenByToken(
            student=student, teacher=teacher, policy=self._policy, judge=self._judge, requests=self._requests
        )
        self._top_logprobs = top_logprobs
        self._live = live

    async def generate(self, prompt: Prompt, *, others_wait: bool = False) -> MixedSequence:
        """The sequence that student and teacher generate together, or the dataset answer scored by the teacher.

        ``others_wait``: there are more sequences to generate than the engines can run at once, so a discarded token
        takes a slot from another sequence. It does not change any token.
        """
        if self._policy.uses_dataset_answer(prompt.seed):
            return await score_answer(prompt, self._teacher, policy=self._policy_name, top_logprobs=self._top_logprobs)
        builder = self.new_builder(prompt)
        await self.write(builder, others_wait=others_wait)
        return builder.seal(self._policy_name)

    def new_builder(self, prompt: Prompt) -> SequenceBuilder:
        """An empty sequence to pass to ``write``."""
        return SequenceBuilder(prompt, self._top_logprobs, max_new_tokens=self._sampling.max_new_tokens)

    async def write(self, builder: SequenceBuilder, *, others_wait: bool = False) -> None:
        """Generate until the sequence is finished. The builder only grows, so the caller may read it at any time."""
        while builder.finish_reason is None:
            if self._token_by_token.is_worth_it(builder):
                await self._token_by_token.write(builder)
                continue
            teacher_takes_over, refused = await self._explore(builder, others_wait)
            if teacher_takes_over:
                await self._guide(builder, refused)

    async def _explore(self, builder: SequenceBuilder, others_wait: bool) -> tuple[bool, Judged | None]:
        """The student generates until the policy switches or the sequence ends.

        Returns whether the teacher takes over at the builder's end, and the rejected proposal there, if any.
        """
        max_new_tokens = self._sampling.max_new_tokens
        limit = self._policy.exploration_limit(builder.prompt.seed)
        last_position = max_new_tokens if limit is None else min(limit, max_new_tokens)
        if len(builder) >= last_position:
            return True, None
        # After guidance the text is already in the teacher's KV cache, and is scored with the first proposal.
        scores = TeacherScores(self._teacher, builder.text, builder.prompt.sequence_id, ahead=not builder.num_switches)
        finish_reason, go_on = None, None
        try:
            request = self._exploration_request(builder, last_position, others_wait)
            async with aclosing(self._student.stream(request)) as stream:
                while (proposal := await next_piece(stream, go_on)) is not None:
                    finish_reason = proposal.finish_reason
                    proposal_scores = await scores.of(proposal, is_last=finish_reason is not None)
                    judged, switch = await self._judge.judge(builder, proposal, proposal_scores)
                    if switch is not None:
                        builder.keep(judged[:switch])
                        builder.num_wasted_tokens += len(judged) - switch
                        return True, judged[switch : switch + 1]
                    builder.keep(judged)
                    go_on = GoOn(num_tokens=self._until_pause(builder, others_wait))
        finally:
            await scores.close()
        if finish_reason == "length" and len(builder) < max_new_tokens:
            return True, None
        builder.finish_reason = finish_reason
        return False, None

    def _exploration_request(self, builder: SequenceBuilder, last_position: int, others_wait: bool) -> WriteRequest:
        request = self._requests.after(
            builder,
            "student",
            max_tokens=last_position - len(builder),
            pause_after=self._until_pause(builder, others_wait),
        )
        if self._live or self._policy.may_switch_after(builder.num_switches):
            return request
        chunk_tokens = uninterrupted_chunk(
            max_new_tokens=self._sampling.max_new_tokens, chunk_tokens=request.chunk_tokens
        )
        return replace(request, chunk_tokens=chunk_tokens)

    def _until_pause(self, builder: SequenceBuilder, others_wait: bool) -> int | None:
        """Number of tokens that the student generates before it waits for the verdict, or None if it never waits.

        It does not wait if no more switches can happen. If only one more can happen (guidance runs to the end), it
        waits only if other sequences need its slot.
        """
        block_tokens = self._sampling.chunk_tokens
        if not self._policy.may_switch_after(builder.num_switches):
            return None
        if self._policy.guidance_tokens is not None:
            return until_pause_between_switches(
                num_judged=builder.num_judged, num_switches=builder.num_switches, block_tokens=block_tokens
            )
        if not others_wait:
            return None
        switch_is_likely = self._policy.switch_is_likely(builder.divergences)
        return until_pause_before_the_switch(
            text_tokens=builder.text.size, block_tokens=block_tokens, switch_is_likely=switch_is_likely
        )

    async def _guide(self, builder: SequenceBuilder, refused: Judged | None) -> None:
        """The teacher generates from the builder's end, up to the policy's limit or the end of the sequence."""
        max_tokens = min(builder.num_left, self._policy.guidance_tokens or builder.num_left)
        request = self._requests.after(builder, "teacher", max_tokens=max_tokens)
        if refused is not None and max_tokens == 1 and can_draw(self._sampling):
            token = await draw_token(refused.teacher_top, request, self._teacher)
            builder.take(self._requests.as_one_token(token), refused)
        elif self._live:
            is_switch = True
            async with aclosing(self._teacher.stream(request)) as pieces:
                async for piece in pieces:
                    builder.take(piece, refused if is_switch else None, is_switch=is_switch)
                    is_switch = False
        else:
            builder.take(await self._teacher.generate(request), refused)
