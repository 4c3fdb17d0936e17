import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import (
    JSD,
    SKD,
    AdaSwitch,
    Dataset,
    Decay,
    Fixed,
    ForwardKL,
    Mixture,
    OffPolicy,
    OnPolicy,
    Policy,
    Relay,
    ReverseKL,
)
from common.sequence import Floats
from rollout_server.policies import Decision, ScoredPositions, divergence_of, make_policy, moving_average

NAN = float("nan")


@st.composite
def histories(draw: st.DrawFn) -> Floats:
    """[n] nats, with NaN where a teacher might have written."""
    values = st.floats(0.0, 50.0, width=32) | st.just(NAN)
    return np.array(draw(st.lists(values, min_size=1, max_size=60)), np.float32)


def decide(
    settings: Policy, divergences: list[float] | Floats, *, first: int = 0, student_ranks: list[int] | None = None
) -> Decision:
    nats = np.asarray(divergences, np.float32)
    ranks = np.zeros(nats.size, np.int32) if student_ranks is None else np.array(student_ranks, np.int32)
    return make_policy(settings).decide(ScoredPositions(first=first, divergences=nats, student_ranks=ranks))


def naive_moving_average(divergences: Floats, window: int, first: int) -> npt.NDArray[np.float64]:
    """The definition, position by position."""
    average = []
    for position in range(first, divergences.size):
        total = 0.0
        for earlier in divergences[max(position - window, 0) : position].tolist():
            total += earlier
        average.append(total / window if position >= window else NAN)
    return np.array(average)


@given(histories(), st.integers(1, 20), st.data())
def test_the_moving_average_is_the_mean_of_the_last_values(
    divergences: Floats, window: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, divergences.size - 1))
    expected = naive_moving_average(divergences, window, first)
    np.testing.assert_array_equal(moving_average(divergences, window, first), expected)


def test_nothing_switches_before_the_window_is_filled() -> None:
    decision = decide(AdaSwitch(window=3), [9.0, 0.0, 9.0])
    assert decision.switch is None
    assert np.isnan(decision.thresholds).all()


def test_the_first_position_with_a_filled_window_may_switch() -> None:
    decision = decide(AdaSwitch(window=3, multiplier=2.0), [1.0, 1.0, 1.0, 2.5, 99.0])
    assert decision.switch == 3
    np.testing.assert_array_equal(decision.thresholds, np.float32([NAN, NAN, NAN, 2.0, 3.0]))


def test_a_divergence_equal_to_the_threshold_does_not_switch() -> None:
    assert decide(AdaSwitch(window=2, multiplier=2.0), [1.0, 1.0, 2.0]).switch is None
    assert decide(AdaSwitch(window=2, multiplier=2.0), [0.0, 0.0, 0.0]).switch is None


def test_a_position_is_compared_with_the_values_before_it_alone() -> None:
    """With its own value in the mean a spike would raise its own threshold."""
    assert decide(AdaSwitch(window=2, multiplier=3.0), [1.0, 1.0, 3.1, 0.0]).switch == 2


def test_the_floor_raises_the_threshold() -> None:
    quiet = [0.1, 0.1, 0.4, 0.1, 1.2]
    assert decide(AdaSwitch(window=2), quiet).switch == 2
    with_floor = decide(AdaSwitch(window=2, floor=1.0), quiet)
    assert with_floor.switch == 4
    np.testing.assert_array_equal(with_floor.thresholds, np.float32([NAN, NAN, 1.0, 1.0, 1.0]))


def test_the_floor_does_not_lower_the_threshold() -> None:
    assert decide(AdaSwitch(window=2, floor=0.5), [1.0, 1.0, 2.9]).switch is None


def test_warmup_keeps_later_positions_from_switching_too() -> None:
    spikes = [0.1, 0.1, 9.0, 0.1, 0.1, 9.0]
    assert decide(AdaSwitch(window=2), spikes).switch == 2
    late = decide(AdaSwitch(window=2, warmup=4), spikes)
    assert late.switch == 5
    assert late.thresholds[2] == pytest.approx(0.3)  # there is a threshold already, it is only not used


def test_the_average_starts_anew_after_the_teacher_wrote() -> None:
    divergences = [0.1, 0.1, NAN, 0.1, 9.0, 9.0, 99.0]
    decision = decide(AdaSwitch(window=2), divergences)
    assert np.isnan(decision.thresholds[:5]).tolist() == [True, True, False, True, True]
    assert decision.switch == 6  # 3 * mean(9, 9) = 27; positions 3 and 4 have the teacher's in their window


def test_a_switch_is_near_where_the_last_divergences_were_small() -> None:
    policy = make_policy(AdaSwitch(window=2))
    assert policy.switch_is_likely(np.array([2.0, 2.0, 1.0, 1.0], np.float32))
    assert not policy.switch_is_likely(np.array([1.0, 1.0, 2.0, 2.0], np.float32))


def test_no_switch_is_near_before_the_window_is_filled_or_under_the_floor() -> None:
    divergences = np.array([2.0, 2.0, 1.0, 1.0], np.float32)
    assert not make_policy(AdaSwitch(window=5)).switch_is_likely(divergences)
    assert not make_policy(AdaSwitch(window=2, multiplier=3.0, floor=3.5)).switch_is_likely(divergences)


