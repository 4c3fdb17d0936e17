"""A dataset answer as a sequence: no model generates it, and the teacher scores it once.

Owns the content of such a sequence's record. The controller decides which prompts use their dataset answer.
"""

import numpy as np

from common.sequence import MixedSequence, Prompt, TokenSource, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest


async def score_answer(prompt: Prompt, teacher: Engine, *, policy: str, top_logprobs: int) -> MixedSequence:
    """The prompt's dataset answer with the teacher's distribution at every token. The student is not involved.

    The last token is not sent: its row depends only on the tokens before it, and the context may have no room for it.
    """
    answer = prompt.answer_token_ids
    assert answer is not None, f"prompt {prompt.sequence_id} has no answer tokens"
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
