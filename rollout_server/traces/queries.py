"""Queries to a ``TraceIndex``. The SQL is fixed here; callers' values are bound as parameters."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow.parquet as pq

from common.sequence import FinishReason
from rollout_server.traces.index import QueryTimeout, TraceIndex
from rollout_server.traces.records import SequenceFilter, SequenceOrder, SequenceRecord, TokenRecord
from rollout_server.traces.replay import RecordedSequence
from rollout_server.traces.schema import TOKENS_FILE
from rollout_server.traces.sql import COLUMNS, MATCHES, Row, sequence_record

Quantity = Literal["first_switch", "divergence", "num_tokens"]
ORDERS: tuple[SequenceOrder, ...] = get_args(SequenceOrder)
_REPLAY_BATCH = 2000  # sequences whose divergences are in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PageKey:
    """The position of a page's last sequence in the sort order."""

    is_null: bool
    value: float
    step: int
    sequence_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over matching sequences."""

    num_sequences: int
    num_tokens: int
    num_wasted_tokens: int
    num_switched: int
    num_teacher_tokens: int
    mean_first_switch: float | None
    mean_divergence: float | None  # nats, over all positions where the student proposed


_VALUES: dict[Quantity, str] = {
    "first_switch": f"SELECT CAST(first_switch AS DOUBLE) AS v FROM sequences {MATCHES}",
    "num_tokens": f"SELECT CAST(num_tokens AS DOUBLE) AS v FROM sequences {MATCHES}",
    "divergence": f"SELECT CAST(unnest(divergences) AS DOUBLE) AS v FROM sequences {MATCHES}",
}


def page(
    index: TraceIndex,
    where: SequenceFilter,
    *,
    order: SequenceOrder,
    descending: bool,
    limit: int,
    after: PageKey | None,
    timeout_s: float,
) -> tuple[list[SequenceRecord], PageKey | None, int]:
    """Matching sequences after a position in the sort order (ties by step and id, nulls last), the key of the last one,
    and the total number of matches.

    The key is None on the last page.
    """
    assert order in ORDERS, order
    sign = -1 if descending else 1
    key = f"({order} IS NULL, CAST(coalesce({sign} * {order}, 0) AS DOUBLE), step, sequence_id)"
    follows = f"AND {key} > ($k0, CAST($k1 AS DOUBLE), $k2, $k3)" if after else ""
    place = {"k0": after.is_null, "k1": after.value, "k2": after.step, "k3": after.sequence_id} if after else {}
    sql = f"SELECT {COLUMNS} FROM sequences {MATCHES} {follows} ORDER BY {key} LIMIT $limit"
    rows = index.rows(sql, {**asdict(where), **place, "limit": limit + 1}, timeout_s)
    records = [sequence_record(row) for row in rows[:limit]]
    end = None
    if len(rows) > limit:
        last = records[-1]
        value = getattr(last, order)
        end = PageKey(
            is_null=value is None,
            value=0.0 if value is None else float(sign * value),
            step=last.step,
            sequence_id=last.sequence_id,
        )
    counted = index.rows(f"SELECT count(*) FROM sequences {MATCHES}", asdict(where), timeout_s)
    return records, end, int(counted[0][0])  # type: ignore[call-overload]


def sequence(index: TraceIndex, sequence_id: str, timeout_s: float) -> SequenceRecord | None:
    """One sequence; the newest if two steps have its id."""
    sql = f"SELECT {COLUMNS} FROM sequences WHERE sequence_id = $sequence_id ORDER BY step DESC LIMIT 1"
    rows = index.rows(sql, {"sequence_id": sequence_id}, timeout_s)
    return sequence_record(rows[0]) if rows else None


def tokens(index: TraceIndex, step: int, sequence_id: str) -> list[TokenRecord]:
    """A sequence's tokens in order. Empty if its segment has been replaced or removed in the meantime."""
    segment = index.segment_of(step)
    if segment is None:
        return []
    try:
        table = pq.read_table(segment / TOKENS_FILE, filters=[("sequence_id", "==", sequence_id)])
    except OSError:
        return []
    names = TokenRecord.__slots__
    return [TokenRecord(**row) for row in table.select(list(names)).to_pylist()]


