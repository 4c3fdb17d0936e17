"""What the self-test says of engines whose numbers don't mean what they must."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from common.errors import UserError
from common.sequence import TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import ScoreRequest, WriteRequest, Written, write_whole
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from rollout_server.engines.selftest import check_engine, check_tokenizers

K = 6
SCRIPT = HashedScript(vocabulary_size=32, seed=1, eos_probability=1e-6)
PREFIX = np.array([5, 6, 7], np.int32)
ENDS_AT_ONCE = HashedScript(vocabulary_size=32, seed=1, eos_probability=0.9)


@dataclass
class Liar:
    """An honest engine; each lie below is one method told otherwise."""

    honest: ScriptedEngine

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(request):
            yield written

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return await self.honest.score(request)

    async def load_weights(self, update: WeightUpdate) -> None:
        await self.honest.load_weights(update)


class Tempered(Liar):
    """Lists what it sampled from, not what the model said."""

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(request):
            logprobs = written.top.logprobs / np.float32(request.temperature or 1.0)
            yield replace(written, top=TopLogprobs(written.top.token_ids, logprobs))


class WorstFirst(Liar):
    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(request):
            yield replace(written, top=TopLogprobs(written.top.token_ids[:, ::-1], written.top.logprobs[:, ::-1]))


class OneRowAhead(Liar):
    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows = await self.honest.score(request)
        return TopLogprobs.concatenate([rows[1:], rows[-1:]])


class OneRowBehind(Liar):
    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows = await self.honest.score(request)
        return TopLogprobs.concatenate([rows[:1], rows[:-1]])


class FirstRowMissing(Liar):
    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return (await self.honest.score(request))[1:]


class AnotherModelsRows(Liar):
    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return await ScriptedEngine(replace(SCRIPT, seed=9), top_logprobs=K).score(request)


async def check(liar: type[Liar], script: HashedScript = SCRIPT, top_logprobs: int = K) -> None:
    engine = liar(ScriptedEngine(script, top_logprobs=top_logprobs))
    await check_engine(engine, name="teacher", prefix=PREFIX, top_logprobs=K)


async def test_an_honest_engine_passes() -> None:
    await check(Liar)


async def test_an_honest_engine_that_ends_at_once_passes() -> None:
    await check(Liar, ENDS_AT_ONCE)


async def test_too_few_log_probs_are_reported() -> None:
    with pytest.raises(UserError, match=r"^teacher engine: gives 5 log-probs a position, expected 6$"):
        await check(Liar, top_logprobs=5)


@pytest.mark.parametrize(
    ("liar", "message"),
    [
        (Tempered, r'log-probs change with the temperature \(by .* nats\); .*logprobs_mode="raw_logprobs"'),
        (WorstFirst, r"log-probs must be <= 0 and best first, got \[-"),
        (OneRowAhead, r"score rows are shifted by -1 position\(s\) against the tokens"),
        (OneRowBehind, r"score rows are shifted by 1 position\(s\) against the tokens"),
        (FirstRowMissing, r"score gave 7 rows, expected 8"),
        (AnotherModelsRows, r"a token's log-probs as read and as written differ by over 0\.1 nats"),
    ],
)
async def test_an_engine_that_lies_is_reported_in_one_line(liar: type[Liar], message: str) -> None:
    with pytest.raises(UserError, match=f"^teacher engine: {message}") as report:
        await check(liar)
    assert "\n" not in str(report.value)


async def test_a_lie_about_a_single_row_is_reported_too() -> None:
    """Of one row it can't be told whether it is shifted, only that it is wrong."""
    with pytest.raises(UserError, match="differ by over"):
        await check(AnotherModelsRows, ENDS_AT_ONCE)


def test_equal_tokenizers_pass() -> None:
    check_tokenizers({"a": 0, "b": 1}, {"b": 1, "a": 0})


def test_ids_that_mean_different_tokens_are_named() -> None:
    student = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    teacher = {"a": 0, "c": 1, "b": 2, "x": 3, "y": 4}
    with pytest.raises(UserError) as report:
        check_tokenizers(student, teacher)
    assert str(report.value).startswith(
        "models.student and models.teacher must share a tokenizer, but 4 ids differ: "
        "id 1 is 'b' for the student and 'c' for the teacher, "
    )
    assert "id 3" in str(report.value)
    assert "id 4" not in str(report.value)


def test_an_id_that_only_one_tokenizer_has_is_named() -> None:
    with pytest.raises(UserError, match="1 ids differ: id 1 is missing for the student and 'b' for the teacher"):
        check_tokenizers({"a": 0}, {"a": 0, "b": 1})
