"""The demo as a user takes it, its driver killed half-way and the run resumed."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest
from transformers import AutoModelForCausalLM

from tests.support.demo_run import MARK, REPOSITORY, run_environment, train_command
from tests.support.marked import processes_with
from tests.support.trace_reader import TraceReader

NUM_STEPS, PROMPTS_PER_STEP, CHECKPOINT_EVERY, NUM_HELD_OUT = 12, 64, 3, 256
SETTINGS = [
    f"trainer.num_steps={NUM_STEPS}",
    "trainer.decay_fraction=0",  # so that 12 steps are the first 12 of a whole demo
    f"checkpoints.every_steps={CHECKPOINT_EVERY}",
    "evaluation.every_steps=6",
    f"evaluation.data.max_prompts={NUM_HELD_OUT}",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def started(folder: Path, mark: str, *options: str) -> "subprocess.Popen[bytes]":
    command = train_command(*SETTINGS, f"run_dir={folder / 'run'}", options=options)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=run_environment(folder, **{MARK: mark}), stdout=log, stderr=log
        )


def wait_until_step(run: Path, step: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + 240
    while last_step(run) < step:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline_s, f"waited 240 s for step {step}"
        time.sleep(0.1)


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return max((json.loads(line)["step"] for line in text.split("\n")[:-1]), default=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a demo whose driver was killed once; what was left of it is in ``left``, a list of command lines."""
    folder = tmp_path_factory.mktemp("resumed")
    marks = uuid4().hex, uuid4().hex
    seed = random.SystemRandom().randrange(10_000)
    step = random.Random(seed).randrange(CHECKPOINT_EVERY + 1, NUM_STEPS - 1)
    print(f"seed {seed}: killed after step {step}")
    process = started(folder, marks[0])
    try:
        wait_until_step(folder / "run", step, process, folder / "log")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline_s = time.monotonic() + 180  # Ray's agents look for their parent every few seconds, several times
    while (left := processes_with(MARK, marks[0])) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    (folder / "left").write_text(json.dumps(left))
    assert not (folder / "run" / "summary.json").exists()
    process = started(folder, marks[1], "--resume")
    try:
        assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-4000:]
    finally:
        process.send_signal(signal.SIGTERM)  # which ends the actors first
        process.wait(timeout=60)
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_nothing_of_a_killed_run_goes_on_running(folder: Path) -> None:
    assert json.loads((folder / "left").read_text()) == []


def test_it_learned_as_if_it_had_not_been_killed_and_says_that_it_was(folder: Path) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.5
    assert summary["accuracy_after"] > summary["accuracy_before"]
    lines = metrics(folder)
    losses = [line["train/loss_nats"] for line in lines if "train/loss_nats" in line]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3]), losses
    divergences = [line["evaluation/divergence_nats"] for line in lines if "evaluation/prompts" in line]
    assert divergences[-1] < 0.8 * divergences[0], divergences
    assert (summary["resumed"], summary["steps"]) == (1, NUM_STEPS)
    assert summary["sequences"] == NUM_STEPS * PROMPTS_PER_STEP
    legs = json.loads((folder / "run" / "versions.json").read_text())["legs"]
    assert [leg["after_step"] for leg in legs] in ([0, 3], [0, 6], [0, 9])


def test_every_step_and_every_prompt_is_there_once(folder: Path) -> None:
    lines = metrics(folder)
    assert [line["step"] for line in lines if "train/loss_nats" in line] == list(range(1, NUM_STEPS + 1))
    assert [line["step"] for line in lines if "evaluation/prompts" in line] == [0, 6, 12]
    assert max(line.get("sync/probe_nats", 0.0) for line in lines) < 1e-3
    with TraceReader(folder / "run" / "traces") as reader:
        assert not reader.skipped
        records = reader.sequences(limit=NUM_STEPS * PROMPTS_PER_STEP + 1)
    assert len(records) == len({record.sequence_id for record in records}) == NUM_STEPS * PROMPTS_PER_STEP
    assert all(record.weight_version_min in (None, record.step - 1) for record in records)


def test_the_last_checkpoint_holds_the_student(folder: Path) -> None:
    checkpoints = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert checkpoints[-2:] == ["step-000009", "step-000012"]
    stored = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoints" / "step-000012" / "student")
    final = AutoModelForCausalLM.from_pretrained(folder / "run" / "student")
    assert all(parameter.equal(final.get_parameter(name)) for name, parameter in stored.named_parameters())


def test_resuming_a_finished_run_says_so_and_does_nothing(folder: Path) -> None:
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    (folder / "log").unlink()
    assert started(folder, uuid4().hex, "--resume").wait(timeout=120) == 0
    text = (folder / "log").read_text()
    assert "is finished, after step 12" in text
    assert "held-out accuracy after" in text
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
