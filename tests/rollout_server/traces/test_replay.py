import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import SKD, AdaSwitch, Fixed, Mixture, OffPolicy, OnPolicy
from rollout_server.policies import ScoredPositions, make_policy
from rollout_server.traces.replay import RecordedSequence, replay


def recorded(divergences: list[float], first_switch: int | None = None, **rest: object) -> RecordedSequence:
    """The student proposed wherever a divergence is given."""
    values = np.array(divergences, np.float32)
    fields = {"seed": 1, "finish_reason": "stop", "is_given_answer": False, **rest}
    return RecordedSequence(
        sequence_id="p.0.0",
        step=0,
        first_switch=first_switch,
        divergences=values,
        student_ranks=np.where(np.isnan(values), -1, 0).astype(np.int32),
        **fields,  # type: ignore[arg-type]
    )


@given(divergences=st.lists(st.floats(0, 5, width=32), min_size=1, max_size=40), window=st.integers(1, 5))
def test_the_policy_that_recorded_a_sequence_replays_to_its_switch(divergences: list[float], window: int) -> None:
    policy = make_policy(AdaSwitch(window=window))
    values = np.array(divergences, np.float32)
    ranks = np.zeros(values.size, np.int32)
    switch = policy.decide(ScoredPositions(first=0, divergences=values, student_ranks=ranks)).switch
    if switch is not None:  # what the teacher wrote has no divergence
        divergences = divergences[: switch + 1] + [float("nan")] * (len(divergences) - switch - 1)
    replayed = replay(policy, recorded(divergences, switch))
    assert replayed.first_switch == switch
    assert replayed.outcome == ("no_switch" if switch is None else "switch")


def test_past_the_recorded_switch_nothing_is_known() -> None:
    sequence = recorded([0.1, 0.1, 4.0, float("nan")], 2)
    replayed = replay(make_policy(AdaSwitch(window=1, floor=9.0)), sequence)
    assert (replayed.outcome, replayed.reason) == ("unknown", "teacher_had_taken_over")
    assert replay(make_policy(Fixed(position=2)), sequence).first_switch == 2
    assert replay(make_policy(Fixed(position=3)), sequence).outcome == "unknown"


@pytest.mark.parametrize(("finish_reason", "reason"), [("stop", "student_finished"), ("length", "length_limit")])
def test_a_student_that_was_through_before_the_switch_has_none(finish_reason: str, reason: str) -> None:
    replayed = replay(make_policy(Fixed(position=9)), recorded([0.1] * 5, finish_reason=finish_reason))
    assert (replayed.outcome, replayed.reason) == ("no_switch", reason)


def test_what_the_teacher_wrote_alone_tells_only_of_switches_at_once() -> None:
    sequence = recorded([float("nan")] * 3, 0)
    assert replay(make_policy(OffPolicy()), sequence).first_switch == 0
    for settings in (OnPolicy(), AdaSwitch(window=1), SKD(), Mixture(student_share=1.0)):
        assert replay(make_policy(settings), sequence).outcome == "unknown"


def test_a_given_answer_tells_of_nothing_the_student_would_write() -> None:
    sequence = recorded([float("nan")] * 3, is_given_answer=True)
    assert replay(make_policy(OnPolicy()), sequence).reason == "given_answer"
