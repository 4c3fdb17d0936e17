from pathlib import Path

from tests.gpu.catalogue import Part
from tests.gpu.records import CheckRecord
from tests.gpu.supervise import Options, run_part

PART = Part(letter="z", name="part", title="Part", checks={})


def run(folder: Path, *checks: str, module: str = "tests.gpu.misbehaving", **options: float) -> list[CheckRecord]:
    times = {"minutes": 4.0, "check_limit_s": 5.0, **options}
    return run_part(PART, checks, Options(device="cpu", logs=folder, module=module, **times))


def test_every_check_has_an_outcome_whatever_the_others_do(tmp_path: Path) -> None:
    names = ("passes", "out_of_bounds", "lacks_something", "raises", "crashes", "breaks_cuda", "passes_too")
    records = run(tmp_path, *names)
    assert [(record.name, record.outcome) for record in records] == [
        ("passes", "passed"),
        ("out_of_bounds", "failed"),
        ("lacks_something", "not run"),
        ("raises", "failed"),
        ("crashes", "failed"),
        ("breaks_cuda", "failed"),
        ("passes_too", "passed"),
    ]
    reasons = {record.name: record.reason or "" for record in records}
    assert reasons["lacks_something"] == "needs two GPUs, 1 is there"
    assert reasons["raises"].startswith("ValueError: two lines (misbehaving.py:")
    assert "ended by SIGABRT" in reasons["crashes"]
    assert "illegal memory access" in reasons["breaks_cuda"]
    assert next(record for record in records if record.name == "raises").figures[0].name == "before"


def test_a_check_that_hangs_costs_itself_alone(tmp_path: Path) -> None:
    hung, after = run(tmp_path, "hangs", "passes")
    assert (hung.outcome, hung.reason) == ("failed", "no end within 5 s")
    assert after.outcome == "passed"


def test_a_part_ends_with_its_minutes_and_says_what_it_could_not_run(tmp_path: Path) -> None:
    first, hung, after = run(tmp_path, "passes", "hangs", "passes_too", minutes=0.3, check_limit_s=100.0)
    assert first.outcome == "passed"
    assert (hung.outcome, after.outcome) == ("not run", "not run")
    assert after.reason == "the 0.3 minutes of part z were over while hangs ran"


def test_a_part_that_can_not_begin_says_why_once(tmp_path: Path) -> None:
    first, second = run(tmp_path, "passes", "passes_too", module="tests.gpu.not_there")
    assert first.outcome == "failed"
    assert "No module named 'tests.gpu.not_there'" in (first.reason or "")
    assert (second.outcome, second.reason) == ("not run", "part z could not begin: see passes")
