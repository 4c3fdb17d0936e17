"""The search for a prompt that makes everything fail that it is in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sequence import Prompt
from deploy.supervision.search import Search


def prompts(number: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{n}", token_ids=np.array([n], np.int32), seed=n) for n in range(number)]


def ids(group: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in group]


def searched(number: int, poison: set[str], *, max_failures: int = 2) -> tuple[list[str], list[str], int]:
    """What came, what was given up, and how many groups failed, where a group fails before any of it has come."""
    search, came, given_up, num_failures = Search(prompts(number), max_failures=max_failures), [], [], 0
    while (group := search.next_group()) is not None:
        if poison & set(ids(group)):
            num_failures += 1
            if (prompt := search.failed()) is not None:
                given_up.append(prompt.prompt_id)
        else:
            for prompt in group:
                search.done(prompt.sequence_id)
            came += ids(group)
            search.succeeded()
    return came, given_up, num_failures


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 3))
def test_all_come_but_the_poisonous_ones_which_are_given_up(number, poison, max_failures) -> None:
    bad = {f"p{n}" for n in poison if n < number}
    came, given_up, _ = searched(number, bad, max_failures=max_failures)
    assert sorted(came) == sorted({f"p{n}" for n in range(number)} - bad)
    assert sorted(given_up) == sorted(bad)


def test_one_of_64_fails_twice_with_all_and_twice_on_its_own() -> None:
    assert searched(64, {"p17"})[2] == 2 + 2


def test_after_two_failures_prompts_are_tried_alone_until_one_fails_and_the_others_together_again() -> None:
    search = Search(prompts(4), max_failures=2)
    tried = []
    while (group := search.next_group()) is not None:
        tried.append(ids(group))
        if "p1" in tried[-1]:
            search.failed()
        else:
            for prompt in group:
                search.done(prompt.sequence_id)
            search.succeeded()
    assert tried == [["p0", "p1", "p2", "p3"]] * 2 + [["p0"], ["p1"], ["p2", "p3"], ["p1"], []]


def test_a_group_that_fails_once_is_asked_for_whole_again() -> None:
    search = Search(prompts(4), max_failures=2)
    search.next_group()
    search.done("p1.0.0")
    assert search.failed() is None
    assert ids(search.next_group() or []) == ["p0", "p2", "p3"]
    assert not search.is_narrowing


def test_a_named_suspect_is_asked_for_alone_after_the_others() -> None:
    search = Search(prompts(3), max_failures=2)
    search.next_group()
    assert search.failed("p1.0.0") is None
    assert ids(search.next_group() or []) == ["p0", "p2"]
    search.succeeded()
    assert ids(search.next_group() or []) == ["p1"]
    given_up = search.failed("p1.0.0")
    assert given_up is not None
    assert given_up.prompt_id == "p1"


def test_what_is_given_up_last_is_followed_by_an_empty_group_to_finish() -> None:
    search = Search(prompts(1), max_failures=1)
    search.next_group()
    assert search.failed() is not None
    assert search.next_group() == []
    search.succeeded()
    assert search.next_group() is None


@pytest.mark.parametrize("num_failures", [1, 7])
def test_a_group_of_which_all_has_come_is_never_split(num_failures) -> None:
    search = Search(prompts(1), max_failures=1)
    search.next_group()
    search.done("p0.0.0")
    for _ in range(num_failures):
        assert search.failed() is None
        assert search.next_group() == []
        assert not search.is_narrowing
