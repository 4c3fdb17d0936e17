import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.sequence import TopLogprobs
from rollout_server.engines.protocol import ScoreRequest, Written
from rollout_server.engines.remote.messages import RowsBatch, ScoreBatch, WrittenBatch


@st.composite
def pieces(draw: st.DrawFn, k: int) -> Written:
    num_tokens = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Written(
        token_ids=rng.integers(0, 32, num_tokens).astype(np.int32),
        logprobs=rng.normal(size=num_tokens).astype(np.float32),
        top=TopLogprobs(
            rng.integers(0, 32, (num_tokens, k)).astype(np.int32), rng.normal(size=(num_tokens, k)).astype(np.float32)
        ),
        weight_version=draw(st.integers(0, 9)),
        finish_reason=draw(st.sampled_from([None, "stop", "length"])),
    )


@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.tuples(st.integers(0, 2**40), pieces(k)), max_size=6)))
def test_what_is_packed_is_unpacked(moved: list[tuple[int, Written]]) -> None:
    unpacked = list(WrittenBatch.pack(moved).unpack())
    assert [stream_id for stream_id, _ in unpacked] == [stream_id for stream_id, _ in moved]
    for (_, mine), (_, theirs) in zip(unpacked, moved, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
        np.testing.assert_array_equal(mine.top.token_ids, theirs.top.token_ids)
        np.testing.assert_array_equal(mine.top.logprobs, theirs.top.logprobs)
        assert (mine.weight_version, mine.finish_reason) == (theirs.weight_version, theirs.finish_reason)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 8)), max_size=6))
def test_reads_come_out_as_they_went_in(asked: list[tuple[int, int, int]]) -> None:
    requests = [
        (call_id, ScoreRequest(token_ids=np.arange(size, dtype=np.int32), start=1 + start % size))
        for call_id, size, start in asked
    ]
    unpacked = list(ScoreBatch.pack(requests).unpack())
    assert [call_id for call_id, _ in unpacked] == [call_id for call_id, _ in requests]
    for (_, mine), (_, theirs) in zip(unpacked, requests, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        assert mine.start == theirs.start


@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.tuples(st.integers(0, 2**40), pieces(k)), max_size=6)))
def test_rows_come_out_as_they_went_in(moved: list[tuple[int, Written]]) -> None:
    read = [(call_id, written.top) for call_id, written in moved]
    unpacked = list(RowsBatch.pack(read).unpack())
    assert [call_id for call_id, _ in unpacked] == [call_id for call_id, _ in read]
    for (_, mine), (_, theirs) in zip(unpacked, read, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
