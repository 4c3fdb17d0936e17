"""A proposal's scores and divergences: the teacher's top-k lists along a growing text, compared with the student's.

Three parts, used in this order: ``TeacherScores`` requests the teacher's missing rows, ``Verifier`` batches the
comparisons that many sequences request in one turn of the event loop, and ``compare`` computes the divergence of two
lists at each position, which is a lower bound of the full-vocabulary divergence.

Buckets: every id that both lists contain; A, the ids that only the teacher lists; B, the ids that only the student
lists; R, the rest. p is the teacher, q the student. p is known on the shared ids and A, q on the shared ids and B.
Unknown are

    a = q(A) in [0, min(|A| q_min, 1 - q(listed))]        an id missing from a list holds at most its smallest entry
    b = p(B) in [0, min(|B| p_min, 1 - p(listed))]

An f-divergence on these buckets is jointly convex in (a, b). Its smallest value on that box is a lower bound of the
true divergence, because the true (a, b) lies in the box and merging ids into buckets never increases a divergence. If
no bound is active, the optimum spreads the unshared mass in one ratio, a = (1 - q(shared)) p(A) / (1 - p(shared)). If
one is active, the other coordinate's optimum moves, and one round of coordinate descent reaches it. If k is the
vocabulary size, A, B and R are empty and the value is exact.

n = positions, k = length of a list. Suffixes: _NK for a list's slots, _N for one value per position.
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
"""Smallest probability mass that float32 log-probs resolve. It is added to the unlisted mass: too large a value keeps
the lower bound valid, too small a value breaks it."""

_STEP = 1e-8
"""Nats. Divergences are rounded to this step. Smaller differences are rounding errors of the log-probs or of the sums.
They depend on which rows are computed together, and without a floor a policy would switch on them."""

_TINY = 1e-30

_BLOCK = 65_536
"""Approximate number of list entries (positions times k) per call. With k = 64 on one core, a position takes 5.5 us in
calls of 64 positions and 2.5 us in calls of 1,024. Larger calls are no faster and allocate new memory."""

_Pending = tuple[TopLogprobs, TopLogprobs, asyncio.Future[Floats]]


class TeacherScores:
    """The teacher's rows along one growing text. Tracks which rows are known, so that each is requested once.

    Every teacher call also predicts the next token. That row is kept and becomes the first of the next proposal's
    scores. So no call needs a row before the teacher's cached prefix, and the prompt's log-probs are never computed.

    With ``ahead`` the text is scored immediately, while the student generates its first proposal. Then no log-probs are
    computed for a long text that is not in the KV cache yet. Must be closed.
    """

    def __init__(self, teacher: Engine, text: Ids, sequence_id: str | None = None, *, ahead: bool = True) -> None:
        self._teacher = teacher
        self._sequence_id = sequence_id
        self._text = text
        self._next: TopLogprobs | None = None  # [1 row] for the next token
        self._first_score: asyncio.Future[TopLogprobs] | None = None
        if ahead:
            self._first_score = asyncio.ensure_future(self._score(text, start=text.size))

    async def of(self, proposal: Written, *, is_last: bool) -> TopLogprobs:
        """[len(proposal), k] The teacher's rows at the positions of the next consecutive student tokens.

        ``is_last``: no token follows the proposal. The row after it, whose position may exceed the context length, is
        then not requested.
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
        """Cancel the initial scoring if it is still running."""
        if self._first_score is not None:
            self._first_score.cancel()
            await asyncio.gather(self._first_score, return_exceptions=True)

    async def _score(self, text: Ids, *, start: int) -> TopLogprobs:
        return await self._teacher.score(ScoreRequest(token_ids=text, start=start, sequence_id=self._sequence_id))


class Verifier:
    """Runs ``compare`` with one divergence for many sequences at once. Belongs to one event loop.

    A comparison has a fixed cost per call and a small cost per position. All requests of one turn of the event loop are
    computed together, so a hundred sequences that advance together pay the fixed cost once.
    """

    def __init__(self, kind: Divergence) -> None:
        self._kind = kind
        self._pending: list[_Pending] = []

    async def divergences(self, teacher_top: TopLogprobs, student_top: TopLogprobs) -> Floats:
        """[n] nats. See ``compare``. A row's value does not depend on the rows computed with it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Floats] = loop.create_future()
        self._pending.append((teacher_top, student_top, answer))
        if len(self._pending) == 1:
            loop.call_soon(self._compute)
        return await answer

    def _compute(self) -> None:
        pending, self._pending = self._pending, []
        for block in _blocks([each for each in pending if not each[2].done()]):
            self._answer(block)

    def _answer(self, block: Sequence[_Pending]) -> None:
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


def _blocks(pending: Sequence[_Pending]) -> Iterator[list[_Pending]]:
    """Split the requests, in order, into blocks that end when they reach the block size."""
    block: list[_Pending] = []
    num_entries = 0
    for each in pending:
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
    student_mass: Floats  # [n] probability that the student's list covers
    teacher_mass: Floats  # [n]


def compare(teacher_top: TopLogprobs, student_top: TopLogprobs, kind: Divergence) -> Comparison:
    """A non-negative lower bound of the divergence at each position, from both models' lists (see module docstring)."""
    assert len(teacher_top) == len(student_top), (len(teacher_top), len(student_top))
    with torch.inference_mode():
        log_p_NM, log_q_NM, p_listed_N, q_listed_N = _aligned_buckets(teacher_top, student_top)
        values_N = (divergence(log_p_NM, log_q_NM, kind).clamp_min(0.0) / _STEP).round() * _STEP
    return Comparison(divergences=_floats(values_N), student_mass=_floats(q_listed_N), teacher_mass=_floats(p_listed_N))


