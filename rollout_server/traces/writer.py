"""Writes mixed sequences as one immutable segment per step. Independent of who collects or reads them.

Writes are atomic: both files are written and fsynced in a hidden folder next to the final one, which is then renamed.
If a step is collected again after a crash, the new segment can't be renamed over the old one (a rename never replaces a
non-empty folder), and deleting the old one first would leave a moment without either. So the new segment is named after
the next attempt (``step-000004.1``), which makes it the current one from the rename on, and then the old one is
deleted. A crash in between leaves both. Readers use the highest attempt, and the next write deletes the rest.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.files import fsync
from common.sequence import MixedSequence
from rollout_server.traces.columns import TokenColumns
from rollout_server.traces.schema import (
    SEQUENCES,
    SEQUENCES_FILE,
    TOKENS_FILE,
    parse_segment_name,
    segment_name,
)


class TraceWriter:
    """Writes the segments of one run. One writer per folder; not thread-safe.

    ``decode`` turns token ids into text; ``token_texts`` returns each token's own text, for example
    ``lambda ids: [tokenizer.decode([i]) for i in ids]``. Both are called only with generated token ids.
    """

    def __init__(
        self,
        folder: Path,
        *,
        decode: Callable[[list[int]], str],
        token_texts: Callable[[list[int]], list[str]],
        top_alternatives: int = 5,
    ) -> None:
        self._folder = folder
        self._decode = decode
        self._tokens = TokenColumns(token_texts, top_alternatives)
        folder.mkdir(parents=True, exist_ok=True)

    def write_segment(self, step: int, sequences: Sequence[MixedSequence]) -> Path:
        """Store all sequences of a step and return the segment's folder. Replaces the segment of an earlier attempt."""
        assert step >= 0, step
        assert sequences, f"step {step} has no sequences to store"
        tables = {
            SEQUENCES_FILE: self._sequences_table(step, sequences),
            TOKENS_FILE: self._tokens.table(step, sequences),
        }
        earlier = self._attempts(step)
        segment = self._folder / segment_name(step, max(earlier) + 1 if earlier else 0)
        unfinished = self._folder / f".{segment_name(step, 0)}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a crash
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


def drop_segments_after(folder: Path, step: int) -> None:
    """Delete the segments after ``step``. A run that resumes from there collects these steps again.

    Each segment disappears at once, by a rename. Does nothing if the folder does not exist.
    """
    later = [name for name in (os.listdir(folder) if folder.is_dir() else ()) if _step_of(name) > step]
    for name in sorted(later, reverse=True):
        dropped = folder / f".{name}.dropped"
        shutil.rmtree(dropped, ignore_errors=True)  # left by a crash
        (folder / name).rename(dropped)
        shutil.rmtree(dropped)


def _step_of(name: str) -> int:
    """The step, or -1 if the name is not a segment's."""
    parsed = parse_segment_name(name)
    return parsed[0] if parsed else -1
