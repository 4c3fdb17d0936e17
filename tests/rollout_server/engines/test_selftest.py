"""What the self-test says of engines whose numbers don't mean what they must."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from common.errors import UserError
from common.sequence import TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import Engine, ScoreRequest, WriteRequest, Written, write_whole
from rollout_server.engines.scripted import HashedScript, Script, ScriptedEngine
from rollout_server.engines.selftest import check_engine, check_tokenizers

K = 24
SCRIPT = HashedScript(vocabulary_size=200, seed=1, sharpness=4.0, eos_probability=1e-6)
PREFIX = np.array([5, 6, 7], np.int32)
ENDS_AT_ONCE = replace(SCRIPT, eos_probability=0.9)
ONE_ROW_FOR_ALL = replace(SCRIPT, order=0)  # as of a text that repeats one token
NEIGHBORS_ALIKE = replace(SCRIPT, sharpness=0.2)  # 0.28 nats from row to row


def changed(rows: TopLogprobs, logprobs: np.ndarray) -> TopLogprobs:
    """The same ids with other log-probs, best first."""
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids = np.take_along_axis(rows.token_ids, order, axis=1)
    return TopLogprobs(ids, np.take_along_axis(logprobs, order, axis=1).astype(np.float32))


@dataclass
class Liar:
    """An honest engine; each lie below is one method told otherwise."""

    honest: Engine

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(request):
            yield replace(written, top=self.told(written.top, request))

    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        return rows

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return await self.honest.score(request)

    async def load_weights(self, update: WeightUpdate) -> None:
        await self.honest.load_weights(update)


@dataclass
class HalfPrecision(Liar):
    """Logits rounded on two ways that differ: what is written and what is read have errors of their own."""

    noise: float = 0.08  # nats, standard deviation

    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        return self.rounded(rows, seed=1)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return self.rounded(await self.honest.score(request), seed=2)

    def rounded(self, rows: TopLogprobs, seed: int) -> TopLogprobs:
        errors = np.random.default_rng(seed).normal(0.0, self.noise, rows.logprobs.shape)
        errors[0, 0] += 8 * self.noise  # some are far out
        logprobs = np.exp(rows.logprobs.astype(np.float64)) * np.exp(errors)
        rest = 1.0 - np.exp(rows.logprobs, dtype=np.float64).sum(axis=1, keepdims=True)
        return changed(rows, np.log(logprobs / (logprobs.sum(axis=1, keepdims=True) + rest)))


class Tempered(Liar):
    """Lists what it sampled from, not what the model said."""

    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        return changed(rows, np.log(tempered(rows, request.temperature)))


def tempered(rows: TopLogprobs, temperature: float) -> np.ndarray:
    """[n, k] The list's probabilities at another temperature, as if it held the whole vocabulary."""
    p = np.exp(rows.logprobs.astype(np.float64) / (temperature or 1.0))
    return p / p.sum(axis=1, keepdims=True)


class Processed(Liar):
    """Lists only what could be sampled, and at that temperature, as with a nucleus."""

    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        p = tempered(rows, request.temperature)
        p[:, 5:] = 0.0
        with np.errstate(divide="ignore"):
            return changed(rows, np.log(p / p.sum(axis=1, keepdims=True)))


class Logits(Liar):
    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        return changed(rows, rows.logprobs - rows.logprobs[:, :1])


class WorstFirst(Liar):
    def told(self, rows: TopLogprobs, request: WriteRequest) -> TopLogprobs:
        return TopLogprobs(rows.token_ids[:, ::-1], rows.logprobs[:, ::-1])


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


class FirstRowFromMemory(Liar):
    """One row is what lay in memory: it looks like a row."""

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows = await self.honest.score(request)
        garbage = TopLogprobs(rows.token_ids[:1] + 1_000_000_000, rows.logprobs[:1])
        return TopLogprobs.concatenate([garbage, rows[1:]])


