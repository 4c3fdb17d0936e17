"""Checks before training: do both models use the same tokens, and do the engines return the right log-probs?

Each check raises UserError with one line that says what is wrong and what to change.
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
_NUM_COMPARED = 16  # best ids per row
_HOT = 2.0  # temperature
_NONE = -100.0  # nats, stands for probability 0
_RESOLUTION = 1e-4  # precision of a sum of probabilities

_TOLERANCES = {"float32": 0.005}
"""Nats, root mean square over at most 256 log-probs. Float32 differs by 1e-5; more than 0.08 at one id is an error."""

_HALF_PRECISION_TOLERANCE = 0.5
"""Nats, root mean square. Two implementations of a model in bfloat16 differ by 0.09 to 0.12, a different row by 2 or
more. See docs/decisions/2026-11-27-bfloat16.md."""

_WORST_ROW = 3.0
"""Limit for a single row, as a multiple of the tolerance. Of 256 rows, bfloat16 changed one by 0.4 nats."""

_DISTINCT = 2.0
"""If another explanation fits a row better by this factor, it is taken to be right, however small the differences."""


def check_tokenizers(student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
    """Both vocabularies (token -> id) must map every id to the same token.

    Embedding rows beyond the vocabulary (padding) are ignored and may differ. Raises UserError with up to three ids
    that differ.
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
            "choose two models of the same family"
        )


async def check_engine(engine: Engine, *, name: str, prefix: Ids, top_logprobs: int, dtype: str) -> None:
    """Generate a few tokens and score them. ``prefix`` [P] is any short prompt. The tolerance between generated and
    scored log-probs depends on ``dtype``, the engine's precision.

    Checks that there are k log-probs per row, best first, with a total probability of at most 1; that log-probs are raw
    (the same at another temperature); and that score rows belong to the requested positions, not to their neighbors.
    """
    tolerance = _TOLERANCES.get(dtype, _HALF_PRECISION_TOLERANCE)
    # Sampled, because many models soon repeat themselves with greedy decoding, and then neighboring rows are alike.
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
        raise UserError(f"{name} engine: score returned {len(scores)} rows, expected {len(written)}")
    _check_alignment(written.top, scores, name, tolerance, dtype)


def _check_rows(rows: TopLogprobs, name: str, top_logprobs: int) -> None:
    if rows.k != top_logprobs:
        raise UserError(f"{name} engine: returns {rows.k} log-probs per position, expected {top_logprobs}")
    if not (rows.logprobs <= 1e-4).all() or (rows.logprobs[:, 1:] > rows.logprobs[:, :-1]).any():
        raise UserError(f"{name} engine: log-probs must be <= 0 and best first, got {rows.logprobs[0, :4].tolist()}")
    if (mass := float(_mass(rows).max())) > 1.01:
        raise UserError(f"{name} engine: a position's listed probabilities must sum to at most 1, got {mass:.3g}")


def _check_temperature(row: TopLogprobs, hot: TopLogprobs, name: str, tolerance: float) -> None:
    """The same row at two temperatures must be equal, and must not match log-probs divided by the temperature."""
    differences_NM, divided_NM = _differences(row, hot), _differences(row, hot, temperature=_HOT)
    raw = _rms(differences_NM)
    # Scaled log-probs are normalized again, which adds a constant.
    is_divided = _is_distinct(_rms(differences_NM - differences_NM.mean()), _rms(divided_NM - divided_NM.mean()))
    if raw > tolerance or (is_divided and raw > tolerance / 10):
        raise UserError(
            f"{name} engine: log-probs change with the temperature (by {raw:.2g} nats); "
            'expected raw log-probs, as with logprobs_mode="raw_logprobs"'
        )


def _check_alignment(written: TopLogprobs, scores: TopLogprobs, name: str, tolerance: float, dtype: str) -> None:
    """Each generated row must agree with the scored one, and must not match the previous or next row clearly better.

    If neighboring rows are alike, as in a text that repeats one token, a shift can't be detected and none is reported.
    """
    differences_NM = _differences(written, scores)
    aligned = _rms(differences_NM)
    if len(scores) > 1 and aligned > tolerance / 10:
        before, behind = _differences(written[1:], scores[:-1]), _differences(written[:-1], scores[1:])
        shifted, shift = min((_rms(before), -1), (_rms(behind), 1))
        if shifted <= tolerance and _is_distinct(aligned, shifted):
            raise UserError(f"{name} engine: score rows are shifted by {shift} position(s) relative to the tokens")
    if aligned > tolerance or max(map(_rms, differences_NM)) > _WORST_ROW * tolerance:
        raise UserError(
            f"{name} engine: generated and scored log-probs differ by {aligned:.2g} nats (root mean square), "
            f"expected at most {tolerance:g} in {dtype}"
        )


def _is_distinct(own: float, other: float) -> bool:
    return own > _DISTINCT * other


def _differences(left: TopLogprobs, right: TopLogprobs, *, temperature: float = 1.0) -> Differences:
    """[n, m] nats. The best few log-probs of each left row, divided by the temperature, minus the right row's log-probs
    of the same ids.

    For an id that the right row does not list, its highest possible log-prob there is used, if that is smaller.
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
    """Root mean square. A maximum would depend only on the one outlier among a thousand half-precision log-probs."""
    return float(np.sqrt(np.square(differences).mean()))


def _mass(rows: TopLogprobs) -> Differences:
    """[n] Total probability of the listed ids."""
    mass: Differences = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1)
    return mass


def _quoted(token: str | None) -> str:
    return "missing" if token is None else repr(token)
