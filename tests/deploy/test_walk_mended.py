"""The demo on real engines, short, whose vLLM processes and learner are ended and stopped while it goes on."""

import logging
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.faulty_runs import faults_of, going_on, processes_of_run, summary_of, trained, until_step
from tests.support.ray_heads import joined

DEMO_CONFIG = Path(__file__).parents[2] / "deploy" / "configs" / "demo.yaml"
NUM_STEPS, PROMPTS_PER_STEP = 8, 16
SETTINGS = [
    f"trainer.num_steps={NUM_STEPS}",
    f"trainer.prompts_per_step={PROMPTS_PER_STEP}",
    "evaluation.data.max_prompts=16",
    "checkpoints.every_steps=4",
    "supervision.health_every_s=1",
    "supervision.hang_timeout_s=8",
    "supervision.health_timeout_s=15",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def vllm_process(engine_pid: int) -> int:
    """vLLM's own process under an engine's actor."""
    deadline_s = time.monotonic() + 20
    while True:
        titles = {each.pid: " ".join(each.cmdline()) for each in psutil.Process(engine_pid).children(recursive=True)}
        if found := [pid for pid, title in titles.items() if "::EngineCore" in title]:
            return found[0]
        assert time.monotonic() < deadline_s, titles
        time.sleep(0.2)


async def test_the_run_goes_on_with_the_right_weights(
    ray_address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The probe after each sync holds student engine and learner against each other."""
    caplog.set_level(logging.INFO, logger="deploy")
    folder = tmp_path / "run"
    with joined(ray_address):
        async with going_on(DEMO_CONFIG, *SETTINGS, f"run_dir={folder}") as running:
            await until_step(folder, 2, running)
            pids = processes_of_run(caplog)
            os.kill(vllm_process(pids["student engine"]), signal.SIGKILL)
            await until_step(folder, 4, running)
            os.kill(vllm_process(pids["teacher engine"]), signal.SIGSTOP)
            await until_step(folder, 6, running)
            os.kill(pids["learner"], signal.SIGKILL)
            summary = await summary_of(running)
    faults = faults_of(folder)
    assert [fault["who"] for fault in faults] == ["student engine", "teacher engine", "learner"], faults
    assert [fault["kind"] for fault in faults] == ["died", "hung", "died"], faults
    assert all(fault["recovered_s"] is not None for fault in faults)
    assert (summary["steps"], summary["faults"], summary["prompts_set_aside"]) == (NUM_STEPS, 3, [])
    assert summary["max_probe_nats"] < 1e-3
    counts = trained(folder)
    assert (len(counts), set(counts.values())) == (NUM_STEPS * PROMPTS_PER_STEP, {1})
