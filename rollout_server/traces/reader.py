"""Queries to a trace, run by DuckDB over its finished segments. Independent of the run that writes them.

A trace may grow while it is read, so every query scans the folder again. Callers' values are always bound as parameters
and never formatted into SQL; only column names and sort orders defined here are formatted. DuckDB may open files in the
trace's folder and no others.
"""

import glob
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import duckdb

from common.errors import UserError
from rollout_server.traces.records import (
    ALL_SEQUENCES,
    SequenceFilter,
    SequenceOrder,
    SequenceRecord,
    SequenceTrace,
    SkippedSegment,
    StepSummary,
    TokenRecord,
)
from rollout_server.traces.schema import SEQUENCES_FILE, TOKENS_FILE
from rollout_server.traces.segments import Segment, corruption, incompleteness, newest_segments, segment_names
from rollout_server.traces.sql import COLUMNS, MATCHES, Row, sequence_record

_TOKEN_COLUMNS = ", ".join(field.name for field in fields(TokenRecord))
_FROM = "FROM read_parquet($files, hive_partitioning = false)"
_STEP_SEQUENCES = f"""SELECT step, count(*), sum(num_tokens), sum(num_wasted_tokens),
    avg(CAST(num_switches > 0 AS INTEGER)), sum(num_teacher_tokens) / sum(num_tokens), avg(first_switch)
    {_FROM} GROUP BY step"""
_STEP_DIVERGENCES = f"""SELECT step, avg(divergence), quantile_cont(divergence, 0.5), quantile_cont(divergence, 0.9),
    quantile_cont(divergence, 0.99) {_FROM} GROUP BY step"""
_SEGMENTS_PER_SUMMARY_QUERY = 64  # limits the memory for exact quantiles