def test_positions_already_decided_do_not_switch_again() -> None:
    assert decide(AdaSwitch(window=2), [0.1, 0.1, 9.0, 0.1], first=3).switch is None
    assert decide(SKD(top_k=1), [0.0] * 4, first=3, student_ranks=[0, 5, 5, 0]).switch is None


def test_skd_keeps_what_the_teacher_lists_among_its_best() -> None:
    ranks = [0, 4, 5, 64]
    assert decide(SKD(top_k=5), [0.0] * 4, student_ranks=ranks).switch == 2
    assert decide(SKD(top_k=6), [0.0] * 4, student_ranks=ranks).switch == 3
    assert np.isnan(decide(SKD(top_k=5), [0.0] * 4, student_ranks=ranks).thresholds).all()


def test_skd_does_not_reject_what_the_teacher_wrote_itself() -> None:
    assert decide(SKD(top_k=1), [0.0, NAN, 0.0], student_ranks=[0, -1, 0]).switch is None


def test_on_policy_never_switches() -> None:
    policy = make_policy(OnPolicy())
    assert policy.exploration_limit(7) is None
    assert decide(OnPolicy(), [99.0] * 3, student_ranks=[64] * 3).switch is None


def test_off_policy_leaves_the_student_no_position() -> None:
    assert make_policy(OffPolicy()).exploration_limit(7) == 0


def test_decay_compares_with_a_threshold_that_falls_with_the_position() -> None:
    decision = decide(Decay(initial_threshold=0.5, rate=0.1), [0.1, 0.1, 0.45, 0.1, 0.35])
    np.testing.assert_array_equal(decision.thresholds, np.float32(0.5 * np.exp(-0.1 * np.arange(5))))
    assert decision.switch == 2
    assert divergence_of(Decay()) == JSD(beta=0.5)


def test_relay_stops_switching_after_its_last_time() -> None:
    policy, divergences = make_policy(Relay(top_k=2, max_switches=3)), np.zeros(2, np.float32)
    ranks = np.array([0, 5], np.int32)
    switches = [
        policy.decide(
            ScoredPositions(first=0, divergences=divergences, student_ranks=ranks, num_switches=num_switches)
        ).switch
        for num_switches in (0, 2, 3, 4)
    ]
    assert switches == [1, 1, None, None]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mixture_leaves_the_student_its_share_of_the_sequences(share: float) -> None:
    policy = make_policy(Mixture(student_share=share))
    limits = [policy.exploration_limit(seed) for seed in range(2000)]
    assert set(limits) <= {None, 0}
    assert limits.count(None) / len(limits) == pytest.approx(share, abs=0.04)


def test_a_fixed_switch_is_where_it_was_set() -> None:
    assert make_policy(Fixed(position=5)).exploration_limit(7) == 5


@pytest.mark.parametrize(
    ("settings", "guidance_tokens"),
    [
        (AdaSwitch(), None),
        (SKD(), 1),
        (Decay(), 1),
        (Relay(guidance_tokens=9), 9),
        (OnPolicy(), None),
        (OffPolicy(), None),
        (Dataset(), None),
        (Mixture(), None),
        (Fixed(), None),
    ],
)
def test_how_long_the_teacher_writes(settings: Policy, guidance_tokens: int | None) -> None:
    assert make_policy(settings).guidance_tokens == guidance_tokens


@given(
    histories(),
    st.builds(AdaSwitch, window=st.integers(1, 8), multiplier=st.floats(0.5, 4.0), floor=st.floats(0.0, 5.0)),
    st.data(),
)
def test_adaswitch_online_equals_post_hoc(divergences: Floats, settings: AdaSwitch, data: st.DataObject) -> None:
    whole = decide(settings, divergences)
    cuts = data.draw(st.sets(st.integers(1, divergences.size)))
    first, thresholds, switch = 0, [np.empty(0, np.float32)], None
    for end in [*sorted(cuts), divergences.size]:
        if first < end and switch is None:
            chunk = decide(settings, divergences[:end], first=first)
            thresholds.append(chunk.thresholds)
            first, switch = end, chunk.switch
    assert switch == whole.switch
    online = np.concatenate(thresholds)
    np.testing.assert_array_equal(online, whole.thresholds[: online.size])  # bit for bit


@given(st.lists(st.integers(-1, 10), min_size=1, max_size=40), st.integers(1, 10), st.data())
def test_skd_online_equals_post_hoc(student_ranks: list[int], top_k: int, data: st.DataObject) -> None:
    divergences = [0.0] * len(student_ranks)
    whole = decide(SKD(top_k=top_k), divergences, student_ranks=student_ranks)
    cut = data.draw(st.integers(1, len(student_ranks)))
    online = decide(SKD(top_k=top_k), divergences[:cut], student_ranks=student_ranks[:cut]).switch
    if online is None and cut < len(student_ranks):
        online = decide(SKD(top_k=top_k), divergences, first=cut, student_ranks=student_ranks).switch
    assert online == whole.switch


def test_the_verifier_computes_what_the_policy_compares() -> None:
    assert divergence_of(AdaSwitch(divergence=ReverseKL())) == ReverseKL()
    assert divergence_of(AdaSwitch(divergence=JSD(beta=0.2))) == JSD(beta=0.2)
    assert divergence_of(SKD()) == ForwardKL()
