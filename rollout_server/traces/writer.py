"""Mixed sequences -> one immutable segment per step. Knows nothing of who collects or reads them.

N = tokens of the whole segment, S = its sequences, k = alternatives kept per token. Columns are built for the whole
segment at once; the only Python work per token is looking up texts, once for each distinct id of a run.

Atomic: both files are written and fsynced in a hidden folder beside the segment's place, which is then renamed. When a
step is collected again after a crash, the segment can't be renamed over the old one (a rename never replaces a folder
that holds files), and taking the old one away first would leave a moment without either. So the new one gets the next
attempt's name (``step-000004.1``), which makes it the one that counts from that rename on, and then the old one is
deleted. A crash in between leaves both; readers take the highest attempt, and the next write tidies up.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.files import fsync
from common.sequence import MixedSequence, TokenSource, TopLogprobs
from rollout_server.traces.schema import (
    SEQUENCES,
    SEQUENCES_FILE,
    TOKENS,
    TOKENS_FILE,
    parse_segment_name,
    segment_name,
)

_SOURCE_NAMES = pa.array([source.name.lower() for source in TokenSource])


class TraceWriter:
    """Writes the segments of one run. One writer a folder; not for several threads.

    ``decode`` turns token ids into text; ``token_texts`` gives each token's text by itself, such as
    ``lambda ids: [tokenizer.decode([i]) for i in ids]``. Both see only token ids that student or teacher wrote.
    """

    def __init__(
        self,
        folder: Path,
        *,
        decode: Callable[[list[int]], str],
        token_texts: Callable[[list[int]], list[str]],
        top_alternatives: int = 5,
    ) -> None:
        assert top_alternatives >= 0, top_alternatives
        self._folder = folder
        self._decode = decode
        self._token_texts = token_texts
        self._top_alternatives = top_alternatives
        self._text_of: dict[int, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def write_segment(self, step: int, sequences: Sequence[MixedSequence]) -> Path:
        """Store all sequences of a step and return the segment's folder. Replaces what an earlier attempt stored."""
        assert step >= 0, step
        assert sequences, f"step {step} has no sequences to store"
        tables = {
            SEQUENCES_FILE: self._sequences_table(step, sequences),
            TOKENS_FILE: self._tokens_table(step, sequences),
        }
        earlier = self._attempts(step)
        segment = self._folder / segment_name(step, max(earlier) + 1 if earlier else 0)
        unfinished = self._folder / f".{segment_name(step, 0)}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # a crash's
        unfinished.mkdir()
        for name, table in tables.items():
            pq.write_table(table, unfinished / name, compression="zstd", write_page_checksum=True)
            fsync(unfinished / name)
        fsync(unfinished)
        unfinished.rename(segment)
        fsync(self._folder)
        for attempt in earlier:
            shutil.rmtree(self._folder / segment_name(step, attempt))
        return segment

    def _attempts(self, step: int) -> list[int]:
        names = map(parse_segment_name, os.listdir(self._folder))
        return [name[1] for name in names if name is not None and name[0] == step]

    def _sequences_table(self, step: int, sequences: Sequence[MixedSequence]) -> pa.Table:
        rows = [self._sequence_row(step, sequence) for sequence in sequences]
        return pa.Table.from_pylist(rows, schema=SEQUENCES)

    def _sequence_row(self, step: int, sequence: MixedSequence) -> dict[str, object]:
        prompt = sequence.prompt
        versions = sequence.weight_versions[sequence.weight_versions >= 0]
        return {
            "sequence_id": sequence.sequence_id,
            "prompt_id": prompt.prompt_id,
            "epoch": prompt.epoch,
            "sample_index": prompt.sample_index,
            "step": step,
            "policy": sequence.policy,
            "prompt_text": self._decode(prompt.token_ids.tolist()),
            "completion_text": self._decode(sequence.token_ids.tolist()),
            "answer": prompt.answer,
            "finish_reason": sequence.finish_reason,
            "num_tokens": len(sequence),
            "num_student_tokens": sequence.num_student_tokens,
            "num_teacher_tokens": sequence.num_teacher_tokens,
            "num_switches": sequence.switches.size,
            "first_switch": sequence.first_switch,
            "switches": sequence.switches,
            "num_wasted_tokens": sequence.num_wasted_tokens,
            "mean_divergence": None if np.isnan(sequence.mean_divergence) else sequence.mean_divergence,
            "weight_version_min": int(versions.min()) if versions.size else None,
            "weight_version_max": int(versions.max()) if versions.size else None,
            "seed": prompt.seed,
        }

    def _tokens_table(self, step: int, sequences: Sequence[MixedSequence]) -> pa.Table:
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
        """[N, k] The first alternatives of every token."""
        k = min(self._top_alternatives, *(top.k for top in tops))
        return TopLogprobs.concatenate([TopLogprobs(top.token_ids[:, :k], top.logprobs[:, :k]) for top in tops])

    def _texts(self, token_ids_N: npt.NDArray[np.int32]) -> pa.DictionaryArray:
        distinct, indices_N = np.unique(token_ids_N, return_inverse=True)
        new = [token_id for token_id in distinct.tolist() if token_id not in self._text_of]
        if new:
            self._text_of.update(zip(new, self._token_texts(new), strict=True))
        texts = pa.array([self._text_of[token_id] for token_id in distinct.tolist()], pa.string())
        return pa.DictionaryArray.from_arrays(indices_N.astype(np.int32), texts)


def drop_segments_after(folder: Path, step: int) -> None:
    """Take away what was collected for later steps, which a run that goes on from ``step`` collects again.

    Each is gone from sight at once. A folder that is not there holds none.
    """
    later = [name for name in (os.listdir(folder) if folder.is_dir() else ()) if _step_of(name) > step]
    for name in sorted(later, reverse=True):
        dropped = folder / f".{name}.dropped"
        shutil.rmtree(dropped, ignore_errors=True)  # a crash's
        (folder / name).rename(dropped)
        shutil.rmtree(dropped)


def _step_of(name: str) -> int:
    """-1 for what is no segment."""
    parsed = parse_segment_name(name)
    return parsed[0] if parsed else -1


def _repeated(values_S: list[str], lengths_S: npt.NDArray[np.int64]) -> pa.DictionaryArray:
    indices_N = np.repeat(np.arange(len(values_S), dtype=np.int32), lengths_S)
    return pa.DictionaryArray.from_arrays(indices_N, pa.array(values_S, pa.string()))


def _nan_is_null(parts: list[npt.NDArray[np.float32]]) -> pa.Array:
    return pa.array(np.concatenate(parts), from_pandas=True)


def _negative_is_null(parts: list[npt.NDArray[np.int32]]) -> pa.Array:
    values_N = np.concatenate(parts)
    return pa.array(values_N, mask=values_N < 0)


def _lists(top_Nk: TopLogprobs, values_Nk: npt.NDArray[np.generic]) -> pa.ListArray:
    """One list per token, null where nothing is known of its row."""
    unknown_N = np.isnan(top_Nk.logprobs).all(axis=1) if top_Nk.k else np.zeros(len(top_Nk), np.bool_)
    offsets = np.concatenate([[0], np.cumsum(np.where(unknown_N, 0, top_Nk.k))]).astype(np.int32)
    values = pa.array(values_Nk[~unknown_N].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(unknown_N))
