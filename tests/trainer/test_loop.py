"""The loop over stand-ins that record what they are asked, in order."""

import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from common.config import Trainer
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from trainer.learner import StepReport
from trainer.loop import Evaluated, HeldOut, Trained, distill, summarise
from trainer.probe import ProbeReport, WeightSyncError


def probe_report(max_difference: float) -> ProbeReport:
    return ProbeReport(
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
    probe_differences: tuple[float, ...] = (1e-5,)  # one a replica
    collecting: int = 0

    async def collect(self, prompts: Sequence[Prompt], step: int) -> AsyncGenerator[Collected, None]:
        self.calls.append(f"collect {step}")
        self.collecting += 1
        try:
            for prompt in reversed(prompts):  # they arrive in no particular order
                sequence = self.make_sequence(prompt_id=prompt.prompt_id, epoch=prompt.epoch, seed=prompt.seed % 1000)
                yield Collected(sequence, f"reference of {sequence.sequence_id}")
        finally:
            self.collecting -= 1

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        self.calls.append("evaluate")
        return [self.make_sequence(prompt_id=prompt.prompt_id, answer="t1", policy="on_policy") for prompt in prompts]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        self.calls.append("probe")
        self.probe_texts = list(texts)
        return [[TopLogprobs.unknown(text.size, 4) for text in texts] for _ in self.probe_differences]

    async def step(self, references: Sequence[Any]) -> StepReport:
        self.calls.append("step")
        self.references = list(references)
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

    async def check_probe(self, texts: Sequence[Ids], rows: list[TopLogprobs]) -> ProbeReport:
        difference = self.probe_differences[self.calls.count("check") % len(self.probe_differences)]
        self.calls.append("check")
        if difference > 1.0:
            raise WeightSyncError("student engine and learner differ")
        return probe_report(difference)


class Prompts:
    """A stream of prompts without a file."""

    def __init__(self) -> None:
        self._number = 0

    def take(self, num_rows: int) -> list[Prompt]:
        taken = range(self._number, self._number + num_rows)
        self._number += num_rows
        return [Prompt(prompt_id=f"p{n:02d}", token_ids=np.arange(3, dtype=np.int32), seed=n) for n in taken]


def run(house: House, *, num_steps: int = 3, held_out: bool = True):
    prompts = Prompts()
    return distill(
        Trainer(num_steps=num_steps, prompts_per_step=4),
        prompts=prompts,  # type: ignore[arg-type]  # all the loop asks of a stream is take
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
    )


async def test_each_step_is_collected_trained_synced_and_probed_in_this_order(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence)
    records = [record async for record in run(house)]
    step = ["collect {}", "step", "sync {}", "probe", "check"]
    expected = ["evaluate"]
    for number in (1, 2, 3):
        expected += [call.format(number) for call in step] + (["evaluate"] if number in (2, 3) else [])
    assert house.calls == expected
    assert [(type(record), record.step) for record in records] == [
        (Evaluated, 0),
        (Trained, 1),
        (Trained, 2),
        (Evaluated, 2),
        (Trained, 3),
        (Evaluated, 3),
    ]


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


async def test_the_sync_reports_the_replica_that_differs_most(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence, probe_differences=(1e-5, 3e-4, 2e-5))
    (trained,) = [record async for record in run(house, num_steps=1, held_out=False)]
    assert isinstance(trained, Trained)
    assert trained.sync.probe.max_difference == 3e-4
    assert trained.sync.version == 1


async def test_a_probe_that_fails_ends_the_run(make_mixed_sequence) -> None:
    house = House(make_mixed_sequence, probe_differences=(2.0,))
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
    report = summarise([switched, late, kept], seconds=2.0)
    assert (report.num_sequences, report.num_tokens, report.num_wasted_tokens) == (3, 24, 3)
    assert report.switch_rate == pytest.approx(2 / 3)
    assert report.teacher_token_share == pytest.approx((8 + 2) / 24)
    assert report.mean_switch_position == 5.0
    judged = np.concatenate([sequence.divergences for sequence in (switched, late, kept)])
    assert report.mean_divergence == pytest.approx(np.nanmean(judged.astype(np.float64)))


def test_a_step_without_a_switch_or_a_proposal_has_no_mean(make_mixed_sequence) -> None:
    kept = summarise([make_mixed_sequence(switches=())], seconds=1.0)
    assert (kept.switch_rate, kept.mean_switch_position) == (0.0, None)
    taught = summarise([make_mixed_sequence(switches=(0,))], seconds=1.0)
    assert (taught.teacher_token_share, taught.mean_divergence) == (1.0, None)
