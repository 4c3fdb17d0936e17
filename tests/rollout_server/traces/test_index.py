import threading
from pathlib import Path

import pytest

from rollout_server.traces import queries
from rollout_server.traces.index import QueryTimeout, TraceIndex
from rollout_server.traces.writer import TraceWriter


@pytest.fixture
def index(folder: Path):
    index = TraceIndex(folder)
    yield index
    index.close()


def test_a_trace_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    index = TraceIndex(tmp_path / "none")
    index.refresh(5.0)
    assert queries.totals(index, 5.0).num_sequences == 0
    index.close()


def test_a_replaced_step_counts_once(folder: Path, writer: TraceWriter, make_sequence) -> None:
    writer.write_segment(1, [make_sequence(prompt_id="a"), make_sequence(prompt_id="b")])
    index = TraceIndex(folder, rescan_after_s=0.0)
    index.refresh(5.0)
    writer.write_segment(1, [make_sequence(prompt_id="c")])
    index._scanned_s = float("-inf")  # as if time had passed
    index.refresh(5.0)
    assert queries.totals(index, 5.0).num_sequences == 1
    assert queries.sequence(index, "a.0.0", 5.0) is None
    assert (index.generation, index.changed_since(1)) == (2, [1])
    index.close()


def test_a_slow_query_is_interrupted(index: TraceIndex) -> None:
    with pytest.raises(QueryTimeout):
        index.rows("SELECT count(*) FROM range(10000000000) a WHERE sin(a.range) > $x", {"x": 2.0}, 0.05)
    assert index.rows("SELECT 1", {}, 5.0) == [(1,)]


def test_several_threads_may_ask_while_it_grows(index: TraceIndex, writer: TraceWriter, make_sequence) -> None:
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(20):
                index.refresh(5.0)
                queries.totals(index, 5.0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(10):
        writer.write_segment(step, [make_sequence()])
    for thread in threads:
        thread.join()
    assert not failures
