"""Exports of a trace as CSV or Parquet files: all matching sequences in batches, or one step's tokens in memory."""

import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rollout_server.traces.index import TraceIndex
from rollout_server.traces.records import SequenceFilter
from rollout_server.traces.schema import SEQUENCES, TOKENS_FILE
from rollout_server.traces.sql import COLUMNS, MATCHES

Format = Literal["csv", "parquet"]
BATCH = 2000  # sequences in memory at once


def sequences_file(
    index: TraceIndex, where: SequenceFilter, file_format: Format, batch_timeout_s: float
) -> Iterator[bytes]:
    """All matching sequences by step and id, with their texts, as consecutive parts of a file. Raises QueryTimeout."""
    batches = _sequences(index, where, batch_timeout_s)
    if file_format == "parquet":
        sink = _Sink()
        with pq.ParquetWriter(sink, SEQUENCES, compression="zstd") as writer:
            for table in batches:
                writer.write_table(table)
                yield sink.take()
        yield sink.take()
        return
    for number, table in enumerate(batches):
        lines = io.BytesIO()
        pyarrow.csv.write_csv(_flat(table), lines, pyarrow.csv.WriteOptions(include_header=number == 0))
        yield lines.getvalue()


def _sequences(index: TraceIndex, where: SequenceFilter, timeout_s: float) -> Iterator[pa.Table]:
    """Tables of at most ``BATCH`` rows; at least one table."""
    place: dict[str, object] = {"step": -1, "id": ""}
    sql = f"""SELECT {COLUMNS} FROM sequences {MATCHES} AND (step, sequence_id) > ($step, $id)
        ORDER BY step, sequence_id LIMIT $limit"""
    names = SEQUENCES.names
    while True:
        rows = index.rows(sql, {**asdict(where), **place, "limit": BATCH}, timeout_s)
        table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=SEQUENCES)
        yield table
        if len(rows) < BATCH:
            return
        place = {"step": table["step"][-1].as_py(), "id": table["sequence_id"][-1].as_py()}


class _Sink(io.RawIOBase):
    """A file that is written once, sequentially, and whose content is taken away in parts."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        self._num_bytes += len(self._pieces[-1])
        return len(self._pieces[-1])

    def tell(self) -> int:
        return self._num_bytes

    def take(self) -> bytes:
        """The bytes written since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def tokens_file(index: TraceIndex, step: int, file_format: Format) -> bytes | None:
    """All tokens of a step, or None if no readable segment holds it."""
    segment = index.segment_of(step)
    if segment is None:
        return None
    try:
        return _file(pq.read_table(segment / TOKENS_FILE), file_format)
    except FileNotFoundError:  # replaced in the meantime
        return None


def _file(table: pa.Table, file_format: Format) -> bytes:
    file = io.BytesIO()
    if file_format == "parquet":
        pq.write_table(table, file, compression="zstd")
    else:
        pyarrow.csv.write_csv(_flat(table), file)
    return file.getvalue()


def _flat(table: pa.Table) -> pa.Table:
    """For CSV, which has no lists: lists become numbers separated by spaces, and dictionaries become plain text."""
    for place, column in enumerate(table.schema):
        if pa.types.is_list(column.type):
            lists = table[column.name].to_pylist()
            texts = [None if values is None else " ".join(map(str, values)) for values in lists]
            table = table.set_column(place, column.name, pa.array(texts, pa.string()))
        elif pa.types.is_dictionary(column.type):
            table = table.set_column(place, column.name, table[column.name].cast(pa.string()))
    return table
