"""What the probe concludes from log-probs, over made-up ones whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sequence import Floats, TopLogprobs
from trainer.probe_statistics import Change, Doubles, Followed, Share, compare_probe, followed, logprobs_of

N, K = 200, 32
NUM_SYNCS = 32


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -------------------------------------------------------------------------------------------------------- differences


def test_the_report_says_how_far_apart_they_are_and_where_most() -> None:
    ids = np.array([[3, 4], [5, 6]], np.int32)
    engine = [TopLogprobs(ids, np.full((2, 2), -1.0, np.float32)) for _ in range(2)]
    learner: list[Floats] = [np.full((2, 2), -1.0, np.float32) for _ in range(2)]
    learner[0][0, 0] = -1.2
    learner[1][1, 0] = -1.5
    report = compare_probe(engine, learner)
    assert (report.text_index, report.position, report.token_id, report.num_compared) == (1, 2, 5, 8)
    assert (report.engine_logprob, report.learner_logprob) == (-1.0, -1.5)
    assert report.max_difference == pytest.approx(0.5)
    assert report.rms == pytest.approx(np.sqrt((0.2**2 + 0.5**2) / 8), rel=1e-6)


def test_one_far_off_log_prob_does_not_move_the_quantile() -> None:
    ids = np.tile(np.arange(K, dtype=np.int32), (N, 1))
    engine = TopLogprobs(ids, rng().normal(-5.0, 0.1, (N, K)).astype(np.float32))
    learner = np.full((N, K), -5.0, np.float32)
    calm = compare_probe([engine], [learner])
    assert (calm.rms, calm.p99) == pytest.approx((0.1, 0.2576), rel=0.05)
    learner[7, 3] = -9.0
    report = compare_probe([engine], [learner])
    assert report.p99 == pytest.approx(calm.p99, rel=0.01)
    assert report.max_difference > 3.5


def test_an_unknown_row_is_infinitely_far() -> None:
    report = compare_probe([TopLogprobs.unknown(3, 2)], [np.zeros((3, 2), np.float32)])
    assert report.rms == report.p99 == report.max_difference == np.inf


@given(st.integers(0, 2**32 - 1))
def test_a_row_s_log_probs_are_found_by_id(seed: int) -> None:
    random = rng(seed)
    n, k, m = random.integers(1, 6), random.integers(1, 8), random.integers(1, 8)
    ids = np.stack([random.permutation(12)[:k] for _ in range(n)]).astype(np.int32)
    rows = TopLogprobs(ids, random.normal(size=(n, k)).astype(np.float32))
    wanted = random.integers(0, 12, (n, m)).astype(np.int32)
    found = logprobs_of(rows, wanted)
    for row in range(n):
        listed = dict(zip(ids[row].tolist(), rows.logprobs[row].tolist(), strict=True))
        expected = [listed.get(token_id, np.nan) for token_id in wanted[row].tolist()]
        np.testing.assert_array_equal(found[row], np.array(expected, np.float32))


# ------------------------------------------------------------------------------------------------------------- shares


def change(*, output_layer: float, rest: float, noise: float, seed: int = 0, scale: float = 0.05) -> Change:
    """Of an engine that made these shares of the learner's change."""
    random = rng(seed)
    by_head, by_rest = (random.normal(0.0, scale, (N, K)) for _ in range(2))

    def reading() -> Doubles:  # whose noise is alike within a position
        return (random.normal(0.0, noise, (N, 1)) + random.normal(0.0, noise / 4, (N, K))) / 2**0.5

    before, now = reading(), reading()
    return Change(
        engine=output_layer * by_head + rest * by_rest + now - before,
        learner=by_head + by_rest,
        output_layer=by_head,
        noise=before,
    )


