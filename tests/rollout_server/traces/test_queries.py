import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sequence import MixedSequence
from rollout_server.traces.records import SequenceFilter, TokenRecord
from rollout_server.traces.schema import SEQUENCES_FILE, TOKENS_FILE
from rollout_server.traces.writer import TraceWriter
from tests.support.trace_reader import ALL_SEQUENCES, TraceReader

INJECTIONS = ["'; DROP TABLE sequences; --", "' OR '1'='1", "%", "a\x00b", "../../etc/passwd", "$limit", '"; --']


@pytest.fixture
def three_steps(writer: TraceWriter, make_sequence) -> None:
    """Step s holds an adaswitch sequence that switched at 5 + s, and an on-policy one. 12 tokens each."""
    for step in (1, 2, 3):
        writer.write_segment(
            step,
            [
                make_sequence(prompt_id="switched", epoch=step, switches=[5 + step], seed=step, num_wasted_tokens=step),
                make_sequence(prompt_id="kept", epoch=step, switches=[], policy="on_policy", seed=10 + step),
            ],
        )


@pytest.fixture
def reader(folder: Path, three_steps: None) -> TraceReader:
    return TraceReader(folder)


def ids(reader: TraceReader, where: SequenceFilter = ALL_SEQUENCES, **options: object) -> list[str]:
    return [sequence.sequence_id for sequence in reader.sequences(where, **options)]  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- round trip


@settings(max_examples=25)
@given(data=st.data())
def test_what_was_written_is_read_back(sequence_lists, decode, token_texts, data):
    written = data.draw(sequence_lists())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        TraceWriter(folder, decode=decode, token_texts=token_texts, top_alternatives=3).write_segment(4, written)
        with TraceReader(folder) as reader:
            for sequence in written:
                trace = reader.sequence(sequence.sequence_id)
                assert trace is not None
                check_sequence(trace.sequence, sequence, decode)
                check_tokens(trace.tokens, sequence)


def check_sequence(record, sequence: MixedSequence, decode) -> None:
    assert record.prompt_id == sequence.prompt.prompt_id
    assert (record.epoch, record.sample_index) == (sequence.prompt.epoch, sequence.prompt.sample_index)
    assert (record.step, record.policy, record.seed) == (4, sequence.policy, sequence.prompt.seed)
    assert record.prompt_text == decode(sequence.prompt.token_ids.tolist())
    assert record.completion_text == decode(sequence.token_ids.tolist())
    assert (record.answer, record.finish_reason) == (sequence.prompt.answer, sequence.finish_reason)
    assert record.num_tokens == record.num_student_tokens + record.num_teacher_tokens == len(sequence)
    assert record.num_teacher_tokens == sequence.num_teacher_tokens
    assert record.switches == sequence.switches.tolist()
    assert (record.num_switches, record.first_switch) == (len(record.switches), sequence.first_switch)
    assert record.num_wasted_tokens == sequence.num_wasted_tokens
    assert_same_floats([record.mean_divergence], [sequence.mean_divergence])
    versions = [version for version in sequence.weight_versions.tolist() if version >= 0]
    assert record.weight_version_min == min(versions, default=None)
    assert record.weight_version_max == max(versions, default=None)


