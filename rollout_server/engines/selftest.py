"""Before anything is trained: do both models mean the same tokens, and do the engines' numbers mean what we think?

Each check raises UserError with one line that says what was found and what to change.
"""

from collections.abc import Mapping

import numpy as np

from common.errors import UserError
from common.sequence import Ids, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest, WriteRequest

_NUM_TOKENS = 8
_TOLERANCE = 0.1  # nats; float32 differs by 1e-5, bfloat16 by some 1e-2, a shifted or tempered row by far more


def check_tokenizers(student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
    """Both vocabularies (token -> id) must give every id the same token.

    Padding of the embedding beyond the vocabulary is not part of it and may differ. Raises UserError naming up to three
    ids that differ.
    """
    student_tokens = {token_id: token for token, token_id in student.items()}
    teacher_tokens = {token_id: token for token, token_id in teacher.items()}
    differing = [
        token_id
        for token_id in sorted(student_tokens.keys() | teacher_tokens.keys())
        if student_tokens.get(token_id) != teacher_tokens.get(token_id)
    ]
    if differing:
        examples = ", ".join(
            f"id {token_id} is {_quoted(student_tokens.get(token_id))} for the student and "
            f"{_quoted(teacher_tokens.get(token_id))} for the teacher"
            for token_id in differing[:3]
        )
        raise UserError(
            f"models.student and models.teacher must share a tokenizer, but {len(differing)} ids differ: {examples}; "
            "choose two models of one family"
        )


async def check_engine(engine: Engine, *, name: str, prefix: Ids, top_logprobs: int) -> None:
    """Writes a few tokens and reads them back. ``prefix`` [P] is any short prompt.

    Checks: k log-probs a row, best first and none positive; raw log-probs (the same at another temperature); score rows
    belong to the positions asked for (the tokens' own rows, not their neighbours').
    """
    request = WriteRequest(
        prefix=prefix, max_tokens=_NUM_TOKENS, temperature=0.0, top_p=1.0, seed=0, chunk_tokens=_NUM_TOKENS
    )
    greedy = await engine.generate(request)
    _check_rows(greedy.top, name, top_logprobs)

    hot_request = WriteRequest(
        prefix=prefix, max_tokens=1, temperature=2.0, top_p=1.0, seed=0, chunk_tokens=_NUM_TOKENS
    )
    hot = await engine.generate(hot_request)
    if (difference := _row_distance(greedy.top, 0, hot.top, 0)) > _TOLERANCE:
        raise UserError(
            f"{name} engine: log-probs change with the temperature (by {difference:.2g} nats); "
            'expected raw ones, as with logprobs_mode="raw_logprobs"'
        )

    text = np.concatenate([prefix, greedy.token_ids[:-1]])
    scores = await engine.score(ScoreRequest(token_ids=text, start=prefix.size))
    _check_rows(scores, name, top_logprobs)
    if len(scores) != len(greedy):
        raise UserError(f"{name} engine: score gave {len(scores)} rows, expected {len(greedy)}")
    _check_alignment(greedy.top, scores, name)


def _check_rows(rows: TopLogprobs, name: str, top_logprobs: int) -> None:
    if rows.k != top_logprobs:
        raise UserError(f"{name} engine: gives {rows.k} log-probs a position, expected {top_logprobs}")
    if not (rows.logprobs <= 1e-4).all() or (np.diff(rows.logprobs, axis=1) > 0).any():
        raise UserError(f"{name} engine: log-probs must be <= 0 and best first, got {rows.logprobs[0, :4].tolist()}")


def _check_alignment(written: TopLogprobs, scores: TopLogprobs, name: str) -> None:
    """Row i as written and row i as read must agree, and agree better than with a neighbour."""
    num_rows = len(written)
    for shift in (0, 1, -1):
        pairs = [(row, row + shift) for row in range(num_rows) if 0 <= row + shift < num_rows]
        worst = max((_row_distance(written, mine, scores, theirs) for mine, theirs in pairs), default=float("inf"))
        if worst <= _TOLERANCE:
            if shift == 0:
                return
            raise UserError(f"{name} engine: score rows are shifted by {shift} position(s) against the tokens")
    raise UserError(f"{name} engine: a token's log-probs as read and as written differ by over {_TOLERANCE} nats")


def _row_distance(left: TopLogprobs, left_row: int, right: TopLogprobs, right_row: int) -> float:
    """Largest |difference| in nats over the best few ids of the left row; inf where the right row lacks the best."""
    best = left[left_row : left_row + 1]
    num_compared = min(4, best.k)
    other = right[right_row : right_row + 1]
    found = np.array([other.logprob_of(best.token_ids[:, place])[0] for place in range(num_compared)])
    if np.isnan(found[0]):
        return float("inf")
    return float(np.nanmax(np.abs(found - best.logprobs[0, :num_compared])))


def _quoted(token: str | None) -> str:
    return "missing" if token is None else repr(token)
