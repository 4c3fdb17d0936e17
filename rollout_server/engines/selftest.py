"""Before anything is trained: do both models mean the same tokens, and do the engines' numbers mean what we think?

Each check raises UserError with one line that says what was found and what to change.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.sequence import Ids, TopLogprobs
from rollout_server.engines.protocol import Engine, ScoreRequest, WriteRequest

Differences = npt.NDArray[np.float64]

_NUM_TOKENS = 16
_NUM_COMPARED = 16  # best ids of a row
_HOT = 2.0  # temperature
_NONE = -100.0  # nats that stand for a probability of 0
_RESOLUTION = 1e-4  # a sum of probabilities is not known better

_TOLERANCES = {"float32": 0.005}
"""Nats, root mean square over at most 256 log-probs. Float32 differs by 1e-5; more than 0.08 at one id is refused."""

_HALF_PRECISION_TOLERANCE = 0.5
"""Nats, of the same. Two ways to compute a model in bfloat16 differ by 0.09 to 0.12, another row by 2 and more. See
docs/decisions/2026-11-27-bfloat16.md."""

_WORST_ROW = 3.0
"""Times the tolerance, for one row by itself. Of 256 rows bfloat16 moved one by 0.4 nats."""

_DISTINCT = 2.0
"""What explains a row so many times better than the row itself is taken for the truth, however small both are."""


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


async def check_engine(engine: Engine, *, name: str, prefix: Ids, top_logprobs: int, dtype: str) -> None:
    """Writes a few tokens and reads them back. ``prefix`` [P] is any short prompt; how nearly what is read and what was
    written agree depends on ``dtype``, which the engine computes in.

    Checks: k log-probs a row, best first, of no more mass than 1; raw log-probs (the same at another temperature);
    score rows belong to the positions asked for (the tokens' own rows, not their neighbors').
    """
    tolerance = _TOLERANCES.get(dtype, _HALF_PRECISION_TOLERANCE)
    # Sampled: greedily many models soon repeat themselves, and then one row is like the next.
    request = WriteRequest(
        prefix=prefix,
        max_tokens=_NUM_TOKENS,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        chunk_tokens=_NUM_TOKENS,
        ignore_eos=True,
    )
    written = await engine.generate(request)
    _check_rows(written.top, name, top_logprobs)
    hot = await engine.generate(replace(request, max_tokens=1, temperature=_HOT))
    _check_temperature(written.top[:1], hot.top, name, tolerance)

    text = np.concatenate([prefix, written.token_ids[:-1]])
    scores = await engine.score(ScoreRequest(token_ids=text, start=prefix.size))
    _check_rows(scores, name, top_logprobs)
    if len(scores) != len(written):
        raise UserError(f"{name} engine: score gave {len(scores)} rows, expected {len(written)}")
    _check_alignment(written.top, scores, name, tolerance, dtype)


def _check_rows(rows: TopLogprobs, name: str, top_logprobs: int) -> None:
    if rows.k != top_logprobs:
        raise UserError(f"{name} engine: gives {rows.k} log-probs a position, expected {top_logprobs}")
    if not (rows.logprobs <= 1e-4).all() or (rows.logprobs[:, 1:] > rows.logprobs[:, :-1]).any():
        raise UserError(f"{name} engine: log-probs must be <= 0 and best first, got {rows.logprobs[0, :4].tolist()}")
    if (mass := float(_mass(rows).max())) > 1.01:
        raise UserError(f"{name} engine: a position's listed probabilities must sum to at most 1, got {mass:.3g}")


def _check_temperature(row: TopLogprobs, hot: TopLogprobs, name: str, tolerance: float) -> None:
    """The same row at two temperatures must be the same, and not like one whose log-probs the temperature divided."""
    differences_NM, divided_NM = _differences(row, hot), _differences(row, hot, temperature=_HOT)
    raw = _rms(differences_NM)
    # What divides log-probs also adds a constant, so that they sum to 1 again.
    is_divided = _is_distinct(_rms(differences_NM - differences_NM.mean()), _rms(divided_NM - divided_NM.mean()))
    if raw > tolerance or (is_divided and raw > tolerance / 10):
        raise UserError(
            f"{name} engine: log-probs change with the temperature (by {raw:.2g} nats); "
            'expected raw ones, as with logprobs_mode="raw_logprobs"'
        )


def _check_alignment(written: TopLogprobs, scores: TopLogprobs, name: str, tolerance: float, dtype: str) -> None:
    """Each row as written and as read must agree, and not distinctly less than with the row before or behind it.

    Where neighbors are alike, as in a text that repeats one token, a shift can't be seen and none is reported.
    """
    differences_NM = _differences(written, scores)
    aligned = _rms(differences_NM)
    if len(scores) > 1 and aligned > tolerance / 10:
        before, behind = _differences(written[1:], scores[:-1]), _differences(written[:-1], scores[1:])
        shifted, shift = min((_rms(before), -1), (_rms(behind), 1))
        if shifted <= tolerance and _is_distinct(aligned, shifted):
            raise UserError(f"{name} engine: score rows are shifted by {shift} position(s) against the tokens")
    if aligned > tolerance or max(map(_rms, differences_NM)) > _WORST_ROW * tolerance:
        raise UserError(
            f"{name} engine: log-probs as read and as written differ by {aligned:.2g} nats (root mean square), "
            f"expected at most {tolerance:g} in {dtype}"
        )


def _is_distinct(own: float, other: float) -> bool:
    return own > _DISTINCT * other


def _differences(left: TopLogprobs, right: TopLogprobs, *, temperature: float = 1.0) -> Differences:
    """[n, m] nats. The best few log-probs of each left row, divided by the temperature, minus the right row's of the
    same ids.

    An id that the right row does not list counts with the most that it can have there, if that is less.
    """
    ids_NM = left.token_ids[:, :_NUM_COMPARED]
    left_NM = np.maximum(left.logprobs[:, :_NUM_COMPARED].astype(np.float64), _NONE) / temperature
    right_NK = np.maximum(right.logprobs.astype(np.float64), _NONE)
    is_same_NMK = ids_NM[:, :, None] == right.token_ids[:, None, :]
    listed_NM = np.take_along_axis(right_NK, is_same_NMK.argmax(axis=2), axis=1)
    unlisted_N = np.minimum(right_NK[:, -1], np.log(np.maximum(1.0 - _mass(right), _RESOLUTION)))
    above_NM = np.maximum(left_NM - unlisted_N[:, None], 0.0)
    return np.where(is_same_NMK.any(axis=2), left_NM - listed_NM, above_NM)


def _rms(differences: Differences) -> float:
    """Root mean square: of a thousand half-precision log-probs one is far off, which is all that a maximum sees."""
    return float(np.sqrt(np.square(differences).mean()))


def _mass(rows: TopLogprobs) -> Differences:
    """[n] Probability that the listed ids hold together."""
    mass: Differences = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1)
    return mass


def _quoted(token: str | None) -> str:
    return "missing" if token is None else repr(token)
