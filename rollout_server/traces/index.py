"""An index of a growing trace, for paging, counting and replay. Independent of its users.

Every finished segment is read once, including checksums. Its sequences go into a DuckDB table on disk, in a temporary
folder that is deleted when the index is closed. So no query opens hundreds of files, memory is bounded, and a corrupt
segment is found when it appears, not when it is queried. Callers' values are always bound as parameters and never
formatted into SQL, and DuckDB may not open any other file.
"""

import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import one_line
from rollout_server.traces.records import SkippedSegment, StepSummary
from rollout_server.traces.schema import SEQUENCES_FILE, TOKENS_FILE
from rollout_server.traces.segments import Segment, incompleteness, scan
from rollout_server.traces.sql import Row

_TABLE = """CREATE TABLE sequences (
    sequence_id VARCHAR, prompt_id VARCHAR, epoch INTEGER, sample_index INTEGER, step INTEGER, policy VARCHAR,
    prompt_text VARCHAR, completion_text VARCHAR, answer VARCHAR, finish_reason VARCHAR, num_tokens INTEGER,
    num_student_tokens INTEGER, num_teacher_tokens INTEGER, num_switches INTEGER, first_switch INTEGER,
    switches INTEGER[], num_wasted_tokens INTEGER, mean_divergence FLOAT, weight_version_min INTEGER,
    weight_version_max INTEGER, seed BIGINT, divergences FLOAT[], student_ranks INTEGER[], first_source VARCHAR)"""
_RETRY_AFTER_S = 30.0  # an unreadable segment is tried again after this time, because the disk may have been at fault


class QueryTimeout(Exception):
    """A query took too long."""


class TraceIndex:
    """The sequences of one run's trace. Thread-safe; call ``refresh`` before a query."""

    def __init__(
        self,
        folder: Path,
        *,
        only_step: int | None = None,
        with_tokens: bool = True,
        memory_limit_mib: int = 256,
        num_threads: int = 2,
        rescan_after_s: float = 0.5,
    ) -> None:
        """``only_step`` reads the segment of one step only, None reads all. Without tokens, reading takes a fraction of
        the time, and everything computed from tokens is missing: ``steps``, ``token_texts`` and the derived columns.
        """
        self._folder = folder
        self._only_step = only_step
        self._with_tokens = with_tokens
        self._rescan_after_s = rescan_after_s  # minimum time between two scans of the folder
        self._lock = threading.Lock()
        self._scanned_s = float("-inf")
        self._loaded: dict[int, Segment] = {}
        self._problems: dict[Segment, tuple[str, float]] = {}
        self.is_complete = False  # whether all segments found by a scan have been read
        self.generation = 0  # number of changes
        self._changed: dict[int, int] = {}  # step -> generation
        self.steps: dict[int, StepSummary] = {}
        self.token_texts: dict[int, str] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="adaswitch-index-")
        self._connection = duckdb.connect(
            str(Path(self._scratch.name) / "index.duckdb"),
            config={
                "memory_limit": f"{memory_limit_mib}MiB",
                "threads": num_threads,
                "temp_directory": "",
                "autoload_known_extensions": False,
                "autoinstall_known_extensions": False,
            },
        )
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute(_TABLE)

    def close(self) -> None:
        self._connection.close()
        self._scratch.cleanup()

    @property
    def skipped(self) -> list[SkippedSegment]:
        """Unreadable segments, by step."""
        problems = sorted(self._problems.items(), key=lambda item: item[0].step)
        return [SkippedSegment(name=segment.name, reason=reason) for segment, (reason, _) in problems]

    @property
    def num_segments(self) -> int:
        return len(self._loaded) + len(self._problems)

    def segment_of(self, step: int) -> Path | None:
        """The folder of a step's segment, or None if the step is not readable."""
        segment = self._loaded.get(step)
        return self._folder / segment.name if segment else None

    def changed_since(self, generation: int) -> list[int]:
        """Steps that were added, replaced or removed after a generation, ascending."""
        return sorted(step for step, changed in list(self._changed.items()) if changed > generation)

    def refresh(self, timeout_s: float) -> None:
        """Read new segments. Raises QueryTimeout if the first scan is not finished; the next call continues it."""
        if self.is_complete and time.monotonic() - self._scanned_s < self._rescan_after_s:
            return
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=0 if self.is_complete else timeout_s):
            if self.is_complete:
                return  # another thread is refreshing; use the present state
            raise QueryTimeout(f"the trace was still being read after {timeout_s:g} s")
        try:
            self._read_new_segments(deadline)
        finally:
            self._lock.release()

    def rows(self, sql: str, parameters: Mapping[str, object], timeout_s: float) -> list[Row]:
        """Query the table ``sequences``. Raises QueryTimeout after ``timeout_s``."""
        cursor = self._connection.cursor()
        watch = threading.Timer(timeout_s, cursor.interrupt)
        watch.start()
        try:
            rows: list[Row] = cursor.execute(sql, dict(parameters)).fetchall()
            return rows
        except (duckdb.InterruptException, duckdb.OutOfMemoryException) as error:
            raise QueryTimeout(f"the query took more than {timeout_s:g} s or its share of memory") from error
        finally:
            watch.cancel()
            cursor.close()

    def _read_new_segments(self, deadline: float) -> None:
        segments = [segment for segment in scan(self._folder) if self._only_step in (None, segment.step)]
        wanted = {segment.step: segment for segment in segments}
        self._problems = {segment: problem for segment, problem in self._problems.items() if segment in segments}
        changed = [step for step in self._loaded if step not in wanted]
        for step in changed:
            self._forget(step)
        for segment in segments:
            if self._loaded.get(segment.step) == segment or not self._is_due(segment):
                continue
            if time.monotonic() > deadline:
                if self.is_complete:
                    break
                raise QueryTimeout(f"the trace was still being read: {len(self._loaded)} of {len(segments)} segments")
            self._load(segment)
            changed.append(segment.step)
        if changed:
            self._changed.update(dict.fromkeys(changed, self.generation + 1))
            self.generation += 1
        self._scanned_s = time.monotonic()
        self.is_complete = True

    def _is_due(self, segment: Segment) -> bool:
        problem = self._problems.get(segment)
        return problem is None or time.monotonic() - problem[1] > _RETRY_AFTER_S

    def _load(self, segment: Segment) -> None:
        self._forget(segment.step)
        self._problems.pop(segment, None)
        folder = self._folder / segment.name
        problem = incompleteness(folder)
        try:
            if problem is None:
                self._insert(segment.step, folder)
                self._loaded[segment.step] = segment
                return
        except (OSError, ValueError, pa.ArrowException, duckdb.Error) as error:
            problem = one_line(error) or type(error).__name__
        assert problem is not None
        self._problems[segment] = (problem, time.monotonic())

    def _insert(self, step: int, folder: Path) -> None:
        table = pq.read_table(folder / SEQUENCES_FILE, page_checksum_verification=True)
        if self._with_tokens:
            tokens = pq.read_table(folder / TOKENS_FILE, page_checksum_verification=True)
            table = _joined(table, tokens)
        cursor = self._connection.cursor()
        cursor.register("segment", table)
        cursor.execute("INSERT INTO sequences BY NAME SELECT * FROM segment")
        cursor.close()
        if self._with_tokens:
            self.steps[step] = _summary(step, table, tokens["divergence"].combine_chunks())
            pairs = tokens.select(["token_id", "text"]).group_by(["token_id", "text"]).aggregate([])
            self.token_texts.update(zip(pairs["token_id"].to_pylist(), pairs["text"].to_pylist(), strict=True))

    def _forget(self, step: int) -> None:
        if self._loaded.pop(step, None):
            cursor = self._connection.cursor()
            cursor.execute("DELETE FROM sequences WHERE step = $step", {"step": step})
            cursor.close()
            self.steps.pop(step, None)


