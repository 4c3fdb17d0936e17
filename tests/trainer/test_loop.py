"""The loop over stand-ins that record what they are asked, in order."""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from common.config import Trainer
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from trainer.learner import StepReport
from trainer.loop import BEGINNING, HeldOut, StaleSequences, Start, distill
from trainer.probe import WeightSyncError
from trainer.probe_statistics import ProbeReport
from trainer.prompts import PromptCursor
from trainer.reports import Batch, Evaluated, StepDone, Trained, summarize


def probe_report(max_difference: float) -> ProbeReport:
    return ProbeReport(
        rms=max_difference / 10,
        p99=max_difference / 3,
        max_difference=max_difference,
        text_index=0,
        position=1,
        token_id=0,
        engine_logprob=-1.0,
        learner_logprob=-1.0,
        num_compared=4,
    )


@dataclass
class Collected:
    sequence: MixedSequence
    reference: str


@dataclass
class House:
    """Rollouts and learner in one, so that the order of all calls is kept."""

    make_sequence: Any
    calls: list[str] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    probe_texts: list[Ids] = field(default_factory=list)
    read_texts: list[Ids] = field(default_factory=list)
    probe_difference: float = 1e-5
    collecting: int = 0
    version: int = 0  # the engines hold
    loads_weights: bool = True
    slow_step: asyncio.Event | None = None  # a step waits for it
    kept: dict[int, list[str]] = field(default_factory=dict)

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        self.calls.append(f"collect {step}")
        if kept:
            self.kept[step] = [sequence.sequence_id for sequence in kept]
        self.collecting += 1
        try:
            for prompt in reversed(prompts):  # they arrive in no particular order
                await asyncio.sleep(0)
                sequence = self.make_sequence(
                    prompt_id=prompt.prompt_id,
                    epoch=prompt.epoch,
                    seed=prompt.seed % 1000,
                    weight_version=self.version,
                )
                yield Collected(sequence, f"reference of {sequence.sequence_id}")
        finally:
            self.collecting -= 1
        self.calls.append(f"collected {step}")

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        self.calls.append("evaluate")
        return [self.make_sequence(prompt_id=prompt.prompt_id, answer="t1", policy="on_policy") for prompt in prompts]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        self.calls.append("probe")
        self.probe_texts = list(texts)
        return [[TopLogprobs.unknown(text.size, 4) for text in texts]]

    async def step(self, references: Sequence[Any]) -> StepReport:
        self.calls.append("step")
        self.references = list(references)
        if self.slow_step is not None:
            await self.slow_step.wait()
        return StepReport(
            loss=0.5,
            loss_student_tokens=None,
            loss_teacher_tokens=0.5,
            covered_mass=1.0,
            grad_norm=1.0,
            learning_rate=1e-3,
            num_tokens=10,
            num_micro_batches=1,
            seconds=0.1,
        )

    async def sync(self, version: int) -> None:
        self.calls.append(f"sync {version}")
        if self.loads_weights:
            self.version = version

    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        self.calls.append("read")
        self.read_texts = list(texts)

    async def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        self.calls.append("check")
        assert all(map(np.array_equal, texts, self.read_texts or texts))
        if self.probe_difference > 1.0:
            raise WeightSyncError("student engine and learner differ")
        return probe_report(self.probe_difference)


class Prompts:
    """A stream of prompts without a file."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def cursor(self) -> PromptCursor:
        return PromptCursor(position=self._number)

    def take(self, num_rows: int) -> list[Prompt]:
        taken = self.peek(num_rows)
        self._number += num_rows
        return taken

    def peek(self, num_rows: int) -> list[Prompt]:
        taken = range(self._number, self._number + num_rows)
        return [Prompt(prompt_id=f"p{n:02d}", token_ids=np.arange(3, dtype=np.int32), seed=n) for n in taken]


def run(
    house: House,
    *,
    num_steps: int = 3,
    held_out: bool = True,
    max_staleness: Literal[0, 1] = 0,
    start: Start = BEGINNING,
    prompts: Prompts | None = None,
):
    return distill(
        Trainer(num_steps=num_steps, prompts_per_step=4, max_staleness=max_staleness),
        prompts=prompts or Prompts(),  # type: ignore[arg-type]  # a stream's interface, without its file
        rollouts=house,
        learner=house,
        held_out=HeldOut(
            prompts=Prompts().take(2),
            every_steps=2,
            answer_pattern=re.compile("(t1)"),
            decode=lambda token_ids: "t1",
        )
        if held_out
        else None,
        num_probe_prompts=2,
        start=start,
    )


class MissingPrompts(Prompts):
    """The second step's are all set aside."""

    def peek(self, num_rows: int) -> list[Prompt]:
        return [prompt for prompt in super().peek(num_rows) if not 4 <= prompt.seed < 8]


