"""Converts mixed sequences to trace rows, one per token. Independent of files.

N = tokens of all sequences, S = sequences, k = alternatives kept per token. Columns are built for all sequences at
once; the only Python work per token is the text lookup, once per distinct id.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.sequence import MixedSequence, TokenSource, TopLogprobs
from rollout_server.traces.records import TokenRecord
from rollout_server.traces.schema import TOKENS

_SOURCE_NAMES = pa.array([source.name.lower() for source in TokenSource])


class TokenColumns:
    """Builds the rows. ``token_texts`` returns each token's own text; it is called once per id."""

    def __init__(self, token_texts: Callable[[list[int]], list[str]], top_alternatives: int) -> None:
        assert top_alternatives >= 0, top_alternatives
        self._token_texts = token_texts
        self._top_alternatives = top_alternatives
        self._text_of: dict[int, str] = {}

    def table(self, step: int, sequences: Sequence[MixedSequence]) -> pa.Table:
        lengths_S = np.array([len(sequence) for sequence in sequences])
        starts_S = np.cumsum(lengths_S) - lengths_S
        token_ids_N = np.concatenate([sequence.token_ids for sequence in sequences])
        is_switch_N = np.zeros(token_ids_N.size, np.bool_)
        is_switch_N[np.concatenate([s.switches + start for s, start in zip(sequences, starts_S, strict=True)])] = True
        student_top_Nk = self._alternatives([sequence.student_top for sequence in sequences])
        teacher_top_Nk = self._alternatives([sequence.teacher_top for sequence in sequences])
        columns = {
            "sequence_id": _repeated([sequence.sequence_id for sequence in sequences], lengths_S),
            "step": np.full(token_ids_N.size, step, np.int32),
            "position": (np.arange(token_ids_N.size) - np.repeat(starts_S, lengths_S)).astype(np.int32),
            "token_id": token_ids_N,
            "text": self._texts(token_ids_N),
            "source": pa.DictionaryArray.from_arrays(
                np.concatenate([sequence.sources for sequence in sequences]).astype(np.int32), _SOURCE_NAMES
            ),
            "is_switch": is_switch_N,
            "divergence": _nan_is_null([sequence.divergences for sequence in sequences]),
            "threshold": _nan_is_null([sequence.thresholds for sequence in sequences]),
            "student_rank": _negative_is_null([sequence.student_ranks for sequence in sequences]),
            "student_logprob": _nan_is_null([sequence.student_logprobs for sequence in sequences]),
            "teacher_logprob": _nan_is_null([sequence.teacher_logprobs for sequence in sequences]),
            "student_covered_mass": _nan_is_null([sequence.student_top.covered_mass() for sequence in sequences]),
            "teacher_covered_mass": _nan_is_null([sequence.teacher_top.covered_mass() for sequence in sequences]),
            "student_top_ids": _lists(student_top_Nk, student_top_Nk.token_ids),
            "student_top_logprobs": _lists(student_top_Nk, student_top_Nk.logprobs),
            "teacher_top_ids": _lists(teacher_top_Nk, teacher_top_Nk.token_ids),
            "teacher_top_logprobs": _lists(teacher_top_Nk, teacher_top_Nk.logprobs),
            "weight_version": _negative_is_null([sequence.weight_versions for sequence in sequences]),
        }
        return pa.table(columns, schema=TOKENS)

    def _alternatives(self, tops: list[TopLogprobs]) -> TopLogprobs:
        """[N, k] The k best alternatives of every token."""
        k = min(self._top_alternatives, *(top.k for top in tops))
        return TopLogprobs.concatenate([TopLogprobs(top.token_ids[:, :k], top.logprobs[:, :k]) for top in tops])

    def _texts(self, token_ids_N: npt.NDArray[np.int32]) -> pa.DictionaryArray:
        distinct, indices_N = np.unique(token_ids_N, return_inverse=True)
        self._learn([token_id for token_id in distinct.tolist() if token_id not in self._text_of])
        texts = pa.array([self._text_of[token_id] for token_id in distinct.tolist()], pa.string())
        return pa.DictionaryArray.from_arrays(indices_N.astype(np.int32), texts)

    def records(self, sequence: MixedSequence) -> list[TokenRecord]:
        """One sequence's tokens in the form that a trace reader returns."""
        table = self.table(0, [sequence]).select(list(TokenRecord.__slots__))
        return [TokenRecord(**row) for row in table.to_pylist()]

    def texts_of(self, token_ids: Sequence[int]) -> dict[int, str]:
        """The text of each token on its own."""
        self._learn([token_id for token_id in set(token_ids) if token_id not in self._text_of])
        return {token_id: self._text_of[token_id] for token_id in token_ids}

    def _learn(self, new: list[int]) -> None:
        if new:
            self._text_of.update(zip(new, self._token_texts(new), strict=True))


def _repeated(values_S: list[str], lengths_S: npt.NDArray[np.int64]) -> pa.DictionaryArray:
    indices_N = np.repeat(np.arange(len(values_S), dtype=np.int32), lengths_S)
    return pa.DictionaryArray.from_arrays(indices_N, pa.array(values_S, pa.string()))


def _nan_is_null(parts: list[npt.NDArray[np.float32]]) -> pa.Array:
    return pa.array(np.concatenate(parts), from_pandas=True)


def _negative_is_null(parts: list[npt.NDArray[np.int32]]) -> pa.Array:
    values_N = np.concatenate(parts)
    return pa.array(values_N, mask=values_N < 0)


def _lists(top_Nk: TopLogprobs, values_Nk: npt.NDArray[np.generic]) -> pa.ListArray:
    """One list per token; null if the row is unknown."""
    unknown_N = np.isnan(top_Nk.logprobs).all(axis=1) if top_Nk.k else np.zeros(len(top_Nk), np.bool_)
    offsets = np.concatenate([[0], np.cumsum(np.where(unknown_N, 0, top_Nk.k))]).astype(np.int32)
    values = pa.array(values_Nk[~unknown_N].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(unknown_N))
