from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.schedule import pauses_before_one_switch, pauses_between_switches

positive = st.integers(1, 300)


@given(num_text_tokens=positive, first_switch=st.integers(-50, 100), max_tokens=positive, block_tokens=positive)
def test_pauses_before_one_switch_ascend_within_the_request_and_come_once_a_block(
    num_text_tokens: int, first_switch: int, max_tokens: int, block_tokens: int
) -> None:
    pauses = pauses_before_one_switch(
        num_text_tokens=num_text_tokens, first_switch=first_switch, max_tokens=max_tokens, block_tokens=block_tokens
    )
    assert all(pause < after for pause, after in pairwise((0, *pauses, max_tokens)))
    assert all(pause > first_switch for pause in pauses), "judged before anything can be refused"
    lead = max(after - pause for pause, after in pairwise((*pauses, max_tokens))) if pauses else 0
    assert lead <= block_tokens
    ends = {(num_text_tokens + pause) % block_tokens for pause in pauses}
    assert ends <= {0, max(1, block_tokens * 3 // 8) % block_tokens}


def test_the_first_pause_is_the_first_block_end_past_the_first_switch() -> None:
    def first(num_text_tokens: int, first_switch: int) -> int:
        return pauses_before_one_switch(
            num_text_tokens=num_text_tokens, first_switch=first_switch, max_tokens=500, block_tokens=32
        )[0]

    assert first(64, 10) == 32
    assert first(60, 10) == 36
    assert first(90, 10) == 38
    assert first(64, 32) == 64
    assert first(64, -5) == 32


@pytest.mark.parametrize(("position", "num_switches", "first"), [(0, 0, 6), (20, 0, 32), (20, 7, 5), (300, 150, 4)])
def test_a_sequence_that_switches_often_is_judged_often(position: int, num_switches: int, first: int) -> None:
    pauses = pauses_between_switches(position=position, num_switches=num_switches, max_tokens=200, block_tokens=32)
    assert pauses[0] == first


@given(position=st.integers(0, 300), num_switches=st.integers(0, 100), max_tokens=positive, block_tokens=positive)
def test_pauses_between_switches_ascend_and_are_at_most_a_block_apart(
    position: int, num_switches: int, max_tokens: int, block_tokens: int
) -> None:
    pauses = pauses_between_switches(
        position=position, num_switches=num_switches, max_tokens=max_tokens, block_tokens=block_tokens
    )
    steps = [after - pause for pause, after in pairwise((0, *pauses, max_tokens))]
    assert all(0 < step <= block_tokens for step in steps)
