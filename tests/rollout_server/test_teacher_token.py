import numpy as np
import pytest

from common.config import Sampling
from common.sequence import TopLogprobs
from rollout_server.teacher_token import can_draw, draw_index

PROBABILITIES = [0.5, 0.2, 0.15]  # 0.15 lies outside the list


def row_of(probabilities: list[float]) -> TopLogprobs:
    logprobs = np.log(np.array([probabilities], np.float64)).astype(np.float32)
    return TopLogprobs(np.arange(10, 10 + len(probabilities), dtype=np.int32)[None], logprobs)


def test_greedily_the_best_is_taken() -> None:
    assert {draw_index(row_of(PROBABILITIES), temperature=0.0, seed=seed) for seed in range(20)} == {0}


def test_places_are_drawn_as_often_as_they_are_probable_and_the_rest_falls_outside() -> None:
    num_draws = 20_000
    places = [draw_index(row_of(PROBABILITIES), temperature=1.0, seed=seed) for seed in range(num_draws)]
    for place, probability in ((0, 0.5), (1, 0.2), (2, 0.15), (None, 0.15)):
        share, five_deviations = (
            places.count(place) / num_draws,
            5 * (probability * (1 - probability) / num_draws) ** 0.5,
        )
        assert share == pytest.approx(probability, abs=five_deviations)


def test_a_seed_draws_the_same_place_again() -> None:
    row = row_of(PROBABILITIES)
    assert [draw_index(row, temperature=1.0, seed=7) for _ in range(3)] == [
        draw_index(row, temperature=1.0, seed=7)
    ] * 3


def test_nothing_falls_outside_a_list_that_holds_the_whole_vocabulary() -> None:
    rounded_down = row_of([0.5, 0.3, 0.2 - 5e-7])
    assert None not in {draw_index(rounded_down, temperature=1.0, seed=seed) for seed in range(5000)}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0.0, top_p=0.9), True),
        (Sampling(temperature=1.0), True),
        (Sampling(temperature=1.0, top_p=0.9), False),
        (Sampling(temperature=0.7), False),
    ],
)
def test_a_list_suffices_greedily_and_at_temperature_1_without_a_nucleus(sampling: Sampling, expected: bool) -> None:
    assert can_draw(sampling) == expected
