"""Sequences as a file: all of them, whatever a batch holds."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rollout_server.traces import files
from rollout_server.traces.index import TraceIndex
from rollout_server.traces.records import SequenceFilter
from rollout_server.traces.writer import TraceWriter


@pytest.fixture
def index(tmp_path: Path, decode, token_texts, make_sequence):
    writer = TraceWriter(tmp_path, decode=decode, token_texts=token_texts)
    for step in (1, 2):
        one = make_sequence(num_tokens=4, switches=(2,) if step == 1 else ())
        writer.write_segment(step, [make_renamed(one, f"p{number:04}") for number in range(files.BATCH - 500)])
    index = TraceIndex(tmp_path)
    index.refresh(60.0)
    yield index
    index.close()


def make_renamed(sequence, prompt_id: str):
    """A copy under another name: making thousands anew takes long."""
    return replace(sequence, prompt=replace(sequence.prompt, prompt_id=prompt_id))


@pytest.mark.parametrize(
    ("where", "num_rows"),
    [(SequenceFilter(), 2 * files.BATCH - 1000), (SequenceFilter(switched=True), files.BATCH - 500)],
)
@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_every_matching_sequence_is_in_the_file_once_and_in_order(index, where, num_rows, file_format) -> None:
    pieces = list(files.sequences_file(index, where, file_format, 60.0))
    content = b"".join(pieces)
    if file_format == "csv":
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        places = [(int(row["step"]), row["sequence_id"]) for row in rows]
    else:
        table = pq.read_table(io.BytesIO(content))
        places = list(zip(table["step"].to_pylist(), table["sequence_id"].to_pylist(), strict=True))
    assert len(places) == num_rows == len(set(places))
    assert places == sorted(places)
    assert max(map(len, pieces)) < len(content) or num_rows < files.BATCH


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_nothing_that_matches_is_a_file_without_rows(index, file_format) -> None:
    content = b"".join(files.sequences_file(index, SequenceFilter(policy="none"), file_format, 60.0))
    if file_format == "csv":
        assert content.decode().startswith('"sequence_id"')
        assert len(content.splitlines()) == 1
    else:
        assert pq.read_table(io.BytesIO(content)).num_rows == 0