@pytest.mark.parametrize("noise", [1e-6, 0.01, 0.2])
@pytest.mark.parametrize(("output_layer", "rest"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_shares_are_those_that_the_engine_made(output_layer: float, rest: float, noise: float) -> None:
    shares = followed(change(output_layer=output_layer, rest=rest, noise=noise))
    for share, truth in ((shares.output_layer, output_layer), (shares.rest, rest)):
        assert share is not None
        assert abs(share.value - truth) < 4 * share.standard_error
        assert share.is_known
        assert share.is_stale == (truth == 0.0)


def test_the_standard_error_is_how_far_shares_scatter() -> None:
    """Though differences at a position are alike: taken as independent they would seem far more exact."""
    found = [followed(change(output_layer=1.0, rest=1.0, noise=0.2, seed=seed)).everything for seed in range(100)]
    shares = [share for share in found if share is not None]
    scatter = np.std([share.value for share in shares])
    assert np.mean([share.standard_error for share in shares]) == pytest.approx(scatter, rel=0.25)


def test_nothing_is_known_of_a_change_that_is_small_against_the_noise() -> None:
    stale = followed(change(output_layer=0.0, rest=0.0, noise=0.2, scale=1e-4)).everything
    assert stale is not None
    assert not stale.is_known
    assert not stale.is_stale


def test_an_engine_that_did_not_move_at_all_is_no_more_certain_than_its_noise_allows() -> None:
    still = change(output_layer=1.0, rest=1.0, noise=0.2, scale=1e-4)
    share = followed(replace(still, engine=np.zeros((N, K))))
    assert share.everything is not None
    assert not share.everything.is_known


def test_log_probs_that_the_engine_did_not_list_are_left_out() -> None:
    whole = change(output_layer=0.0, rest=1.0, noise=0.01)
    engine: Doubles = np.where(rng(1).random((N, K)) < 0.5, np.nan, whole.engine)
    shares = followed(replace(whole, engine=engine))
    assert shares.output_layer is not None
    assert shares.output_layer.is_stale


def test_what_moves_a_whole_position_hides_no_output_layer() -> None:
    """Its change is a twentieth of what rounding does to the positions."""
    shares = followed(change(output_layer=0.0, rest=1.0, noise=0.2, scale=0.01))
    assert shares.output_layer is not None
    assert shares.output_layer.is_stale


def test_several_syncs_show_what_one_does_not() -> None:
    syncs = [
        followed(change(output_layer=0.0, rest=1.0, noise=0.2, scale=0.002, seed=seed)) for seed in range(NUM_SYNCS)
    ]
    assert not any(it.output_layer is not None and it.output_layer.is_known for it in syncs)
    together = Followed.pooled(syncs).output_layer
    assert together is not None
    assert together.is_stale


def test_pooling_weighs_each_by_the_inverse_of_its_variance() -> None:
    pooled = Share.pooled([Share(value=0.0, standard_error=1.0), None, Share(value=1.0, standard_error=0.5)])
    assert pooled is not None
    assert (pooled.value, pooled.standard_error) == pytest.approx((0.8, 5**-0.5))
    assert Share.pooled([None]) is None


def test_no_share_is_told_where_there_is_nothing_to_tell_it_from() -> None:
    some = change(output_layer=1.0, rest=1.0, noise=0.01)
    nothing = np.zeros((N, K))
    frozen_head = followed(replace(some, output_layer=nothing))
    assert (frozen_head.output_layer, frozen_head.rest) == (None, None)  # as where only adapters are trained
    assert frozen_head.everything is not None
    assert followed(Change(engine=nothing, learner=nothing, output_layer=nothing, noise=nothing)).everything is None
    few = Change(
        engine=some.engine[:5], learner=some.learner[:5], output_layer=some.output_layer[:5], noise=some.noise[:5]
    )
    assert followed(few).everything is None


@pytest.mark.parametrize(
    ("value", "error", "is_known", "is_stale"),
    [(0.0, 0.1, True, True), (0.0, 0.2, False, False), (1.0, 0.1, True, False), (0.6, 0.1, False, False)],
)
def test_a_share_counts_on_the_side_of_the_middle_on_which_it_clearly_is(
    value: float, error: float, is_known: bool, is_stale: bool
) -> None:
    share = Share(value=value, standard_error=error)
    assert (share.is_known, share.is_stale) == (is_known, is_stale)
