"""A proposal's scores and divergences: the teacher's top-k lists along a growing text, compared with the student's.

Three parts, used in this order: ``TeacherScores`` asks the teacher for the rows that are not known yet, ``Verifier``
compares what many sequences ask for in one turn of the event loop, and ``compare`` computes the divergence of two lists
per position, a lower bound of the full-vocabulary one.

Buckets: every id both lists hold; A, the ids only the teacher lists; B, the ids only the student lists; R, the rest.
p is the teacher, q the student. Known are p on the shared ids and A, q on the shared ids and B. Not known are

    a = q(A) in [0, min(|A| q_min, 1 - q(listed))]        an id missing from a list holds at most its smallest entry
    b = p(B) in [0, min(|B| p_min, 1 - p(listed))]

An f-divergence on these buckets is jointly convex in (a, b); its smallest value on that box is a lower bound of the
true one, because the true (a, b) lies in the box and merging ids into buckets never increases a divergence. Where no
bound is active the optimum spreads the unshared mass in one ratio, a = (1 - q(shared)) p(A) / (1 - p(shared)); where
one is, the other coordinate's optimum moves, and one round of coordinate steps reaches it. With k = vocabulary A, B
and R are empty and the value is exact.

n = positions, k = length of a list. Suffixes: _NK over a list's slots, _N one value a position.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.config import Divergence
from common.divergence import divergence
from common.sequence import Floats, Ids, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest, Written

_RESOLUTION = 1e-6
"""Mass that float32 log-probs can't tell from none. Added to the unlisted mass: too large keeps the bound, too small
breaks it."""

_STEP = 1e-8
"""Nats. Values are rounded to it. What lies below is rounding error, of the log-probs or of these sums; it would differ
with the rows that happen to be computed together, and with no floor a policy would switch on it."""

_TINY = 1e-30

_BLOCK = 65_536
"""Entries of the lists (positions times k) in one call, about. With k = 64 on one core, a position takes 5.5 us in
calls of 64 positions and 2.5 in calls of 1,024; larger ones gain nothing and touch fresh memory."""

_Waiting = tuple[TopLogprobs, TopLogprobs, asyncio.Future[Floats]]


class TeacherScores:
    """The teacher's rows along one text that grows. Owns which rows are known, so that each is asked for once.

    Every teacher call also predicts the token to come. That row is kept and becomes the first of the next proposal's
    scores, so no call needs a row before the teacher's cached prefix, and a prompt costs no log-probs.

    With ``ahead`` the text is scored at once, while the student writes its first proposal. That spares the log-probs of
    a long text that is in no cache yet. Must be closed.
    """

    def __init__(self, teacher: Engine, text: Ids, sequence_id: str | None = None, *, ahead: bool = True) -> None:
        self._teacher = teacher
        self._sequence_id = sequence_id
        self._text = text
        self._next: TopLogprobs | None = None  # [1 row] of the token to come
        self._first_score: asyncio.Future[TopLogprobs] | None = None
        if ahead:
            self._first_score = asyncio.ensure_future(self._score(text, start=text.size))

    async def of(self, proposal: Written, *, is_last: bool) -> TopLogprobs:
        """[len(proposal), k] The teacher's row at each position of the next consecutive piece of student text.

        ``is_last``: no other token is to come after it. The row of the token to come, which might lie beyond the
        context, is then not asked for.
        """
        text = np.concatenate([self._text, proposal.token_ids])
        readable = text[:-1] if is_last else text
        if self._first_score is not None:
            self._next, self._first_score = await self._first_score, None
        rows = [] if self._next is None else [self._next]
        start = self._text.size + len(rows)
        if start <= readable.size:
            rows.append(await self._score(readable, start=start))
        known = TopLogprobs.concatenate(rows)
        self._text = text
        self._next = None if is_last else known[len(proposal) :]
        return known[: len(proposal)]

    async def close(self) -> None:
        """Cancel a score ahead that is still running."""
        if self._first_score is not None:
            self._first_score.cancel()
            await asyncio.gather(self._first_score, return_exceptions=True)

    async def _score(self, text: Ids, *, start: int) -> TopLogprobs:
        return await self._teacher.score(ScoreRequest(token_ids=text, start=start, sequence_id=self._sequence_id))


class Verifier:
    """``compare`` under one divergence, for many sequences at once. Belongs to one event loop.

    The cost of a comparison is a fixed one per call and a small one per position. What is asked for in one turn of the
    event loop is computed as one, so a hundred sequences that move together pay the fixed cost once.
    """

    def __init__(self, kind: Divergence) -> None:
        self._kind = kind
        self._asked: list[_Waiting] = []

    async def divergences(self, teacher_top: TopLogprobs, student_top: TopLogprobs) -> Floats:
        """[n] nats. See ``verifier.compare``; a row's value does not depend on what is computed beside it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Floats] = loop.create_future()
        self._asked.append((teacher_top, student_top, answer))
        if len(self._asked) == 1:
            loop.call_soon(self._compute)
        return await answer

    def _compute(self) -> None:
        asked, self._asked = self._asked, []
        for block in _blocks([each for each in asked if not each[2].done()]):
            self._answer(block)

    def _answer(self, block: Sequence[_Waiting]) -> None:
        try:
            values = compare(
                TopLogprobs.concatenate([teacher for teacher, _, _ in block]),
                TopLogprobs.concatenate([student for _, student, _ in block]),
                self._kind,
            ).divergences
        except Exception as error:
            for _, _, answer in block:
                answer.set_exception(error)
            return
        end = 0
        for teacher, _, answer in block:
            start, end = end, end + len(teacher)
            answer.set_result(values[start:end])


