from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.schedule import goes_in_step, pauses_before_the_switch, pauses_between_switches

positive = st.integers(1, 300)


@pytest.mark.parametrize(("position", "num_switches", "first"), [(0, 0, 6), (20, 0, 32), (20, 7, 5), (300, 150, 4)])
def test_a_sequence_that_switches_often_is_judged_often(position: int, num_switches: int, first: int) -> None:
    pauses = pauses_between_switches(position=position, num_switches=num_switches, max_tokens=200, block_tokens=32)
    assert pauses.after[0] == first


@given(position=st.integers(0, 300), num_switches=st.integers(0, 100), max_tokens=positive, block_tokens=positive)
def test_pauses_between_switches_ascend_and_are_at_most_a_block_apart(
    position: int, num_switches: int, max_tokens: int, block_tokens: int
) -> None:
    pauses = pauses_between_switches(
        position=position, num_switches=num_switches, max_tokens=max_tokens, block_tokens=block_tokens
    )
    steps = [after - pause for pause, after in pairwise((0, *pauses.after, max_tokens))]
    assert all(0 < step <= block_tokens for step in steps)


@given(text_tokens=positive, max_tokens=positive, block_tokens=positive)
def test_pauses_before_the_switch_are_the_ends_of_the_texts_blocks_and_early_ones_within(
    text_tokens: int, max_tokens: int, block_tokens: int
) -> None:
    pauses = pauses_before_the_switch(text_tokens=text_tokens, max_tokens=max_tokens, block_tokens=block_tokens)
    ends = [end for end in range(text_tokens + 1, text_tokens + max_tokens) if end % block_tokens == 0]
    assert [text_tokens + pause for pause in pauses.after if pause not in pauses.early] == ends
    assert pauses.early <= set(pauses.after)
    assert list(pauses.after) == sorted(set(pauses.after))
    for pause in pauses.early:
        assert (text_tokens + pause) % block_tokens < pause, "its block begins after the text"


@pytest.mark.parametrize(
    ("position", "num_switches", "is_in_step", "expected"),
    [(0, 0, False, False), (3, 1, False, False), (10, 2, False, True), (20, 2, False, False), (20, 2, True, True),
     (30, 2, True, False)],
)  # fmt: skip
def test_engines_go_in_step_while_runs_are_short(
    position: int, num_switches: int, is_in_step: bool, expected: bool
) -> None:
    assert goes_in_step(position=position, num_switches=num_switches, is_in_step=is_in_step) == expected
