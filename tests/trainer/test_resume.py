"""Runs that are killed and taken up again end as if nothing had happened."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.config.source import read_config
from deploy.run.resume import find_resumable
from deploy.run.run import RunActors, run
from deploy.supervision.health_monitor import Fault
from deploy.supervision.supervised import LearnerLost
from tests.support.forked import start_run
from tests.support.killable_run import started_actors
from tests.support.trace_reader import TraceReader

REPOSITORY = Path(__file__).parents[2]
NUM_ROWS, PROMPTS_PER_STEP, NUM_STEPS, NUM_KILLS = 10, 4, 10, 3  # steps 3, 5, 8 and 10 reach over or end an epoch
TIMEOUT_S = 120.0
CONFIG = """
run_dir: {run_dir}
models: {{student: {models}/student, teacher: {models}/teacher}}
policy: {{window: 3, floor: 0.2}}
sampling: {{max_new_tokens: 24, chunk_tokens: 4}}
data: {{path: {models}/prompts.jsonl}}
trainer:
  num_steps: {num_steps}
  prompts_per_step: {prompts_per_step}
  max_staleness: {max_staleness}
  learning_rate: 0.01
  warmup_steps: 2
  decay_fraction: 0.4
  num_threads: 1
checkpoints: {{every_steps: 2}}
"""


@pytest.fixture(scope="module")
def models(
    make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [json.dumps({"prompt": f"w{row} w{row + 1} w{2 * row}"}) for row in range(NUM_ROWS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def write_config(models: Path, run_dir: Path, *, max_staleness: int) -> Path:
    path = run_dir.with_suffix(".yaml")
    path.write_text(
        CONFIG.format(
            run_dir=run_dir,
            models=models,
            num_steps=NUM_STEPS,
            prompts_per_step=PROMPTS_PER_STEP,
            max_staleness=max_staleness,
        )
    )
    return path


def log_of(config: Path) -> Path:
    return config.with_suffix(".log")


def finish(config: Path, *options: str) -> None:
    process = start_run(config, options, log=log_of(config))
    try:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0, log_of(config).read_text()[-4000:]
    finally:
        process.kill()


def finish_apart(config: Path) -> None:
    """In a process with a hash seed of its own."""
    command = [sys.executable, "-m", "tests.support.killable_run", str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def kill_when(
    condition: Callable[[], bool], config: Path, *options: str, delay_s: float = 0.0, max_file_bytes: int | None = None
) -> None:
    """Start the run and end it at once and without a word, so long after the condition holds."""
    process = start_run(config, options, log=log_of(config), max_file_bytes=max_file_bytes)
    deadline_s = time.monotonic() + TIMEOUT_S
    try:
        while not condition():
            assert process.is_alive(), log_of(config).read_text()[-4000:]
            assert time.monotonic() < deadline_s, f"waited {TIMEOUT_S:g} s for the moment to kill the run"
            time.sleep(0.002)
        time.sleep(delay_s)
        assert process.is_alive(), "it was done before it could be killed"
    finally:
        process.kill()
        process.join()


def kill_after(config: Path, *options: str, step: int, **knobs: Any) -> None:
    """After this process has measured the step."""
    run = config.with_suffix("")
    num_legs = len(legs_of(run))
    kill_when(lambda: len(legs_of(run)) > num_legs and last_step(run) >= step, config, *options, **knobs)


def legs_of(run: Path) -> list[int]:
    """The steps after which the run was started and taken up. A leg is there once what came later is cut."""
    versions = run / "versions.json"
    return [leg["after_step"] for leg in json.loads(versions.read_text())["legs"]] if versions.exists() else []


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return max((json.loads(line)["step"] for line in text.split("\n")[:-1]), default=0)


def traced(run: Path) -> dict[int, list[str]]:
    """The sequences that every step was trained on."""
    with TraceReader(run / "traces") as reader:
        assert not reader.skipped
        records = reader.sequences(limit=1000)
    steps: dict[int, list[str]] = {}
    for record in records:
        steps.setdefault(record.step, []).append(record.sequence_id)
    return steps


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run that nobody killed, for each max_staleness."""

    @cache
    def run(max_staleness: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        finish_apart(write_config(models, folder, max_staleness=max_staleness))
        return folder

    return run


def assert_as_if_nothing_had_happened(found: Path, expected: Path) -> None:
    """The same weights bit for bit, the same losses, and every prompt of every epoch trained once."""
    weights, wanted = (load_file(run / "student" / "model.safetensors") for run in (found, expected))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(weights[name], weight), name
    steps = traced(found)
    assert steps == traced(expected)
    assert [len(steps[step]) for step in range(1, NUM_STEPS + 1)] == [PROMPTS_PER_STEP] * NUM_STEPS
    trained = Counter(sequence_id for step in steps.values() for sequence_id in step)
    assert trained == Counter(f"{row}.{epoch}.0" for epoch in range(4) for row in range(NUM_ROWS))
    losses, wanted_losses = ([(m["step"], m["train/loss_nats"]) for m in metrics(run)] for run in (found, expected))
    assert losses == wanted_losses


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_that_is_killed_at_random_ends_with_the_weights_of_one_that_is_not(
    models: Path, undisturbed: Callable[[int], Path], tmp_path: Path, max_staleness: int
) -> None:
    run = tmp_path / "run"
    config = write_config(models, run, max_staleness=max_staleness)
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")  # shown where the test fails
    rng = random.Random(seed)
    for kill in range(NUM_KILLS):
        step = 3 + 2 * kill + rng.randrange(3)  # 3 to 5, 5 to 7, 7 to 9; after step 2 there is a checkpoint
        kill_after(config, *(["--resume"] if kill else []), step=step, delay_s=rng.uniform(0.0, 0.1))
    finish(config, "--resume")

    assert_as_if_nothing_had_happened(run, undisturbed(max_staleness))
    ages = [(line["step"], line["train/staleness"]) for line in metrics(run)]
    assert ages == [(1, 0.0), *((step, float(max_staleness)) for step in range(2, NUM_STEPS + 1))]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["resumed"], summary["steps"], summary["sequences"]) == (NUM_KILLS, NUM_STEPS, 40)


