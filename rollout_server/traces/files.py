"""Parts of a trace as CSV or Parquet files, in memory: at most so many sequences, or one step's tokens."""

import io
from dataclasses import asdict
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rollout_server.traces.index import COLUMNS, TraceIndex
from rollout_server.traces.queries import MATCHES, SequenceQuery
from rollout_server.traces.schema import SEQUENCES, TOKENS_FILE

Format = Literal["csv", "parquet"]
MAX_SEQUENCES = 20_000


def sequences_file(index: TraceIndex, where: SequenceQuery, file_format: Format, timeout_s: float) -> bytes:
    """The first ``MAX_SEQUENCES`` matching sequences by step and id, texts included."""
    sql = f"SELECT {COLUMNS} FROM sequences {MATCHES} ORDER BY step, sequence_id LIMIT {MAX_SEQUENCES}"
    rows = index.rows(sql, asdict(where), timeout_s)
    names = SEQUENCES.names
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=SEQUENCES)
    return _file(table, file_format)


def tokens_file(index: TraceIndex, step: int, file_format: Format) -> bytes | None:
    """All tokens of a step; None when no readable segment holds it."""
    segment = index.segment_of(step)
    if segment is None:
        return None
    try:
        return _file(pq.read_table(segment / TOKENS_FILE), file_format)
    except FileNotFoundError:  # replaced a moment ago
        return None


def _file(table: pa.Table, file_format: Format) -> bytes:
    file = io.BytesIO()
    if file_format == "parquet":
        pq.write_table(table, file, compression="zstd")
    else:
        pyarrow.csv.write_csv(_flat(table), file)
    return file.getvalue()


def _flat(table: pa.Table) -> pa.Table:
    """Lists become text, numbers separated by spaces, for CSV has no lists; names become plain text."""
    for place, column in enumerate(table.schema):
        if pa.types.is_list(column.type):
            lists = table[column.name].to_pylist()
            texts = [None if values is None else " ".join(map(str, values)) for values in lists]
            table = table.set_column(place, column.name, pa.array(texts, pa.string()))
        elif pa.types.is_dictionary(column.type):
            table = table.set_column(place, column.name, table[column.name].cast(pa.string()))
    return table
