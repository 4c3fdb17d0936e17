import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.schedule import (
    prefers_token_by_token,
    uninterrupted_chunk,
    until_pause_before_the_switch,
    until_pause_between_switches,
)

positive = st.integers(1, 300)


@pytest.mark.parametrize(
    ("num_judged", "num_switches", "expected"), [(0, 0, 6), (20, 0, 32), (20, 7, 5), (300, 150, 4)]
)
def test_a_sequence_that_switches_often_is_judged_often(num_judged: int, num_switches: int, expected: int) -> None:
    assert until_pause_between_switches(num_judged=num_judged, num_switches=num_switches, block_tokens=32) == expected


@given(num_judged=st.integers(0, 300), num_switches=st.integers(0, 100), block_tokens=positive)
def test_pauses_between_switches_are_at_most_a_block_apart(
    num_judged: int, num_switches: int, block_tokens: int
) -> None:
    num_tokens = until_pause_between_switches(
        num_judged=num_judged, num_switches=num_switches, block_tokens=block_tokens
    )
    assert 0 < num_tokens <= block_tokens


@pytest.mark.parametrize(("max_new_tokens", "expected"), [(1, 16), (96, 16), (128, 16), (129, 32), (8192, 1024)])
def test_a_text_that_nobody_interrupts_is_read_in_few_pieces(max_new_tokens: int, expected: int) -> None:
    assert uninterrupted_chunk(max_new_tokens=max_new_tokens, chunk_tokens=16) == expected


@given(text_tokens=positive, block_tokens=positive)
def test_before_the_switch_the_student_writes_to_the_end_of_the_texts_block(
    text_tokens: int, block_tokens: int
) -> None:
    num_tokens = until_pause_before_the_switch(
        text_tokens=text_tokens, block_tokens=block_tokens, switch_is_likely=False
    )
    assert 0 < num_tokens <= block_tokens
    assert (text_tokens + num_tokens) % block_tokens == 0


@pytest.mark.parametrize(("text_tokens", "expected"), [(64, 6), (65, 5), (69, 1), (70, 10), (79, 1), (80, 6)])
def test_where_a_switch_is_near_the_first_verdict_of_a_block_is_early(text_tokens: int, expected: int) -> None:
    assert until_pause_before_the_switch(text_tokens=text_tokens, block_tokens=16, switch_is_likely=True) == expected


@given(text_tokens=positive, block_tokens=positive)
def test_an_early_verdict_is_within_the_block(text_tokens: int, block_tokens: int) -> None:
    early = until_pause_before_the_switch(text_tokens=text_tokens, block_tokens=block_tokens, switch_is_likely=True)
    end = until_pause_before_the_switch(text_tokens=text_tokens, block_tokens=block_tokens, switch_is_likely=False)
    assert 0 < early <= end


@pytest.mark.parametrize(
    ("num_judged", "num_switches", "is_running", "expected"),
    [(0, 0, False, False), (3, 1, False, False), (10, 2, False, True), (20, 2, False, False), (20, 2, True, True),
     (30, 2, True, False)],
)  # fmt: skip
def test_engines_go_in_step_while_runs_are_short(
    num_judged: int, num_switches: int, is_running: bool, expected: bool
) -> None:
    assert prefers_token_by_token(num_judged=num_judged, num_switches=num_switches, is_running=is_running) == expected
