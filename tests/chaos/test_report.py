import json
from dataclasses import replace
from pathlib import Path

from tests.chaos.account import Account
from tests.chaos.faults import parse_fault
from tests.chaos.report import Band, broken_promises, content, read_band, table, write
from tests.chaos.runs import Outcome, Sent

BAND = Band(accuracies=(0.994, 0.986), walls_s=(150.0, 160.0))
LINES = ({"time": 13.0, "kind": "died", "who": "teacher engine", "detected_s": 0.5, "recovered_s": 20.0},)


def sent(name: str, **fields: object) -> Sent:
    values = {"detected_s": 0.5, "recovered_s": 20.0, "lines": LINES, "next_step_s": 25.0} | fields
    return Sent(run=1, fault=parse_fault(name), at=12.0, at_s=60.0, at_step=5, **values)  # type: ignore[arg-type]


OUTCOME = Outcome(
    run=1,
    seed=7,
    exit_codes=(-9, 0),
    wall_s=300.0,
    accuracy=0.97,
    steps=80,
    resumed=1,
    account=Account(num_expected=5120, num_trained=5120, num_twice=0, complaints=()),
    sent=(
        sent("kill:teacher actor"),
        sent("kill:teacher actor", recovered_s=40.0),
        sent("kill:driver", detected_s=None, lines=()),
        sent("slow:teacher", detected_s=None, recovered_s=None, lines=()),
    ),
)


def test_a_run_in_the_band_with_all_faults_sent_broke_no_promise() -> None:
    assert broken_promises(BAND, [OUTCOME], wanted=3) == []


def test_every_broken_promise_is_named() -> None:
    low = replace(OUTCOME, accuracy=0.955, broken=("the run ended with exit code 1",))
    assert broken_promises(BAND, [low], wanted=4) == [
        "run 1: the run ended with exit code 1",
        "run 1: accuracy 0.955, expected at least 0.956",
        "3 faults were sent and answered, expected 4",  # a slow teacher is none
    ]


def test_the_file_has_the_promised_keys() -> None:
    found = content(BAND, [OUTCOME], [], {"cores": 2})
    assert found["faults"][0] == {
        "run": 1,
        "kind": "kill",
        "target": "teacher actor",
        "at_s": 60.0,
        "at_step": 5,
        "detected_s": 0.5,
        "recovered_s": 20.0,
        "next_step_s": 25.0,
        "blamed": ["teacher engine"],
    }
    assert found["runs"] == [
        {"seed": 7, "exit_codes": [-9, 0], "wall_s": 300.0, "accuracy": 0.97, "steps": 80, "resumed": 1}
    ]
    assert (found["prompts_expected"], found["prompts_trained"], found["prompts_trained_twice"]) == (5120, 5120, 0)
    assert found["band"]["lowest"] == 0.956
    assert json.loads(json.dumps(found)) == found


def test_the_table_has_a_row_for_each_kind_and_the_broken_promises() -> None:
    lines = table(content(BAND, [OUTCOME], ["run 1: something"], {})).splitlines()
    assert "| kill | teacher actor | 2 | 0.5 | 20.0 to 40.0 | 25.0 |" in lines
    assert "- 3 faults in 1 runs, 3 of them kills." in lines
    assert "- BROKEN: run 1: something" in lines
    assert any("5120 of 5120, 0 of them more than once" in line for line in lines)


def test_the_page_s_part_is_replaced_and_the_band_can_be_taken_up_again(tmp_path: Path) -> None:
    assert read_band(tmp_path) is None
    page = tmp_path / "README.md"
    page.write_text("# Benchmarks\n\nbefore\n")
    write(tmp_path, content(BAND, [OUTCOME], [], {}))
    page.write_text(page.read_text() + "\nafter\n")
    write(tmp_path, content(BAND, [replace(OUTCOME, accuracy=0.981)], [], {}))
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nbefore\n\n## Chaos\n")
    assert text.endswith("\nafter\n")
    assert "0.981" in text
    assert "0.970" not in text
    assert read_band(tmp_path) == BAND
