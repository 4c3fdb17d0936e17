"""A given answer as a sequence: nobody writes it, the teacher reads it once.

Owns what such a sequence's record holds. Knows no policy: whether a prompt's answer is taken is the controller's.
"""

import numpy as np

from common.sequence import MixedSequence, Prompt, TokenSource, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest


async def read_answer(prompt: Prompt, teacher: Engine, *, policy: str, top_logprobs: int) -> MixedSequence:
    """The prompt's own answer with the teacher's distribution at every token. The student has no part in it.

    The last token is not sent: its row is the one after all before it, and the context may have no room for one more.
    """
    answer = prompt.answer_token_ids
    assert answer is not None, f"prompt {prompt.sequence_id} came without its answer's tokens"
    num_tokens = answer.size
    teacher_top = await teacher.score(
        ScoreRequest(
            token_ids=np.concatenate([prompt.token_ids, answer[:-1]]),
            start=prompt.token_ids.size,
            sequence_id=prompt.sequence_id,
        )
    )
    nothing = np.full(num_tokens, np.nan, np.float32)
    return MixedSequence(
        prompt=prompt,
        policy=policy,
        token_ids=answer,
        sources=np.full(num_tokens, TokenSource.DATASET, np.uint8),
        divergences=nothing,
        thresholds=nothing,
        student_ranks=np.full(num_tokens, -1, np.int32),
        student_logprobs=nothing,
        teacher_logprobs=teacher_top.logprob_of(answer),
        student_top=TopLogprobs.unknown(num_tokens, top_logprobs),
        teacher_top=teacher_top,
        weight_versions=np.full(num_tokens, -1, np.int32),
        switches=np.empty(0, np.int32),
        finish_reason="stop",
        num_wasted_tokens=0,
    )