def _blocks(asked: Sequence[_Waiting]) -> Iterator[list[_Waiting]]:
    """What is asked for, in order, in pieces that end where they reach a block's size."""
    block: list[_Waiting] = []
    num_entries = 0
    for each in asked:
        block.append(each)
        num_entries += each[0].token_ids.size
        if num_entries >= _BLOCK:
            yield block
            block, num_entries = [], 0
    if block:
        yield block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """How far apart the two models are at n positions."""

    divergences: Floats  # [n] nats
    student_mass: Floats  # [n] probability the student's list covers
    teacher_mass: Floats  # [n]


def compare(teacher_top: TopLogprobs, student_top: TopLogprobs, kind: Divergence) -> Comparison:
    """Lower bound of the divergence at each position, never negative, from the two models' lists (see above)."""
    assert len(teacher_top) == len(student_top), (len(teacher_top), len(student_top))
    with torch.inference_mode():
        log_p_NM, log_q_NM, p_listed_N, q_listed_N = _aligned_buckets(teacher_top, student_top)
        values_N = (divergence(log_p_NM, log_q_NM, kind).clamp_min(0.0) / _STEP).round() * _STEP
    return Comparison(divergences=_floats(values_N), student_mass=_floats(q_listed_N), teacher_mass=_floats(p_listed_N))


