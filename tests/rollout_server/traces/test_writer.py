import os

import pyarrow.parquet as pq
import pytest

from rollout_server.traces.schema import SCHEMA_VERSION, SEQUENCES_FILE, TOKENS_FILE, VERSION_KEY
from rollout_server.traces.writer import TraceWriter, drop_segments_after


def test_a_segment_is_a_folder_named_after_its_step_with_two_files(writer, folder, make_sequence):
    segment = writer.write_segment(12, [make_sequence()])
    assert segment == folder / "step-000012"
    assert sorted(os.listdir(segment)) == [SEQUENCES_FILE, TOKENS_FILE]
    assert os.listdir(folder) == ["step-000012"]


def test_every_column_carries_its_description_and_the_file_its_version(writer, make_sequence):
    segment = writer.write_segment(1, [make_sequence()])
    for file in (SEQUENCES_FILE, TOKENS_FILE):
        schema = pq.read_schema(segment / file)
        assert schema.metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
        assert all(field.metadata[b"description"] for field in schema)


def test_what_does_not_exist_is_null_and_never_nan_or_minus_one(writer, make_sequence):
    segment = writer.write_segment(1, [make_sequence(num_tokens=4, switches=[1])])
    tokens = pq.read_table(segment / TOKENS_FILE).to_pydict()
    assert tokens["source"] == ["student", "teacher", "teacher", "teacher"]
    assert tokens["is_switch"] == [False, True, False, False]
    for name in ("divergence", "student_rank", "student_covered_mass", "student_top_ids", "weight_version"):
        assert [value is None for value in tokens[name]] == [False, False, True, True], name
    assert tokens["threshold"] == [None] * 4
    assert [value is None for value in tokens["student_logprob"]] == [False, True, True, True]


def test_only_the_first_alternatives_are_kept(writer, make_sequence):
    sequence = make_sequence(k=8)
    tokens = pq.read_table(writer.write_segment(1, [sequence]) / TOKENS_FILE).to_pydict()
    assert tokens["teacher_top_ids"] == sequence.teacher_top.token_ids[:, :3].tolist()


def test_no_alternatives_are_kept_when_none_are_wanted(folder, decode, token_texts, make_sequence):
    writer = TraceWriter(folder, decode=decode, token_texts=token_texts, top_alternatives=0)
    tokens = pq.read_table(
        writer.write_segment(1, [make_sequence(num_tokens=3, switches=[1])]) / TOKENS_FILE
    ).to_pydict()
    assert tokens["teacher_top_ids"] == [[], [], []]


def test_each_distinct_token_is_decoded_once_in_a_run(folder, decode, token_texts, make_sequence):
    asked: list[int] = []

    def counting(token_ids: list[int]) -> list[str]:
        asked.extend(token_ids)
        return token_texts(token_ids)

    writer = TraceWriter(folder, decode=decode, token_texts=counting)
    for step in range(3):
        writer.write_segment(step, [make_sequence(seed=seed, num_tokens=40) for seed in range(4)])
    assert len(asked) == len(set(asked))


def test_a_step_that_is_collected_again_replaces_the_first_attempt(writer, folder, make_sequence):
    writer.write_segment(3, [make_sequence(prompt_id="first")])
    assert writer.write_segment(3, [make_sequence(prompt_id="second")]) == folder / "step-000003.1"
    assert writer.write_segment(3, [make_sequence(prompt_id="third")]) == folder / "step-000003.2"
    assert os.listdir(folder) == ["step-000003.2"]


def test_what_a_crash_left_half_written_is_cleared_away(writer, folder, make_sequence):
    unfinished = folder / ".step-000003.unfinished"
    unfinished.mkdir()
    (unfinished / TOKENS_FILE).write_bytes(b"PAR1 half")
    writer.write_segment(3, [make_sequence()])
    assert os.listdir(folder) == ["step-000003"]


def test_a_failure_while_writing_leaves_the_earlier_segment_in_place(writer, folder, decode, make_sequence):
    writer.write_segment(3, [make_sequence()])

    def broken(token_ids: list[int]) -> list[str]:
        raise RuntimeError("no such token")

    with pytest.raises(RuntimeError, match="no such token"):
        TraceWriter(folder, decode=decode, token_texts=broken).write_segment(3, [make_sequence()])
    assert os.listdir(folder) == ["step-000003"]


def test_later_steps_are_dropped_whatever_their_attempt(writer, folder, make_sequence):
    for step in (1, 2, 2, 3, 1_000_000):
        writer.write_segment(step, [make_sequence()])
    (folder / ".step-000009.unfinished").mkdir()
    drop_segments_after(folder, 2)
    assert sorted(os.listdir(folder)) == [".step-000009.unfinished", "step-000001", "step-000002.1"]
    drop_segments_after(folder / "absent", 0)
