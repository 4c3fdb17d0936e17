"""START HERE. One prompt's way to a mixed sequence.

    student  --stream-->  proposal  --teacher score-->  scores  --verifier-->  divergences  --policy-->  keep | switch
                             ^                                                                  |           |
                             +---------------------- the student never stopped ----------------+           v
                                                                            teacher generates from its cached prefix

Owns the order of these steps for one sequence, and how many sequences run at once. Knows nothing of Ray, vLLM, or which
replica answers. P = prompt tokens, T = new tokens, k = length of a top list.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from common.config import Policy, Sampling
from common.seeds import derive_seed
from common.sequence import MixedSequence, Prompt, TopLogprobs
from common.waiting import both
from rollout_server.dataset_answers import read_answer
from rollout_server.engines.protocol import Engine, GoOn, WriteRequest, Written, next_piece
from rollout_server.policies import ScoredPositions, divergence_of, make_policy
from rollout_server.reading import TeacherReading
from rollout_server.schedule import (
    goes_in_step,
    uninterrupted_chunk,
    until_pause_before_the_switch,
    until_pause_between_switches,
)
from rollout_server.sequence_builder import Draft, Judged
from rollout_server.teacher_token import can_draw, draw_place
from rollout_server.verdicts import Verdicts

logger = logging.getLogger(__name__)


class RolloutError(RuntimeError):
    """A sequence could not be written. Names the prompt and what failed."""

    def __init__(self, sequence_id: str, reason: str) -> None:
        super().__init__(sequence_id, reason)
        self.sequence_id = sequence_id
        self.reason = reason

    def __str__(self) -> str:
        return f"prompt {self.sequence_id}: {self.reason}"


class SwitchingController:
    """Writes mixed sequences under one switch policy. The result does not depend on any engine's timing.

    ``stop_token_ids`` must hold every token that ends a text of either engine. ``guidance_in_pieces`` lets a draft grow
    while the teacher writes, for who looks at it meanwhile; it changes no token.
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
        guidance_in_pieces: bool = False,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._policy_name = policy.type
        self._policy = make_policy(policy)
        self._verdicts = Verdicts(divergence_of(policy))
        self._sampling = sampling
        self._top_logprobs = top_logprobs
        self._stop_token_ids = stop_token_ids
        self._guidance_in_pieces = guidance_in_pieces

    async def collect(self, prompts: Sequence[Prompt]) -> AsyncGenerator[list[MixedSequence], None]:
        """Yield what has finished since the last yield, one sequence at least. A slow reader gets more at a time.

        Consumes prompts, at most ``sampling.max_in_flight`` at once; produces sequences in the order they finish; waits
        for the engines; stops when all are written, or when closed: then nothing keeps running in an engine.
        Raises RolloutError for the first prompt that fails, after handing over what was finished before it, and after
        ending the others.
        """
        num_at_once = min(len(prompts), self._sampling.max_in_flight)
        waiting = iter(prompts)
        finished: asyncio.Queue[MixedSequence | RolloutError] = asyncio.Queue()

        async def write_on() -> None:
            """Consumes the prompts that wait, one after the other; produces sequences; stops at an error."""
            for prompt in waiting:
                try:
                    finished.put_nowait(await self.generate(prompt, others_wait=len(prompts) > num_at_once))
                except Exception as error:
                    failure = RolloutError(prompt.sequence_id, f"{type(error).__name__}: {error}")
                    failure.__cause__ = error
                    finished.put_nowait(failure)
                    return

        tasks = [asyncio.create_task(write_on()) for _ in range(num_at_once)]
        try:
            num_left = len(prompts)
            while num_left:
                batch, failure = [], None
                first = await finished.get()
                for each in (first, *(finished.get_nowait() for _ in range(finished.qsize()))):
                    if isinstance(each, RolloutError):
                        failure = failure or each
                    else:
                        batch.append(each)
                if batch:
                    num_left -= len(batch)
                    yield batch
                if failure is not None:
                    logger.error("%s", failure, exc_info=failure.__cause__)
                    raise failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def generate(self, prompt: Prompt, *, others_wait: bool = False) -> MixedSequence:
        """Student and teacher write one sequence together, or the teacher reads the answer that was given.

        ``others_wait``: more sequences are to be written than the engines hold, so that whatever is written in vain
        takes the place of something else. Changes no token.
        """
        if self._policy.takes_given_answer(prompt.seed):
            return await read_answer(prompt, self._teacher, policy=self._policy_name, top_logprobs=self._top_logprobs)
        draft = Draft(prompt, self._top_logprobs)
        await self.write(draft, others_wait=others_wait)
        return draft.seal(self._policy_name)

    async def write(self, draft: Draft, *, others_wait: bool = False) -> None:
        """Go on until the draft is finished. It only grows, so whoever holds it may look at it meanwhile."""
        while draft.finish_reason is None:
            if self._goes_in_step(draft, is_in_step=False):
                await self._go_in_step(draft)
                continue
            teacher_takes_over, refused = await self._explore(draft, others_wait)
            if teacher_takes_over:
                await self._guide(draft, refused)

    async def _explore(self, draft: Draft, others_wait: bool) -> tuple[bool, Judged | None]:
        """The student writes until the policy switches or the sequence ends.

        Returns whether the teacher takes over at the draft's end, and the proposal it refused there, if there was one.
        """
        limit = self._policy.exploration_limit(draft.prompt.seed)
        last_position = self._sampling.max_new_tokens if limit is None else min(limit, self._sampling.max_new_tokens)
        if len(draft) >= last_position:
            return True, None
        # After guidance the teacher has the text in its cache: it is read with the first proposal.
        reading = TeacherReading(self._teacher, draft.text, draft.prompt.sequence_id, ahead=not draft.num_switches)
        finish_reason, go_on = None, None
        request = self._write_request(
            draft,
            "student",
            max_tokens=last_position - len(draft),
            pause_after=self._until_pause(draft, others_wait),
        )
        if not self._policy.watches_after(draft.num_switches):
            chunk_tokens = uninterrupted_chunk(
                max_new_tokens=self._sampling.max_new_tokens, chunk_tokens=request.chunk_tokens
            )
            request = replace(request, chunk_tokens=chunk_tokens)
        try:
            async with aclosing(self._student.stream(request)) as stream:
                while (proposal := await next_piece(stream, go_on)) is not None:
                    finish_reason = proposal.finish_reason
                    scores = await reading.scores(proposal, is_last=finish_reason is not None)
                    judged, switch = await self._judge(draft, proposal, scores)
                    if switch is not None:
                        draft.keep(judged[:switch])
                        draft.num_wasted_tokens += len(judged) - switch
                        return True, judged[switch : switch + 1]
                    draft.keep(judged)
                    go_on = GoOn(num_tokens=self._until_pause(draft, others_wait))
        finally:
            await reading.close()
        if finish_reason == "length" and len(draft) < self._sampling.max_new_tokens:
            return True, None
        draft.finish_reason = finish_reason
        return False, None

    def _until_pause(self, draft: Draft, others_wait: bool) -> int | None:
        """How many tokens the student writes before it waits for the verdict; None where it never does.

        One that can't be interrupted any more, or but once, while nobody waits for its place, runs on.
        """
        block_tokens = self._sampling.chunk_tokens
        if not self._policy.watches_after(draft.num_switches):
            return None
        if self._policy.guidance_tokens is not None:
            return until_pause_between_switches(
                num_judged=draft.num_judged, num_switches=draft.num_switches, block_tokens=block_tokens
            )
        if not others_wait:
            return None
        is_near = self._policy.is_near(draft.divergences)
        return until_pause_before_the_switch(text_tokens=draft.text.size, block_tokens=block_tokens, is_near=is_near)

    def _goes_in_step(self, draft: Draft, *, is_in_step: bool) -> bool:
        if self._policy.guidance_tokens != 1 or not self._policy.watches_after(draft.num_switches):
            return False
        return goes_in_step(num_judged=draft.num_judged, num_switches=draft.num_switches, is_in_step=is_in_step)

    async def _go_in_step(self, draft: Draft) -> None:
        """Both engines go over the same text token by token, until the sequence ends or switches have become rare.

        The student proposes. The teacher reads by writing too: what it would have written is its token at a switch.

        A paused stream keeps its place in its engine. So the teacher's begins when the student's has one: sequences
        that held the teacher's places and waited for the student's would wait for ever for those that hold them and
        have to be read.
        """
        max_tokens = self._sampling.max_new_tokens - len(draft)
        writes = self._write_request(draft, "student", max_tokens=max_tokens, pause_after=1)
        reads = self._write_request(draft, "teacher", max_tokens=max_tokens, pause_after=1)
        reads = replace(reads, stop_token_ids=(), ignore_eos=True)
        async with aclosing(self._student.stream(writes)) as proposals, aclosing(self._teacher.stream(reads)) as rows:
            proposal = await next_piece(proposals)
            row = await next_piece(rows)
            while True:
                assert proposal is not None, "the student ended without a finish reason"
                assert row is not None, "the teacher ended before the text did"
                judged, switch = await self._judge(draft, proposal, row.top)
                if switch is None:
                    draft.keep(judged)
                    draft.finish_reason = proposal.finish_reason
                else:
                    draft.num_wasted_tokens += 1
                    self._take(draft, self._with_finish_reason(row), judged)
                if draft.finish_reason is not None or proposal.finish_reason is not None:
                    return
                if not self._goes_in_step(draft, is_in_step=True):
                    return
                go_on = GoOn(num_tokens=1, token_id=draft.last_token_id)
                proposal, row = await both(next_piece(proposals, go_on), next_piece(rows, go_on))

    async def _judge(self, draft: Draft, proposal: Written, scores: TopLogprobs) -> tuple[Judged, int | None]:
        """What verifier and policy say of a proposal, and the index in it that the teacher takes, if any."""
        divergences = await self._verdicts.divergences(scores, proposal.top)
        student_ranks = scores.rank_of(proposal.token_ids)
        decision = self._policy.decide(
            ScoredPositions(
                first=len(draft),
                divergences=np.concatenate([draft.divergences, divergences]),
                student_ranks=np.concatenate([draft.student_ranks, student_ranks]),
                num_switches=draft.num_switches,
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
        return judged, None if decision.switch is None else decision.switch - len(draft)

    async def _guide(self, draft: Draft, refused: Judged | None) -> None:
        """The teacher writes from the draft's end, to the end of the sequence or for as long as the policy says."""
        remaining = self._sampling.max_new_tokens - len(draft)
        max_tokens = min(remaining, self._policy.guidance_tokens or remaining)
        request = self._write_request(draft, "teacher", max_tokens=max_tokens)
        if refused is not None and max_tokens == 1 and can_draw(self._sampling):
            self._take(draft, await self._draw(refused.teacher_top, request), refused)
        elif self._guidance_in_pieces:
            await self._take_pieces(draft, refused, request)
        else:
            self._take(draft, await self._teacher.generate(request), refused)

    async def _take_pieces(self, draft: Draft, refused: Judged | None, request: WriteRequest) -> None:
        """Take what the teacher writes as it comes."""
        is_switch = True
        async with aclosing(self._teacher.stream(request)) as pieces:
            async for piece in pieces:
                self._take(draft, piece, refused if is_switch else None, is_switch=is_switch)
                is_switch = False

    def _take(self, draft: Draft, guidance: Written, refused: Judged | None, *, is_switch: bool = True) -> None:
        """Append what the teacher wrote; it may end the sequence."""
        draft.take(guidance, refused, is_switch=is_switch)
        if guidance.finish_reason == "stop" or len(draft) >= self._sampling.max_new_tokens:
            draft.finish_reason = guidance.finish_reason

    async def _draw(self, row: TopLogprobs, request: WriteRequest) -> Written:
        """The teacher's next token from the row that is in hand; from the teacher only when it is not on the list."""
        place = draw_place(row, temperature=request.temperature, seed=request.seed)
        if place is None:
            listed = tuple(row.token_ids[0].tolist())
            # Another seed: that the first one led outside the list says something of what it would draw there.
            seed = derive_seed(request.seed, "unlisted")
            return await self._teacher.generate(replace(request, excluded_token_ids=listed, seed=seed))
        drawn = Written(
            token_ids=row.token_ids[0, place : place + 1],
            logprobs=row.logprobs[0, place : place + 1],
            top=row,
            weight_version=0,
            finish_reason=None,
        )
        return self._with_finish_reason(drawn)

    def _with_finish_reason(self, token: Written) -> Written:
        """One token of the teacher's as what it would have written when asked for no more."""
        return replace(token, finish_reason="stop" if int(token.token_ids[0]) in self._stop_token_ids else "length")

    def _write_request(
        self, draft: Draft, role: str, *, max_tokens: int, pause_after: int | None = None
    ) -> WriteRequest:
        return WriteRequest(
            prefix=draft.text,
            max_tokens=max_tokens,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=derive_seed(draft.prompt.seed, role, len(draft)),
            chunk_tokens=self._sampling.chunk_tokens,
            stop_token_ids=self._stop_token_ids,
            sequence_id=draft.prompt.sequence_id,
            pause_after=pause_after,
        )
