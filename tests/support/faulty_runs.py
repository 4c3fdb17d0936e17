"""Small runs over real Ray whose engines follow a script and whose learner trains a real, tiny model.

Everything else is the product's: loop, controller, traces, checkpoints, supervision. The script does not know the
learner's weights, so that the probe of the weights is left out.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.config.source import read_config
from deploy.cluster.actors import ActorClasses
from deploy.run.launch import started_actors
from deploy.run.run import run
from tests.support.played_actors import FarLearnerActor, PlayedEngineActor, StillbornEngineActor, UnprobedLearnerActor
from tests.support.trace_reader import TraceReader

Run = asyncio.Task[dict[str, object]]
"""A run in this process, to its summary."""

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TIMEOUT_S = 300.0
"""For a run to reach a step, or its end: engines start in 20 s or less, but machines that run tests are shared."""

CONFIG = """
run_dir: {run_dir}
models: {{student: {demo}/models/student, teacher: {demo}/models/teacher}}
engines: {{top_logprobs: 8, call_timeout_s: 60}}
policy: {{window: 3, floor: 0.2}}
sampling: {{max_new_tokens: 24, chunk_tokens: 4}}
data: {{path: {demo}/data/train.jsonl, max_prompts: {num_rows}}}
trainer: {{num_steps: {num_steps}, prompts_per_step: {prompts_per_step}, learning_rate: 0.001, num_threads: 1}}
checkpoints: {{every_steps: {checkpoint_every}}}
supervision:
  health_every_s: 0.5
  health_timeout_s: 4
  hang_timeout_s: 5
  backoff_first_s: 0.1
"""


PLAYED = ActorClasses(engine=PlayedEngineActor, learner=UnprobedLearnerActor)
FAR = ActorClasses(engine=PlayedEngineActor, learner=FarLearnerActor)
STILLBORN = ActorClasses(engine=StillbornEngineActor, learner=UnprobedLearnerActor)


def write_config(
    run_dir: Path, *, num_rows: int = 16, num_steps: int = 6, prompts_per_step: int = 4, checkpoint_every: int = 2
) -> Path:
    path = run_dir.with_suffix(".yaml")
    path.write_text(
        CONFIG.format(
            run_dir=run_dir,
            demo=DEMO,
            num_rows=num_rows,
            num_steps=num_steps,
            prompts_per_step=prompts_per_step,
            checkpoint_every=checkpoint_every,
        )
    )
    return path


@asynccontextmanager
async def going_on(path: Path, *settings: str, actor_classes: ActorClasses | None = None) -> AsyncIterator[Run]:
    """A run beside this task; ended, with all its actors, when the block is left before it has finished."""
    resolved = read_config(path, settings)
    running = asyncio.create_task(run(resolved, partial(started_actors, resolved.config, actor_classes=actor_classes)))
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=TIMEOUT_S)


async def summary_of(running: Run) -> dict[str, object]:
    return await asyncio.wait_for(running, TIMEOUT_S)


def faults_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "faults.jsonl").read_text().splitlines()]


async def until_step(run_dir: Path, step: int, running: Run) -> None:
    """Wait until a run in this process has measured the step."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < step:
        assert not running.done(), running.exception()
        assert time.monotonic() < deadline_s, (
            f"waited {TIMEOUT_S:g} s for step {step}; the last was {last_step(run_dir)}"
        )
        await asyncio.sleep(0.05)


def last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def processes_of_run(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """Process ids by name, as the run in this process has logged them at its start."""
    (record,) = [record for record in caplog.records if record.msg.startswith("process ids")]
    assert isinstance(record.args, dict)
    return record.args


def trained(run_dir: Path) -> Counter[tuple[str, int]]:
    """How often the trace holds each prompt of each epoch."""
    with TraceReader(run_dir / "traces") as reader:
        assert not reader.skipped
        return Counter((record.prompt_id, record.epoch) for record in reader.sequences(limit=1000))