class TraceReader:
    """Reads one run's trace. Thread-safe. Unreadable segments are left out and listed in ``skipped``."""

    def __init__(self, folder: Path, *, memory_limit_mib: int = 512, num_threads: int = 2) -> None:
        if not folder.is_dir():
            raise UserError(f"no trace to read: {folder} is not a folder")
        self._folder = folder.resolve()
        self._pattern = glob.escape(str(self._folder))  # DuckDB would treat a run named "run[1]" as a pattern
        self._problems: dict[Segment, str | None] = {}
        self._summaries: dict[Segment, StepSummary] = {}
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{memory_limit_mib}MiB",
                "threads": num_threads,
                "temp_directory": "",
                "autoload_known_extensions": False,
                "autoinstall_known_extensions": False,
            },
        )
        self._connection.execute(
            "SET allowed_directories = [$folder, $pattern]", {"folder": str(self._folder), "pattern": self._pattern}
        )
        self._connection.execute("SET enable_external_access = false")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def skipped(self) -> tuple[SkippedSegment, ...]:
        """Unreadable segments, by step: partially copied, corrupt, or of another schema version."""
        return tuple(SkippedSegment(name=segment.name, reason=problem) for segment, problem in self._scan() if problem)

    def sequences(
        self,
        where: SequenceFilter = ALL_SEQUENCES,
        *,
        order: SequenceOrder = "step",
        descending: bool = False,
        limit: int = 50,
        offset: int = 0,
    ) -> list[SequenceRecord]:
        """Matching sequences in sort order, ties by step and id, nulls last: ``limit`` of them after ``offset``."""
        if order not in get_args(SequenceOrder):
            raise UserError(f"order must be one of {', '.join(get_args(SequenceOrder))}, got {order!r}")
        for name, value in (("limit", limit), ("offset", offset)):
            if value < 0:
                raise UserError(f"{name} must be >= 0, got {value}")
        sql = f"""SELECT {COLUMNS} {_FROM} {MATCHES}
            ORDER BY {order} {"DESC" if descending else "ASC"} NULLS LAST, step, sequence_id
            LIMIT $limit OFFSET $offset"""
        parameters = {**asdict(where), "limit": limit, "offset": offset}
        return [sequence_record(row) for row in self._rows(SEQUENCES_FILE, sql, parameters, where)]

    def num_sequences(self, where: SequenceFilter = ALL_SEQUENCES) -> int:
        """Number of matching sequences, for paging."""
        rows = self._rows(SEQUENCES_FILE, f"SELECT count(*) {_FROM} {MATCHES}", asdict(where), where)
        return int(rows[0][0]) if rows else 0  # type: ignore[call-overload]

    def sequence(self, sequence_id: str, step: int | None = None) -> SequenceTrace | None:
        """One sequence with its tokens, or None if no readable segment holds it."""
        parameters = {"sequence_id": sequence_id}
        sql = f"SELECT {COLUMNS} {_FROM} WHERE sequence_id = $sequence_id ORDER BY step DESC LIMIT 1"
        found = self._rows(SEQUENCES_FILE, sql, parameters, SequenceFilter(first_step=step, last_step=step))
        if not found:
            return None
        sequence = sequence_record(found[0])
        sql = f"SELECT {_TOKEN_COLUMNS} {_FROM} WHERE sequence_id = $sequence_id ORDER BY position"
        where = SequenceFilter(first_step=sequence.step, last_step=sequence.step)
        tokens = [_token_record(row) for row in self._rows(TOKENS_FILE, sql, parameters, where)]
        return SequenceTrace(sequence=sequence, tokens=tokens) if tokens else None

    def steps(self, first_step: int | None = None, last_step: int | None = None) -> list[StepSummary]:
        """One summary per step. Segments never change, so each is summarized once."""
        where = SequenceFilter(first_step=first_step, last_step=last_step)
        missing = [segment for segment in self._segments(where) if segment not in self._summaries]
        for start in range(0, len(missing), _SEGMENTS_PER_SUMMARY_QUERY):
            self._summarize(missing[start : start + _SEGMENTS_PER_SUMMARY_QUERY])
        return [self._summaries[segment] for segment in self._segments(where) if segment in self._summaries]

    def _summarize(self, segments: list[Segment]) -> None:
        where = SequenceFilter(first_step=segments[0].step, last_step=segments[-1].step)
        divergences = {row[0]: row[1:] for row in self._rows(TOKENS_FILE, _STEP_DIVERGENCES, {}, where)}
        counted = {row[0]: row for row in self._rows(SEQUENCES_FILE, _STEP_SEQUENCES, {}, where)}
        for segment in segments:
            if segment.step in divergences and segment.step in counted:
                self._summaries[segment] = _step_summary(counted[segment.step] + divergences[segment.step])

    def _rows(self, file: str, sql: str, parameters: Mapping[str, object], where: SequenceFilter) -> list[Row]:
        """Query the segments of the selected steps. Retries without segments that proved to be corrupt or replaced."""
        while segments := self._segments(where):
            files = [f"{self._pattern}/{segment.name}/{file}" for segment in segments]
            try:
                cursor = self._connection.cursor()
                rows: list[Row] = cursor.execute(sql, {"files": files, **parameters}).fetchall()
                return rows
            except duckdb.Error:
                for segment in segments:
                    self._problems[segment] = self._problem(segment) or corruption(self._folder / segment.name)
                if self._segments(where) == segments:
                    raise
        return []

    def _segments(self, where: SequenceFilter) -> list[Segment]:
        """The readable segments of the selected steps, by step."""
        first = -1 if where.first_step is None else where.first_step
        last = float("inf") if where.last_step is None else where.last_step
        return [segment for segment, problem in self._scan() if problem is None and first <= segment.step <= last]

    def _scan(self) -> list[tuple[Segment, str | None]]:
        """Each step's segment and its problem, by step.

        Scans again until the folder's list is the same before and after. Otherwise a segment that is replaced during
        the scan would look broken.
        """
        while True:
            names = segment_names(self._folder)
            scanned = [(segment, self._problem(segment)) for segment in newest_segments(self._folder, names)]
            if segment_names(self._folder) == names:
                return scanned

    def _problem(self, segment: Segment) -> str | None:
        """Why a segment can't be read, judging by its files' footers, or None."""
        if segment not in self._problems:
            self._problems[segment] = incompleteness(self._folder / segment.name)
        return self._problems[segment]


def _token_record(row: Row) -> TokenRecord:
    return TokenRecord(**dict(zip(TokenRecord.__slots__, row, strict=True)))  # type: ignore[arg-type]


def _step_summary(row: Row) -> StepSummary:
    return StepSummary(**dict(zip(StepSummary.__slots__, row, strict=True)))  # type: ignore[arg-type]
