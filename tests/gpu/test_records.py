from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.records import CheckRecord, Figure, Figures, Machine, Results, concluded, line, read, write

CATALOGUE = [("learner", "first"), ("learner", "second"), ("sync", "third")]


def machine(**changes: Any) -> Machine:
    values = {
        "date": "2026-01-02T03:04:05Z",
        "gpus": ("NVIDIA L4", "NVIDIA L4"),
        "gpu_memory_gib": 22.5,
        "driver": "580.1",
        "versions": {"torch": "2.13.0"},
        "processor": "a processor",
        "cores": 8,
    }
    return Machine(**{**values, **changes})


def passed(name: str, value: float = 1.0) -> CheckRecord:
    figures = (Figure(name="time", value=value, unit="s", at_most=9.0),)
    return CheckRecord(part="learner", name=name, outcome="passed", figures=figures, seconds=2.0)


def not_run(name: str, reason: str, *, measured: str | None = None) -> CheckRecord:
    return CheckRecord(part="learner", name=name, outcome="not run", reason=reason, measured=measured)


def outcomes(results: Results) -> dict[str, str]:
    return {record.name: record.outcome for record in results.checks}


@pytest.mark.parametrize(
    ("figure", "holds"),
    [
        (Figure(name="x", value=1.0, unit="", at_most=1.0), True),
        (Figure(name="x", value=1.1, unit="", at_most=1.0), False),
        (Figure(name="x", value=0.9, unit="", at_least=1.0), False),
        (Figure(name="x", value=float("nan"), unit=""), False),
        (Figure(name="x", value=float("inf"), unit="", at_least=1.0), False),
        (Figure(name="x", value=-5.0, unit="s"), True),
    ],
)
def test_a_figure_holds_where_it_is_a_number_within_its_bounds(figure: Figure, holds: bool) -> None:
    assert figure.holds is holds


def test_a_figure_out_of_its_bounds_fails_the_check_and_loses_no_other() -> None:
    figures = Figures()
    figures.add("share", 0.5, "", at_least=0.9)
    figures.add("time", 2.0, "s")
    record = concluded("learner", "first", figures, 1.0)
    assert record.outcome == "failed"
    assert record.reason == "share 0.5 (at least 0.9)"
    assert [figure.name for figure in record.figures] == ["share", "time"]
    assert line(record) == "learner.first: failed in 1.0 s; share 0.5 (at least 0.9); time 2 s"


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    broken = CheckRecord(
        part="sync",
        name="third",
        outcome="failed",
        figures=(Figure(name="rms", value=float("nan"), unit="nats", at_most=0.1),),
        reason="rms nan nats (at most 0.1)",
        seconds=3.0,
    )
    results = Results(checks=(passed("first"), broken)).measured_on(machine())
    write(tmp_path / "gpu.json", results)
    back = read(tmp_path / "gpu.json")
    assert back.machines == results.machines
    assert back.checks[0] == results.checks[0]
    assert repr(back.checks[1]) == repr(results.checks[1])  # nan equals nothing


def test_there_are_no_results_without_a_file(tmp_path: Path) -> None:
    assert read(tmp_path / "gpu.json") == Results()


def test_a_machine_without_a_gpu_replaces_nothing_that_was_measured() -> None:
    known = Results(checks=(passed("first"),)).measured_on(machine())
    without = Results(checks=(not_run("first", "no GPU"), not_run("second", "no GPU")))
    merged = known.merged(without, CATALOGUE)
    assert outcomes(merged) == {"first": "passed", "second": "not run"}
    assert merged.machines == known.machines
    assert merged.merged(without, CATALOGUE) == merged


def test_a_reason_given_on_a_gpu_stays_when_there_is_none() -> None:
    known = Results(checks=(not_run("first", "needs two GPUs", measured="2026-01-02T03:04:05Z"),), machines={})
    known = replace(known, machines={"2026-01-02T03:04:05Z": machine()})
    merged = known.merged(Results(checks=(not_run("first", "no GPU"),)), CATALOGUE)
    assert merged.checks[0].reason == "needs two GPUs"


def test_a_later_run_replaces_an_outcome_and_its_machine() -> None:
    known = Results(checks=(passed("first", 1.0), passed("second", 1.0))).measured_on(machine())
    later = machine(date="2026-02-02T00:00:00Z", gpus=("NVIDIA H200",))
    merged = known.merged(Results(checks=(passed("first", 2.0),)).measured_on(later), CATALOGUE)
    assert [record.figures[0].value for record in merged.checks] == [2.0, 1.0]
    assert [it.card for it in merged.machines.values()] == ["2 x NVIDIA L4", "NVIDIA H200"]
    merged = merged.merged(Results(checks=(passed("second", 2.0),)).measured_on(later), CATALOGUE)
    assert [it.card for it in merged.machines.values()] == ["NVIDIA H200"]


def test_what_can_not_be_run_on_another_card_keeps_its_outcome() -> None:
    known = Results(checks=(passed("first"),)).measured_on(machine())
    smaller = machine(date="2026-02-02T00:00:00Z")
    merged = known.merged(Results(checks=(not_run("first", "needs two GPUs"),)).measured_on(smaller), CATALOGUE)
    assert outcomes(merged) == {"first": "passed"}
    assert merged.machines == known.machines


def test_a_check_that_no_longer_exists_is_dropped() -> None:
    merged = Results(checks=(passed("former"),)).measured_on(machine()).merged(Results(), CATALOGUE)
    assert merged == Results()