def _aligned_buckets(teacher_top: TopLogprobs, student_top: TopLogprobs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of both models on [n, k + 3] buckets (the teacher's slots, A, B, R), and the two listed masses [n]."""
    # Copies: what came through Ray can't be written to, which torch warns of.
    log_p_NK = torch.from_numpy(teacher_top.logprobs.astype(np.float64))
    log_q_NK = torch.from_numpy(student_top.logprobs.astype(np.float64))
    slot_NK, is_shared_q_NK = _slots(teacher_top, student_top)
    # The student's log-probs laid out on the teacher's slots; ids the teacher does not list fall on a spare slot.
    no_mass = torch.full((len(teacher_top), teacher_top.k + 1), -torch.inf, dtype=torch.float64)
    log_q_on_p_NK = no_mass.scatter(1, slot_NK, log_q_NK)[:, :-1]
    is_shared_p_NK = torch.zeros_like(no_mass, dtype=torch.bool).scatter(1, slot_NK, True)[:, :-1]

    p_NK, q_NK = log_p_NK.exp(), log_q_NK.exp()
    p_A, num_A = (p_NK * ~is_shared_p_NK).sum(1), (~is_shared_p_NK).sum(1)
    q_B, num_B = (q_NK * ~is_shared_q_NK).sum(1), (~is_shared_q_NK).sum(1)
    p_listed_N, q_listed_N = p_NK.sum(1), q_NK.sum(1)
    p_unlisted = (1.0 - p_listed_N).clamp_min(0.0) + _RESOLUTION
    q_unlisted = (1.0 - q_listed_N).clamp_min(0.0) + _RESOLUTION
    q_A, p_B = _closest_split(
        p_A, q_B, p_unlisted, q_unlisted, torch.minimum(num_A * q_NK[:, -1], q_unlisted),
        torch.minimum(num_B * p_NK[:, -1], p_unlisted),
    )  # fmt: skip
    shared_p_NK = log_p_NK.where(is_shared_p_NK, -torch.inf)
    # Rounding can leave R with mass on one side alone, which must not read as an infinite divergence.
    rest_p = torch.stack([p_A, p_B, (p_unlisted - p_B).clamp_min(_TINY)], dim=1).log()
    rest_q = torch.stack([q_A, q_B, (q_unlisted - q_A).clamp_min(_TINY)], dim=1).log()
    # What is listed and what is not may add up to a little more than 1, which a KL would see.
    return (
        torch.cat([shared_p_NK, rest_p], dim=1) - (p_listed_N + p_unlisted).log()[:, None],
        torch.cat([log_q_on_p_NK, rest_q], dim=1) - (q_listed_N + q_unlisted).log()[:, None],
        p_listed_N.clamp_max(1.0),
        q_listed_N.clamp_max(1.0),
    )


def _slots(teacher_top: TopLogprobs, student_top: TopLogprobs) -> tuple[Tensor, Tensor]:
    """For each id of the student's list [n, k]: its slot in the teacher's list (k where it has none), and whether.

    One sort of both lists' ids, each with its slot in the bits below it: equal neighbours are a shared id, the
    teacher's slot first.
    """
    num_slots = teacher_top.k + student_top.k
    num_bits = (num_slots - 1).bit_length()
    slot_bits = (1 << num_bits) - 1
    keys_NM = np.concatenate([teacher_top.token_ids, student_top.token_ids], axis=1)
    if int(keys_NM.max(initial=0)).bit_length() + num_bits >= 32:
        keys_NM = keys_NM.astype(np.int64)  # twice as wide, twice the time
    keys_NM = (keys_NM << num_bits) | np.arange(num_slots, dtype=keys_NM.dtype)
    keys_NM.sort(axis=1)
    keys = keys_NM.ravel()
    is_pair = (keys[1:] ^ keys[:-1]) <= slot_bits
    is_pair[num_slots - 1 :: num_slots] = False  # of one row's last and the next one's first
    pairs = np.flatnonzero(is_pair)
    teacher_slots, student_slots = keys[pairs] & slot_bits, keys[pairs + 1] & slot_bits
    slots_NK = np.full(student_top.token_ids.shape, teacher_top.k, np.int64)
    slots_NK[pairs // num_slots, student_slots - teacher_top.k] = teacher_slots
    slot_NK = torch.from_numpy(slots_NK)
    return slot_NK, slot_NK < teacher_top.k


def _closest_split(
    p_A: Tensor, q_B: Tensor, p_unlisted: Tensor, q_unlisted: Tensor, q_A_max: Tensor, p_B_max: Tensor
) -> tuple[Tensor, Tensor]:
    """(q(A), p(B)) in their box that bring the two distributions closest. All [n]; module docstring for the why."""

    def best_p_B(q_A: Tensor) -> Tensor:
        return torch.minimum(p_unlisted * q_B / (q_B + q_unlisted - q_A).clamp_min(_TINY), p_B_max)

    def best_q_A(p_B: Tensor) -> Tensor:
        return torch.minimum(q_unlisted * p_A / (p_A + p_unlisted - p_B).clamp_min(_TINY), q_A_max)

    q_A = torch.minimum((q_B + q_unlisted) * p_A / (p_A + p_unlisted), q_A_max)
    p_B = best_p_B(q_A)
    return best_q_A(p_B), p_B


def _floats(values_N: Tensor) -> Floats:
    return values_N.numpy().astype(np.float32)