def _joined(sequences: pa.Table, tokens: pa.Table) -> pa.Table:
    """The sequences with their tokens' values as lists."""
    lengths_S = sequences["num_tokens"].to_numpy()
    starts_S = np.cumsum(lengths_S) - lengths_S
    firsts = np.flatnonzero(tokens["position"].to_numpy() == 0)
    if tokens.num_rows != lengths_S.sum() or not np.array_equal(firsts, starts_S):
        raise ValueError(f"{TOKENS_FILE} does not hold the tokens of {SEQUENCES_FILE}")
    offsets = pa.array(np.append(starts_S, lengths_S.sum()).astype(np.int32))
    for name, column in (("divergences", "divergence"), ("student_ranks", "student_rank")):
        lists = pa.ListArray.from_arrays(offsets, tokens[column].combine_chunks())
        sequences = sequences.append_column(name, lists)
    return sequences.append_column("first_source", tokens["source"].combine_chunks().take(pa.array(starts_S)))


def _summary(step: int, sequences: pa.Table, divergences: pa.Array) -> StepSummary:
    judged = divergences.drop_null().to_numpy()
    quantiles = np.quantile(judged, [0.5, 0.9, 0.99]).tolist() if judged.size else [None] * 3
    num_tokens = int(sequences["num_tokens"].to_numpy().sum())
    first_switches = sequences["first_switch"].combine_chunks().drop_null().to_numpy()
    return StepSummary(
        step=step,
        num_sequences=sequences.num_rows,
        num_tokens=num_tokens,
        num_wasted_tokens=int(sequences["num_wasted_tokens"].to_numpy().sum()),
        switch_rate=float((sequences["num_switches"].to_numpy() > 0).mean()),
        teacher_share=float(sequences["num_teacher_tokens"].to_numpy().sum() / num_tokens),
        mean_first_switch=float(first_switches.mean()) if first_switches.size else None,
        divergence_mean=float(judged.mean(dtype=np.float64)) if judged.size else None,
        divergence_p50=quantiles[0],
        divergence_p90=quantiles[1],
        divergence_p99=quantiles[2],
    )