def test_a_full_disk_a_damaged_checkpoint_and_half_of_one_cost_nothing_that_was_good(
    models: Path, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(models, run, max_staleness=1)
    kill_after(config, step=5)
    before = names_in(run / "checkpoints")
    assert before == ["step-000002", "step-000004"]

    kill_after(config, "--resume", step=7, max_file_bytes=60_000)  # too little for a checkpoint, enough for the rest
    assert "no checkpoint after step 6, the run continues" in log_of(config).read_text()
    assert names_in(run / "checkpoints") == before

    damaged = run / "checkpoints" / "step-000004" / "student" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    shutil.copytree(run / "checkpoints" / "step-000004" / "learner", run / "checkpoints" / ".step-000008.unfinished")
    finish(config, "--resume")
    assert "step-000004: student/model.safetensors is" in log_of(config).read_text()
    assert legs_of(run) == [0, 4, 2]
    assert names_in(run / "checkpoints") == ["damaged-step-000004", "step-000008", "step-000010"]
    assert_as_if_nothing_had_happened(run, undisturbed(1))


def test_a_run_goes_on_from_its_copy_where_nothing_else_is_left_of_it(
    models: Path, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copies" / "run"
    config = write_config(models, run, max_staleness=1)
    config.write_text(f"{config.read_text()}storage: {{url: 'file://{copy.parent}'}}\n")
    kill_when((copy / "checkpoints" / "step-000004" / "manifest.json").exists, config)
    shutil.rmtree(run)
    finish(config, "--resume")

    assert legs_of(run)[0] == 0
    assert legs_of(run)[1] >= 4
    assert_as_if_nothing_had_happened(run, undisturbed(1))
    assert traced(copy) == traced(run)
    assert (copy / "summary.json").read_bytes() == (run / "summary.json").read_bytes()
    assert names_in(copy / "checkpoints") == names_in(run / "checkpoints")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


async def test_a_learner_that_is_lost_while_it_loads_its_state_is_brought_back(models: Path, tmp_path: Path) -> None:
    config = write_config(models, tmp_path / "run", max_staleness=0)
    first, rest = (read_config(config, [f"trainer.num_steps={number}"]) for number in (2, 4))
    await run(first, partial(started_actors, first.config))
    losses = [LearnerLost([Fault(kind="died", who="learner", reason="gone", detected_s=None)])]

    @asynccontextmanager
    async def hired_and_lost(*arguments: Any) -> AsyncIterator[RunActors]:
        async with started_actors(rest.config, *arguments) as actors:
            load_state = actors.learner.load_state

            async def lose(folder: Path) -> None:
                if losses:
                    raise losses.pop()
                await load_state(folder)

            async def recover_learner(lost: LearnerLost, load: Callable[[], Awaitable[int]]) -> None:
                await actors.learner.sync(await load())

            actors.learner.load_state = lose  # type: ignore[method-assign]
            yield replace(actors, recover_learner=recover_learner)

    summary = await run(rest, hired_and_lost, find_resumable(rest.config))
    assert (summary["steps"], summary["resumed"], losses) == (4, 1, [])
