"""A trace as tests ask for it: each question looks at the folder anew."""

from pathlib import Path
from typing import Any, Self

from rollout_server.traces import queries
from rollout_server.traces.index import TraceIndex
from rollout_server.traces.records import (
    SequenceFilter,
    SequenceOrder,
    SequenceRecord,
    SequenceTrace,
    SkippedSegment,
    StepSummary,
)

TIMEOUT_S = 60.0
ALL_SEQUENCES = SequenceFilter()


class TraceReader:
    def __init__(self, folder: Path) -> None:
        self._index = TraceIndex(folder, rescan_after_s=0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._index.close()

    @property
    def skipped(self) -> list[SkippedSegment]:
        return self._now().skipped

    def sequences(
        self,
        where: SequenceFilter = ALL_SEQUENCES,
        *,
        order: SequenceOrder = "step",
        descending: bool = False,
        limit: int = 50,
        after: queries.PageKey | None = None,
    ) -> list[SequenceRecord]:
        options: dict[str, Any] = {"order": order, "descending": descending, "limit": limit, "after": after}
        return queries.page(self._now(), where, **options, timeout_s=TIMEOUT_S)[0]

    def num_sequences(self, where: SequenceFilter = ALL_SEQUENCES) -> int:
        page = queries.page(
            self._now(), where, order="step", descending=False, limit=1, after=None, timeout_s=TIMEOUT_S
        )
        return page[2]

    def sequence(self, sequence_id: str) -> SequenceTrace | None:
        index = self._now()
        record = queries.sequence(index, sequence_id, TIMEOUT_S)
        if record is None:
            return None
        return SequenceTrace(sequence=record, tokens=queries.tokens(index, record.step, sequence_id))

    def steps(self) -> list[StepSummary]:
        return [summary for _, summary in sorted(self._now().steps.items())]

    def _now(self) -> TraceIndex:
        self._index.refresh(TIMEOUT_S)
        return self._index
