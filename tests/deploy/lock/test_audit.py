from datetime import date

import pytest

from deploy.lock.audit import ALLOWED_FILE, AllowedAdvisory, judge, pins_to_check, read_exceptions

TODAY = date(2026, 11, 24)
CLEAN = {"name": "clean", "version": "1", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}
HOLED = {
    "name": "holed",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"], "description": "x"}],
}


def permission(*, id: str = "PYSEC-1", package: str = "holed", until: date = TODAY) -> AllowedAdvisory:
    return AllowedAdvisory(id=id, package=package, reason="no way in", until=until)


def test_a_finding_is_a_problem_and_names_the_version_that_mends_it() -> None:
    assert judge([CLEAN, HOLED], [], TODAY).problems == ("holed 1.0: PYSEC-1, fixed in 1.1",)


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_allowed_finding_is_none(name: str) -> None:
    assert judge([HOLED], [permission(id=name)], TODAY).problems == ()


def test_a_permission_ends() -> None:
    problems = judge([HOLED], [permission(until=date(2026, 11, 23))], TODAY).problems
    assert problems == ("holed 1.0: PYSEC-1, fixed in 1.1", "holed: the exception for PYSEC-1 expired on 2026-11-23")


def test_a_permission_is_for_one_package_and_one_that_is_not_needed_is_said() -> None:
    result = judge([HOLED], [permission(package="other")], TODAY)
    assert len(result.problems) == 1
    assert result.notes == ("other: PYSEC-1 is allowed but was not found",)


def test_an_audit_without_a_single_answer_was_none() -> None:
    assert not judge([UNKNOWN, UNKNOWN], [], TODAY).was_possible
    assert not judge([], [], TODAY).was_possible
    result = judge([CLEAN, UNKNOWN], [], TODAY)
    assert result.was_possible
    assert result.notes == ("unknown to the service: unknown",)


def test_a_version_that_several_files_pin_is_asked_about_once() -> None:
    texts = ["# made\na==1\ntorch==2+cpu\n", "a==1\nb==3\n", "a==1\nb==3\nTorch==2\nc==4\n"]
    assert pins_to_check(texts) == [["a==1", "torch==2+cpu", "b==3", "c==4"], ["Torch==2"]]


def test_every_permission_says_all_it_must() -> None:
    assert all(p.reason and p.until for p in read_exceptions(ALLOWED_FILE))