@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_a_step_whose_prompts_are_all_set_aside_trains_nothing_and_the_next_one_is_as_usual(
    make_mixed_sequence, max_staleness
) -> None:
    house = House(make_mixed_sequence)
    records = [record async for record in run(house, prompts=MissingPrompts(), max_staleness=max_staleness)]
    assert [record.step for record in made_steps(records)] == [1, 3]
    assert [record.step for record in records if isinstance(record, StepDone)] == [1, 2, 3]
    assert [record.step for record in records if isinstance(record, Evaluated)] == [0, 2, 3]
    assert [call for call in house.calls if call.startswith("sync")] == ["sync 1", "sync 2", "sync 3"]
    assert house.calls.count("step") == 2


def made_steps(records: Sequence[object]) -> list[Trained]:
    return [record for record in records if isinstance(record, Trained)]


async def test_each_step_is_collected_trained_synced_and_probed_in_this_order(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence)
    records = [record async for record in run(house)]
    step = ["collect {0}", "collected {0}", "probe", "read", "step", "sync {0}", "probe", "check"]
    expected = ["evaluate"]
    for number in (1, 2, 3):
        expected += [call.format(number) for call in step] + (["evaluate"] if number in (2, 3) else [])
    assert house.calls == expected
    assert [(type(record), record.step) for record in records] == [
        (Evaluated, 0),
        (Trained, 1),
        (StepDone, 1),
        (Trained, 2),
        (Evaluated, 2),
        (StepDone, 2),
        (Trained, 3),
        (Evaluated, 3),
        (StepDone, 3),
    ]
    assert [record.cursor.position for record in records if isinstance(record, StepDone)] == [4, 8, 12]


async def test_a_step_trains_its_sequences_in_the_order_of_the_prompts_whatever_the_order_they_come_in(
    make_mixed_sequence,
) -> None:
    house = House(make_mixed_sequence)
    _ = [record async for record in run(house, num_steps=1, held_out=False)]
    assert house.references == [f"reference of p0{number}.0.0" for number in range(4)]


async def test_a_probe_text_lacks_the_sequences_last_token(make_mixed_sequence) -> None:
    """Reading a text predicts one more token; a sequence that fills the context has no room for it."""
    house = House(make_mixed_sequence)
    _ = [record async for record in run(house, num_steps=1, held_out=False)]
    first = make_mixed_sequence(prompt_id="p00", seed=0)
    np.testing.assert_array_equal(house.probe_texts[0], np.concatenate([first.prompt.token_ids, first.token_ids[:-1]]))
    assert len(house.probe_texts) == 2


async def test_a_probe_that_fails_ends_the_run(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence, probe_difference=2.0)
    with pytest.raises(WeightSyncError):
        _ = [record async for record in run(house)]
    assert house.calls[-1] == "check"


async def test_a_run_that_is_closed_leaves_no_collection_open(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence)
    steps = run(house, held_out=False)
    await anext(steps)
    await steps.aclose()
    assert house.collecting == 0


def test_a_steps_summary_counts_sequences_and_tokens(make_mixed_sequence) -> None:
    switched = make_mixed_sequence(num_tokens=12, switches=(4,), num_wasted_tokens=3)
    late = make_mixed_sequence(num_tokens=8, switches=(6,))
    kept = make_mixed_sequence(num_tokens=4, switches=())
    report = summarized(switched, late, kept)
    assert (report.num_sequences, report.num_tokens, report.num_wasted_tokens) == (3, 24, 3)
    assert report.switch_rate == pytest.approx(2 / 3)
    assert report.teacher_token_share == pytest.approx((8 + 2) / 24)
    assert report.mean_switch_position == 5.0
    judged = np.concatenate([sequence.divergences for sequence in (switched, late, kept)])
    assert report.mean_divergence == pytest.approx(np.nanmean(judged.astype(np.float64)))


def test_a_step_without_a_switch_or_a_proposal_has_no_mean(make_mixed_sequence) -> None:
    kept = summarized(make_mixed_sequence(switches=()))
    assert (kept.switch_rate, kept.mean_switch_position) == (0.0, None)
    taught = summarized(make_mixed_sequence(switches=(0,)))
    assert (taught.teacher_token_share, taught.mean_divergence, taught.mean_staleness) == (1.0, None, None)


# --------------------------------------------------------------------------------------------------- one step ahead


async def test_with_staleness_1_the_next_step_is_collected_while_this_one_trains(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence, slow_step=asyncio.Event())
    steps = run(house, num_steps=2, held_out=False, max_staleness=1)
    first = asyncio.ensure_future(anext(steps))
    while "collected 2" not in house.calls:
        await asyncio.sleep(0)
    assert house.calls == ["collect 1", "collected 1", "probe", "read", "step", "collect 2", "collected 2"]
    house.slow_step.set()
    assert isinstance(await first, Trained)
    assert house.calls[-3:] == ["sync 1", "probe", "check"]


