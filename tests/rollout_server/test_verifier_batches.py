import asyncio

import numpy as np
import pytest

from common.config import Divergence, ForwardKL
from common.sequence import TopLogprobs
from rollout_server.verifier import Comparison, Verifier, compare


def lists(num_rows: int, seed: int) -> TopLogprobs:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 2.0, (num_rows, 50))
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    token_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :8]
    return TopLogprobs(token_ids.astype(np.int32), np.take_along_axis(logprobs, token_ids, axis=1))


async def test_everybody_gets_the_values_it_would_have_alone() -> None:
    asked = [(lists(n, 2 * n), lists(n, 2 * n + 1)) for n in (1, 5, 0, 32, 3)]
    verdicts = Verifier(ForwardKL())
    together = await asyncio.gather(*(verdicts.divergences(teacher, student) for teacher, student in asked))
    for values, (teacher, student) in zip(together, asked, strict=True):
        np.testing.assert_array_equal(values, compare(teacher, student, ForwardKL()).divergences)


async def test_more_than_a_block_is_computed_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(teacher: TopLogprobs, student: TopLogprobs, kind: Divergence) -> Comparison:
        sizes.append(len(teacher))
        return compare(teacher, student, kind)

    monkeypatch.setattr("rollout_server.verifier.compare", counting)
    monkeypatch.setattr("rollout_server.verifier._BLOCK", 8 * 10)
    asked = [(lists(n, 2 * n), lists(n, 2 * n + 1)) for n in (4, 5, 6, 25, 3)]
    verdicts = Verifier(ForwardKL())
    together = await asyncio.gather(*(verdicts.divergences(teacher, student) for teacher, student in asked))
    assert sizes == [4 + 5 + 6, 25, 3]
    for values, (teacher, student) in zip(together, asked, strict=True):
        np.testing.assert_array_equal(values, compare(teacher, student, ForwardKL()).divergences)


async def test_one_who_no_longer_waits_costs_the_others_nothing() -> None:
    verdicts = Verifier(ForwardKL())
    gone = asyncio.ensure_future(verdicts.divergences(lists(2, 0), lists(2, 1)))
    stays = asyncio.ensure_future(verdicts.divergences(lists(3, 2), lists(3, 3)))
    await asyncio.sleep(0)
    gone.cancel()
    np.testing.assert_array_equal(await stays, compare(lists(3, 2), lists(3, 3), ForwardKL()).divergences)
    assert gone.cancelled()


async def test_a_failed_comparison_fails_for_all_that_were_in_it() -> None:
    verdicts = Verifier(ForwardKL())
    bad = asyncio.gather(
        verdicts.divergences(lists(2, 0), lists(3, 1)),
        verdicts.divergences(lists(1, 2), lists(1, 3)),
        return_exceptions=True,
    )
    assert [type(error) for error in await bad] == [AssertionError, AssertionError]
    assert (await verdicts.divergences(lists(1, 2), lists(1, 3))).size == 1
