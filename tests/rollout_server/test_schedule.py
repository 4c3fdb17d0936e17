from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.schedule import pauses_between_switches

positive = st.integers(1, 300)


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