def check_tokens(tokens: list[TokenRecord], sequence: MixedSequence) -> None:
    assert [token.position for token in tokens] == list(range(len(sequence)))
    assert [token.token_id for token in tokens] == sequence.token_ids.tolist()
    assert [token.text for token in tokens] == [f"t{token_id} " for token_id in sequence.token_ids]
    assert [token.source == "teacher" for token in tokens] == sequence.sources.astype(bool).tolist()
    assert [token.position for token in tokens if token.is_switch] == sequence.switches.tolist()
    assert_same_floats([token.divergence for token in tokens], sequence.divergences)
    assert_same_floats([token.threshold for token in tokens], sequence.thresholds)
    assert_same_floats([token.student_logprob for token in tokens], sequence.student_logprobs)
    assert_same_floats([token.teacher_logprob for token in tokens], sequence.teacher_logprobs)
    assert_same_floats([token.student_covered_mass for token in tokens], sequence.student_top.covered_mass())
    assert_same_floats([token.teacher_covered_mass for token in tokens], sequence.teacher_top.covered_mass())
    assert [-1 if token.student_rank is None else token.student_rank for token in tokens] == list(
        sequence.student_ranks
    )
    assert [-1 if token.weight_version is None else token.weight_version for token in tokens] == list(
        sequence.weight_versions
    )
    for row, token in enumerate(tokens):
        assert token.teacher_top_ids == sequence.teacher_top.token_ids[row, :3].tolist()
        assert_same_floats(token.teacher_top_logprobs or [], sequence.teacher_top.logprobs[row, :3])
        if np.isnan(sequence.student_top.logprobs[row]).all():
            assert token.student_top_ids is token.student_top_logprobs is None
        else:
            assert token.student_top_ids == sequence.student_top.token_ids[row, :3].tolist()


def assert_same_floats(read, written) -> None:
    np.testing.assert_array_equal(
        np.array([math.nan if value is None else value for value in read], np.float32), np.array(written, np.float32)
    )


# ------------------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (SequenceFilter(), ["kept.1.0", "switched.1.0", "kept.2.0", "switched.2.0", "kept.3.0", "switched.3.0"]),
        (SequenceFilter(first_step=3), ["kept.3.0", "switched.3.0"]),
        (SequenceFilter(last_step=1), ["kept.1.0", "switched.1.0"]),
        (SequenceFilter(first_step=2, last_step=2, switched=True), ["switched.2.0"]),
        (SequenceFilter(switched=False, first_step=2), ["kept.2.0", "kept.3.0"]),
        (SequenceFilter(policy="on_policy", last_step=2), ["kept.1.0", "kept.2.0"]),
        (SequenceFilter(first_step=9), []),
    ],
)
def test_sequences_are_filtered_by_step_switch_and_policy(reader, where, expected):
    assert ids(reader, where) == expected
    assert reader.num_sequences(where) == len(expected)


def test_sequences_are_ordered_with_nulls_last_in_both_directions(reader):
    ascending = ids(reader, order="first_switch")
    assert ascending == ["switched.1.0", "switched.2.0", "switched.3.0", "kept.1.0", "kept.2.0", "kept.3.0"]
    descending = ids(reader, order="first_switch", descending=True)
    assert descending == ["switched.3.0", "switched.2.0", "switched.1.0", "kept.1.0", "kept.2.0", "kept.3.0"]


def test_a_sequence_that_is_not_there_is_none(reader):
    assert reader.sequence("absent.0.0") is None


def test_steps_are_summed_up_one_by_one(reader, make_sequence):
    first, *_ = summaries = reader.steps()
    assert [summary.step for summary in summaries] == [1, 2, 3]
    assert (first.num_sequences, first.num_tokens, first.num_wasted_tokens) == (2, 24, 1)
    assert (first.switch_rate, first.teacher_share, first.mean_first_switch) == (0.5, 6 / 24, 6.0)
    switched, kept = make_sequence(switches=[6], seed=1), make_sequence(switches=[], seed=11)
    judged = np.concatenate([switched.divergences[:7], kept.divergences])
    assert first.divergence_mean == pytest.approx(judged.mean(), rel=1e-6)
    quantiles = [first.divergence_p50, first.divergence_p90, first.divergence_p99]
    assert quantiles == pytest.approx(np.quantile(judged, [0.5, 0.9, 0.99]), rel=1e-5)


def test_a_step_without_any_proposal_has_no_divergence(writer, folder, make_sequence):
    writer.write_segment(1, [make_sequence(switches=[0])])
    (summary,) = TraceReader(folder).steps()
    assert (summary.teacher_share, summary.divergence_mean, summary.divergence_p99) == (1.0, None, None)


# ---------------------------------------------------------------------------------------- a folder that is being used