def _aligned_buckets(teacher_top: TopLogprobs, student_top: TopLogprobs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of both models on [n, k + 3] buckets (the teacher's slots, A, B, R), and the two listed masses [n]."""
    # Copies: arrays from Ray are read-only, and torch warns about those.
    log_p_NK = torch.from_numpy(teacher_top.logprobs.astype(np.float64))
    log_q_NK = torch.from_numpy(student_top.logprobs.astype(np.float64))
    slot_NK, is_shared_q_NK = _slots(teacher_top, student_top)
    # The student's log-probs in the teacher's slots; ids that the teacher does not list go to a spare slot.
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
    # Rounding can leave mass in R for one model only. That must not give an infinite divergence.
    rest_p = torch.stack([p_A, p_B, (p_unlisted - p_B).clamp_min(_TINY)], dim=1).log()
    rest_q = torch.stack([q_A, q_B, (q_unlisted - q_A).clamp_min(_TINY)], dim=1).log()
    # Listed and unlisted mass may add up to slightly more than 1, which would change a KL divergence.
    return (
        torch.cat([shared_p_NK, rest_p], dim=1) - (p_listed_N + p_unlisted).log()[:, None],
        torch.cat([log_q_on_p_NK, rest_q], dim=1) - (q_listed_N + q_unlisted).log()[:, None],
        p_listed_N.clamp_max(1.0),
        q_listed_N.clamp_max(1.0),
    )


def _slots(teacher_top: TopLogprobs, student_top: TopLogprobs) -> tuple[Tensor, Tensor]:
    """For each id of the student's list [n, k]: its slot in the teacher's list (k if absent), and a flag if present.

    One sort of both lists' ids, with the slot number in the low bits. Equal neighbors are a shared id, and the
    teacher's slot comes first.
    """
    num_slots = teacher_top.k + student_top.k
    num_bits = (num_slots - 1).bit_length()
    slot_bits = (1 << num_bits) - 1
    keys_NM = np.concatenate([teacher_top.token_ids, student_top.token_ids], axis=1)
    if int(keys_NM.max(initial=0)).bit_length() + num_bits >= 32:
        keys_NM = keys_NM.astype(np.int64)  # twice the width takes twice the time
    keys_NM = (keys_NM << num_bits) | np.arange(num_slots, dtype=keys_NM.dtype)
    keys_NM.sort(axis=1)
    keys = keys_NM.ravel()
    is_pair = (keys[1:] ^ keys[:-1]) <= slot_bits
    is_pair[num_slots - 1 :: num_slots] = False  # the last key of one row and the first of the next
    pairs = np.flatnonzero(is_pair)
    teacher_slots, student_slots = keys[pairs] & slot_bits, keys[pairs + 1] & slot_bits
    slots_NK = np.full(student_top.token_ids.shape, teacher_top.k, np.int64)
    slots_NK[pairs // num_slots, student_slots - teacher_top.k] = teacher_slots
    slot_NK = torch.from_numpy(slots_NK)
    return slot_NK, slot_NK < teacher_top.k


def _closest_split(
    p_A: Tensor, q_B: Tensor, p_unlisted: Tensor, q_unlisted: Tensor, q_A_max: Tensor, p_B_max: Tensor
) -> tuple[Tensor, Tensor]:
    """(q(A), p(B)) in their box that minimize the divergence. All [n]. The module docstring explains why."""

    def best_p_B(q_A: Tensor) -> Tensor:
        return torch.minimum(p_unlisted * q_B / (q_B + q_unlisted - q_A).clamp_min(_TINY), p_B_max)

    def best_q_A(p_B: Tensor) -> Tensor:
        return torch.minimum(q_unlisted * p_A / (p_A + p_unlisted - p_B).clamp_min(_TINY), q_A_max)

    q_A = torch.minimum((q_B + q_unlisted) * p_A / (p_A + p_unlisted), q_A_max)
    p_B = best_p_B(q_A)
    return best_q_A(p_B), p_B


def _floats(values_N: Tensor) -> Floats:
    return values_N.numpy().astype(np.float32)
