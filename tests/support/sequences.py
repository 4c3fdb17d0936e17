"""Valid mixed sequences as the controller would build them, from random distributions over a few tokens."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from common.sequence import FinishReason, MixedSequence, Prompt, TokenSource, TopLogprobs

VOCABULARY_SIZE = 40


class MakeSequence(Protocol):
    def __call__(
        self,
        *,
        prompt_id: str = ...,
        epoch: int = ...,
        sample_index: int = ...,
        answer: str | None = ...,
        policy: str = ...,
        num_tokens: int = ...,
        switches: Sequence[int] = ...,
        guidance_tokens: int | None = ...,
        k: int = ...,
        weight_version: int = ...,
        finish_reason: FinishReason = ...,
        num_wasted_tokens: int = ...,
        seed: int = ...,
    ) -> MixedSequence: ...


def make_sequence(
    *,
    prompt_id: str = "p0",
    epoch: int = 0,
    sample_index: int = 0,
    answer: str | None = None,
    policy: str = "adaswitch",
    num_tokens: int = 12,
    switches: Sequence[int] = (5,),
    guidance_tokens: int | None = None,
    k: int = 8,
    weight_version: int = 0,
    finish_reason: FinishReason = "stop",
    num_wasted_tokens: int = 0,
    seed: int = 0,
) -> MixedSequence:
    """The student proposes up to and at each switch; from there the teacher writes ``guidance_tokens`` (None: all the
    rest). ``switches=[0]`` with None is off-policy: the student never proposes. Same arguments, same sequence.
    """
    assert all(switch < num_tokens for switch in switches), f"switches {switches} past {num_tokens} tokens"
    rng = np.random.default_rng(seed)
    sources = np.full(num_tokens, TokenSource.STUDENT, np.uint8)
    for switch in switches:
        end = num_tokens if guidance_tokens is None else switch + guidance_tokens
        sources[switch:end] = TokenSource.TEACHER
    is_student = sources == TokenSource.STUDENT
    proposed = is_student.copy()
    proposed[[switch for switch in switches if switch > 0 or guidance_tokens is not None]] = True

    student_top, teacher_top = _random_top(rng, num_tokens, k), _random_top(rng, num_tokens, k)
    proposals = student_top.token_ids[:, 0]
    token_ids = np.where(is_student, proposals, teacher_top.token_ids[:, 0]).astype(np.int32)
    unknown = TopLogprobs.unknown(num_tokens, k)
    student_top = TopLogprobs(
        np.where(proposed[:, None], student_top.token_ids, unknown.token_ids),
        np.where(proposed[:, None], student_top.logprobs, unknown.logprobs),
    )
    nan = np.float32(np.nan)
    return MixedSequence(
        prompt=Prompt(
            prompt_id=prompt_id,
            token_ids=rng.integers(0, VOCABULARY_SIZE, 4).astype(np.int32),
            seed=seed,
            epoch=epoch,
            sample_index=sample_index,
            answer=answer,
        ),
        policy=policy,
        token_ids=token_ids,
        sources=sources,
        divergences=np.where(proposed, rng.exponential(1.0, num_tokens).astype(np.float32), nan),
        thresholds=np.where(proposed & (np.arange(num_tokens) >= 3), np.float32(0.75), nan),
        student_ranks=np.where(proposed, teacher_top.rank_of(proposals), -1).astype(np.int32),
        student_logprobs=np.where(is_student, student_top.logprobs[:, 0], nan),
        teacher_logprobs=teacher_top.logprob_of(token_ids),
        student_top=student_top,
        teacher_top=teacher_top,
        weight_versions=np.where(proposed, weight_version, -1).astype(np.int32),
        switches=np.array(switches, np.int32),
        finish_reason=finish_reason,
        num_wasted_tokens=num_wasted_tokens,
    )


def _random_top(rng: np.random.Generator, num_rows: int, k: int) -> TopLogprobs:
    logits = rng.normal(0.0, 2.0, (num_rows, VOCABULARY_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    token_ids = np.argsort(-logprobs, axis=1)[:, :k]
    return TopLogprobs(token_ids.astype(np.int32), np.take_along_axis(logprobs, token_ids, axis=1).astype(np.float32))


def decode(token_ids: Sequence[int]) -> str:
    """Text of the tokens of ``make_sequence``: token 3 is ``t3 ``."""
    return "".join(token_texts(token_ids))


def token_texts(token_ids: Sequence[int]) -> list[str]:
    return [f"t{token_id} " for token_id in token_ids]