def test_a_growing_trace_is_seen_as_it_grows(reader, writer, make_sequence):
    assert len(reader.steps()) == 3
    writer.write_segment(4, [make_sequence(prompt_id="new")])
    assert len(reader.steps()) == 4
    assert ids(reader, SequenceFilter(first_step=4)) == ["new.0.0"]


def test_of_a_step_that_was_collected_again_only_the_last_attempt_counts(reader, writer, folder, make_sequence):
    assert len(reader.steps()) == 3
    shutil.copytree(folder / "step-000002", folder / "kept-aside")
    writer.write_segment(2, [make_sequence(prompt_id="again")])
    assert ids(reader, SequenceFilter(first_step=2, last_step=2)) == ["again.0.0"]
    assert reader.steps()[1].num_sequences == 1
    (folder / "kept-aside").rename(folder / "step-000002")  # as after a crash before the old one was deleted
    assert ids(reader, SequenceFilter(first_step=2, last_step=2)) == ["again.0.0"]


def test_what_is_being_written_is_no_segment_yet(reader, folder):
    shutil.copytree(folder / "step-000001", folder / ".step-000009.unfinished")
    assert len(ids(reader)) == 6
    assert reader.skipped == []


def test_an_empty_trace_has_nothing_and_complains_of_nothing(folder):
    folder.mkdir()
    reader = TraceReader(folder)
    assert (reader.sequences(), reader.num_sequences(), reader.steps(), reader.skipped) == ([], 0, [], [])


@pytest.mark.parametrize("file", [SEQUENCES_FILE, TOKENS_FILE])
def test_a_half_copied_segment_is_skipped_and_named_until_it_is_whole(reader, folder, file):
    path = folder / "step-000002" / file
    whole = path.read_bytes()
    for half in (whole[: len(whole) // 2], b"", None):
        path.unlink() if half is None else path.write_bytes(half)
        assert [summary.step for summary in reader.steps()] == [1, 3]
        assert len(ids(reader)) == 4
        (skipped,) = reader.skipped
        assert skipped.name == "step-000002"
        assert skipped.reason.startswith(file)
        assert "\n" not in skipped.reason
    path.write_bytes(whole)
    assert len(ids(reader)) == 6
    assert reader.skipped == []


def test_a_segment_with_corrupt_pages_is_skipped_as_soon_as_it_is_read(reader, folder):
    path = folder / "step-000002" / TOKENS_FILE
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    path.write_bytes(content)
    assert [summary.step for summary in reader.steps()] == [1, 3]
    assert [segment.name for segment in reader.skipped] == ["step-000002"]


def test_a_segment_of_another_schema_version_is_skipped(reader, folder):
    path = folder / "step-000002" / SEQUENCES_FILE
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("seed"), path)
    assert len(ids(reader)) == 4
    assert reader.skipped[0].reason == "sequences.parquet is not of schema version 1"


# -------------------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("text", INJECTIONS)
def test_ids_that_look_like_sql_are_only_ids(writer, folder, make_sequence, text):
    writer.write_segment(1, [make_sequence(prompt_id=text, policy=text), make_sequence(prompt_id="other")])
    reader = TraceReader(folder)
    trace = reader.sequence(f"{text}.0.0")
    assert trace is not None
    assert trace.sequence.prompt_id == text
    assert len(trace.tokens) == 12
    assert ids(reader, SequenceFilter(policy=text)) == [f"{text}.0.0"]
    assert reader.sequence(text) is None
    assert len(ids(reader)) == 2


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "a=b", "it's"])
def test_a_folder_whose_name_looks_like_a_pattern_is_read_as_itself(tmp_path, decode, token_texts, make_sequence, name):
    for folder, prompt_id in ((name, "right"), ("run1", "wrong"), ("runs", "wrong")):
        TraceWriter(tmp_path / folder, decode=decode, token_texts=token_texts).write_segment(
            1, [make_sequence(prompt_id=prompt_id)]
        )
    assert ids(TraceReader(tmp_path / name)) == ["right.0.0"]


def test_reading_a_trace_needs_neither_torch_nor_ray():
    code = "import sys, rollout_server.traces.queries, rollout_server.traces.writer; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "vllm", "transformers"} & set(modules)