def totals(index: TraceIndex, timeout_s: float) -> Totals:
    """Sums over the whole trace."""
    sql = """SELECT count(*), coalesce(sum(num_tokens), 0), coalesce(sum(num_wasted_tokens), 0),
        count(*) FILTER (num_switches > 0), coalesce(sum(num_teacher_tokens), 0), avg(first_switch),
        sum(list_sum(divergences)) / nullif(sum(list_count(divergences)), 0) FROM sequences"""
    row = index.rows(sql, {}, timeout_s)[0]
    return Totals(**dict(zip(Totals.__slots__, row, strict=True)))  # type: ignore[arg-type]


def names(index: TraceIndex, timeout_s: float) -> tuple[list[str], list[str]]:
    """All policies and finish reasons in the trace."""
    sql = "SELECT list_sort(list(DISTINCT policy)), list_sort(list(DISTINCT finish_reason)) FROM sequences"
    policies, reasons = index.rows(sql, {}, timeout_s)[0]
    return policies or [], reasons or []  # type: ignore[return-value]


def histogram(
    index: TraceIndex, quantity: Quantity, where: SequenceFilter, num_bins: int, timeout_s: float
) -> tuple[list[float], list[int], int]:
    """Edges [num_bins + 1] from 0 to the largest value, counts [num_bins], and the number of rows without a value."""
    values = _VALUES[quantity]
    bounds = index.rows(f"SELECT max(v), count(v), count(*) FROM ({values})", asdict(where), timeout_s)[0]
    largest, num_values, num_rows = bounds
    if not num_values:
        return [], [], num_rows  # type: ignore[return-value]
    width = (float(largest) or 1.0) / num_bins  # type: ignore[arg-type]
    sql = f"""SELECT least(CAST(floor(v / $width) AS BIGINT), $last) AS bin, count(*) FROM ({values})
        WHERE v IS NOT NULL GROUP BY bin"""
    counts = [0] * num_bins
    for place, count in index.rows(sql, {**asdict(where), "width": width, "last": num_bins - 1}, timeout_s):
        # A value added between the two queries may exceed the largest; least() puts it into the last bin.
        counts[max(place, 0)] += count  # type: ignore[call-overload,operator]
    edges = [width * edge for edge in range(num_bins + 1)]
    return edges, counts, num_rows - sum(counts)  # type: ignore[operator]


def recorded(index: TraceIndex, where: SequenceFilter, timeout_s: float) -> Iterator[RecordedSequence]:
    """Sequences for replaying a policy, by step and id. Raises QueryTimeout ``timeout_s`` after the first."""
    deadline = time.monotonic() + timeout_s
    step, sequence_id = -1, ""
    sql = f"""SELECT sequence_id, step, seed, finish_reason, first_switch, first_source, divergences, student_ranks
        FROM sequences {MATCHES} AND (step, sequence_id) > ($step, $id) ORDER BY step, sequence_id LIMIT $limit"""
    while True:
        parameters = {**asdict(where), "step": step, "id": sequence_id, "limit": _REPLAY_BATCH}
        rows = index.rows(sql, parameters, max(deadline - time.monotonic(), 0.001))
        for row in rows:
            if time.monotonic() > deadline:
                raise QueryTimeout(f"the replay took more than {timeout_s:g} s; select fewer steps")
            yield _recorded(row)
        if len(rows) < _REPLAY_BATCH:
            return
        sequence_id, step = rows[-1][:2]  # type: ignore[assignment]


def _recorded(row: Row) -> RecordedSequence:
    sequence_id, step, seed, finish_reason, first_switch, first_source, divergences, ranks = row
    reason: FinishReason = "stop" if finish_reason == "stop" else "length"
    values: list[float | None] = divergences  # type: ignore[assignment]
    places: list[int | None] = ranks  # type: ignore[assignment]
    return RecordedSequence(
        sequence_id=str(sequence_id),
        step=int(step),  # type: ignore[call-overload]
        seed=int(seed),  # type: ignore[call-overload]
        finish_reason=reason,
        first_switch=first_switch,  # type: ignore[arg-type]
        is_given_answer=first_source == "dataset",
        divergences=np.array(values, np.float32),  # None becomes NaN
        student_ranks=np.array([-1 if place is None else place for place in places], np.int32),
    )