async def test_no_sync_tears_a_collection_and_nothing_is_under_way_when_the_loop_yields(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence)
    async for record in run(house, num_steps=4, max_staleness=1):
        assert house.collecting == 0
        if isinstance(record, StepDone):
            assert (record.ahead is None) == (record.step == 4)
            assert record.cursor.position == 4 * min(record.step + 1, 4)
    syncs = [call for call in house.calls if call.startswith(("sync", "collect"))]
    assert syncs[:6] == ["collect 1", "collected 1", "collect 2", "collected 2", "sync 1", "collect 3"]
    assert syncs.count("collect 5") == 0


@pytest.mark.parametrize(("max_staleness", "ages"), [(0, [0.0, 0.0, 0.0]), (1, [0.0, 1.0, 1.0])])
async def test_the_age_of_what_is_trained_is_reported(make_mixed_sequence, max_staleness, ages) -> None:
    house = House(make_mixed_sequence)
    records = [record async for record in run(house, held_out=False, max_staleness=max_staleness)]
    assert [record.rollout.mean_staleness for record in made_steps(records)] == ages
    assert [record.rollout.num_refused for record in made_steps(records)] == [0, 0, 0]


async def test_an_error_while_both_are_under_way_is_raised_as_it_was_and_ends_the_other(make_mixed_sequence) -> None:
    class Broken(House):
        async def step(self, references: Sequence[Any]) -> StepReport:
            await asyncio.sleep(0)
            raise FloatingPointError("the loss is not finite")

    house = Broken(make_mixed_sequence)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        _ = [record async for record in run(house, held_out=False, max_staleness=1)]
    assert "collect 2" in house.calls
    assert house.collecting == 0


async def test_sequences_that_are_too_old_are_refused_counted_and_collected_again(make_mixed_sequence) -> None:
    """As where a run goes on with max_staleness 0 and sequences from a checkpoint of 1; two of four are fresh."""
    house = House(make_mixed_sequence)
    items = [
        Collected(make_mixed_sequence(prompt_id=f"p0{n}", seed=n, weight_version=version), f"old reference {n}")
        for n, version in enumerate((5, 4, 5, 4))
    ]
    start = Start(step=5, ahead=Batch(items=items, seconds=1.0))
    (trained,) = made_steps([r async for r in run(house, num_steps=6, held_out=False, start=start)])
    assert house.references == ["old reference 0", "reference of p01.0.0", "old reference 2", "reference of p03.0.0"]
    assert house.kept == {6: ["p00.0.0", "p02.0.0"]}
    assert (trained.rollout.num_refused, trained.rollout.num_sequences, trained.rollout.mean_staleness) == (2, 4, 0.0)
    assert trained.rollout.seconds > 1.0


async def test_engines_that_never_take_new_weights_end_the_run(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence, loads_weights=False)
    with pytest.raises(StaleSequences, match=r"step 2 trains weight version 1; 4 of 4 .* the first p04\.0\.0"):
        _ = [record async for record in run(house, held_out=False)]


# ------------------------------------------------------------------------------------------------------------ resumed


async def test_a_resumed_run_syncs_and_probes_before_it_collects_and_evaluates_nothing_twice(
    make_mixed_sequence,
) -> None:
    house = House(make_mixed_sequence)
    records = [record async for record in run(house, num_steps=3, start=Start(step=2))]
    assert house.calls[:5] == ["sync 2", "probe", "check", "collect 3", "collected 3"]
    assert [(type(record), record.step) for record in records] == [(Trained, 3), (Evaluated, 3), (StepDone, 3)]
    assert made_steps(records)[0].rollout.mean_staleness == 0.0


async def test_a_resumed_run_trains_what_was_collected_before_it_collects_more(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence)
    items = [Collected(make_mixed_sequence(weight_version=1), "stored")]
    start = Start(step=2, ahead=Batch(items=items, seconds=7.0))
    steps = run(house, num_steps=3, held_out=False, max_staleness=1, start=start)
    (trained,) = made_steps([record async for record in steps])
    assert house.calls == ["sync 2", "probe", "check", "probe", "read", "step", "sync 3", "probe", "check"]
    assert house.references == ["stored"]
    assert (trained.rollout.mean_staleness, trained.rollout.seconds) == (1.0, 7.0)


def summarized(*sequences: MixedSequence):
    items = [Collected(sequence, "") for sequence in sequences]
    return summarize(Batch(items=items, seconds=2.0), version=0)
