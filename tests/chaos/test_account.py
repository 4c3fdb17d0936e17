import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.account import Account, lines_of, segments_of, spans, take_account
from tests.data.record_demo import DEMO_RUN

NUM_STEPS, PROMPTS_PER_STEP, NUM_ROWS = 6, 24, 2048


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recorded run, with the state that its last checkpoint would have."""
    run = Path(shutil.copytree(DEMO_RUN, tmp_path / "run"))
    write_cursor(run, epoch=0, position=NUM_STEPS * PROMPTS_PER_STEP)
    return run


def write_cursor(run: Path, *, epoch: int, position: int) -> None:
    checkpoint = run / "checkpoints" / f"step-{NUM_STEPS:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "state.json").write_text(json.dumps({"cursor": {"epoch": epoch, "position": position}}))


def account(run: Path, num_rows: int = NUM_ROWS) -> Account:
    return take_account(run, num_steps=NUM_STEPS, prompts_per_step=PROMPTS_PER_STEP, num_rows=num_rows)


def rewrite(run: Path, step: int, *, rows_of: int) -> None:
    """Make a step's sequences those of another step."""
    tables = {
        number: pq.read_table(segment / "sequences.parquet") for number, segment in segments_of(run / "traces").items()
    }
    table = tables[rows_of]
    place = table.schema.get_field_index("step")
    table = table.set_column(place, table.schema.field("step"), pa.array([step] * len(table), pa.int32()))
    pq.write_table(table, run / "traces" / f"step-{step:06d}" / "sequences.parquet")


def test_a_good_run_has_nothing_to_complain_of(run: Path) -> None:
    expected = NUM_STEPS * PROMPTS_PER_STEP
    assert account(run) == Account(num_expected=expected, num_trained=expected, num_twice=0, complaints=())


def test_a_step_s_prompts_trained_in_another_step_too_are_counted_and_missed(run: Path) -> None:
    rewrite(run, 4, rows_of=3)
    found = account(run)
    assert (found.num_trained, found.num_twice) == (5 * PROMPTS_PER_STEP, PROMPTS_PER_STEP)
    assert any("2 times" in complaint for complaint in found.complaints)
    assert any("step 4 has tokens of weight versions [2]" in complaint for complaint in found.complaints)


def test_a_lost_step_is_named(run: Path) -> None:
    shutil.rmtree(run / "traces" / "step-000003")
    found = account(run)
    assert "traces: steps 1-2, 4-6, expected 1 to 6" in found.complaints
    assert found.num_trained == 5 * PROMPTS_PER_STEP


def test_a_step_collected_again_counts_once_by_its_newest_attempt(run: Path) -> None:
    shutil.copytree(run / "traces" / "step-000002", run / "traces" / "step-000002.1")
    assert segments_of(run / "traces")[2].name == "step-000002.1"
    assert account(run).complaints == ()


def test_prompts_beyond_the_data_or_of_another_epoch_are_named(run: Path) -> None:
    found = account(run, num_rows=100)  # then the recorded run took too many of epoch 0 and none of epoch 1
    assert [complaint for complaint in found.complaints if complaint.startswith("traces")] == [
        "traces: 144 prompts of epoch 0, expected 100 of 100",
        "traces: 0 prompts of epoch 1, expected 44 of 100",
    ]


def test_a_step_measured_twice_is_named(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[1]]))
    assert account(run).complaints == ("metrics.jsonl: 7 steps (1-6), expected 1 to 6, once",)


def test_a_checkpoint_that_stands_elsewhere_is_named(run: Path) -> None:
    write_cursor(run, epoch=0, position=143)
    assert account(run).complaints == ("checkpoints: the last stands at prompt 143, expected 144",)
    shutil.rmtree(run / "checkpoints")
    assert account(run).complaints == ("checkpoints: none after step 6",)


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert lines_of(tmp_path / "lines") == [{"a": 1}, {"a": 2}]
    assert lines_of(tmp_path / "none") == []


def test_numbers_are_said_as_spans() -> None:
    assert spans([5, 1, 2, 3]) == "1-3, 5"
    assert spans([]) == "none"