class Unknown(Liar):
    async def score(self, request: ScoreRequest) -> TopLogprobs:
        return TopLogprobs.unknown(request.num_rows, K)


class OneIdOff(Liar):
    """A tenth of a nat, at one of all ids."""

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows = await self.honest.score(request)
        logprobs = rows.logprobs.copy()
        logprobs[3, 1] -= 0.1
        return changed(rows, logprobs)


class OneRow(Liar):
    """The context has room for one token more."""

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(replace(request, max_tokens=1)):
            yield written


async def check(*lies: type[Liar], script: Script = SCRIPT, dtype: str = "float32", top_logprobs: int = K) -> None:
    """The self-test of an engine that tells these lies, one on top of the other."""
    engine: Engine = ScriptedEngine(script, top_logprobs=top_logprobs)
    for lie in lies:
        engine = lie(engine)
    await check_engine(engine, name="teacher", prefix=PREFIX, top_logprobs=K, dtype=dtype)


@pytest.mark.parametrize("script", [SCRIPT, ENDS_AT_ONCE, ONE_ROW_FOR_ALL, NEIGHBORS_ALIKE])
async def test_an_honest_engine_passes(script: HashedScript) -> None:
    await check(script=script)
    await check(OneRow, script=script)
    await check(HalfPrecision, script=script, dtype="bfloat16")
    await check(HalfPrecision, OneRow, script=script, dtype="bfloat16")


async def test_half_precision_s_differences_are_refused_in_float32() -> None:
    with pytest.raises(
        UserError, match=r"differ by 0\.1\d nats \(root mean square\), expected at most 0\.005 in float32$"
    ):
        await check(HalfPrecision)


async def test_too_few_log_probs_are_reported() -> None:
    with pytest.raises(UserError, match=r"^teacher engine: returns 23 log-probs per position, expected 24$"):
        await check(top_logprobs=23)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (Tempered, r'log-probs change with the temperature \(by .* nats\); .*logprobs_mode="raw_logprobs"'),
        (Processed, r"(log-probs change with the temperature|generated and scored log-probs differ)"),
        (Logits, r"a position's listed probabilities must sum to at most 1, got "),
        (WorstFirst, r"log-probs must be <= 0 and best first, got \[-"),
        (OneRowAhead, r"score rows are shifted by -1 position\(s\) relative to the tokens"),
        (OneRowBehind, r"score rows are shifted by 1 position\(s\) relative to the tokens"),
        (FirstRowMissing, r"score returned 15 rows, expected 16"),
        (FirstRowFromMemory, r"generated and scored log-probs differ by"),
        (Unknown, r"log-probs must be <= 0 and best first, got \[nan"),
        (AnotherModelsRows, r"generated and scored log-probs differ by"),
    ],
)
async def test_an_engine_that_lies_is_reported_in_one_line(lie: type[Liar], message: str) -> None:
    for lies, dtype in [((lie,), "float32"), ((HalfPrecision, lie), "bfloat16"), ((HalfPrecision, lie), "float16")]:
        with pytest.raises(UserError, match=f"^teacher engine: {message}") as report:
            await check(*lies, dtype=dtype)
        assert "\n" not in str(report.value)


@pytest.mark.parametrize("lie", [OneRowAhead, OneRowBehind])
async def test_a_shift_is_reported_where_a_row_and_the_next_differ_by_less_than_the_tolerance(lie: type[Liar]) -> None:
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="score rows are shifted"):
            await check(lie, script=NEIGHBORS_ALIKE, dtype=dtype)


async def test_a_tenth_of_a_nat_at_one_id_is_reported_in_float32() -> None:
    with pytest.raises(UserError, match=r"differ by 0\.00\d+ nats"):
        await check(OneIdOff)


async def test_a_lie_about_a_single_row_is_reported_too() -> None:
    """Of one row it can't be told whether it is shifted, only that it is wrong."""
    with pytest.raises(UserError, match="differ by"):
        await check(OneRow, AnotherModelsRows)


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
