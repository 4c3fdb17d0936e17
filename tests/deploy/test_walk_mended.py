"""The demo on real engines, short, whose vLLM processes and learner are ended and stopped while it goes on."""

import asyncio
import json
import logging
import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray

from common.config_source import read_config
from deploy.launch import hired
from deploy.steps import run
from tests.deploy.faulty_runs import processes_of_run, trained, until_step

REPOSITORY = Path(__file__).parents[2]
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


def vllm_process(engine_pid: int) -> int:
    """vLLM's own process under an engine's actor."""
    children = psutil.Process(engine_pid).children(recursive=True)
    return next(child.pid for child in children if "::EngineCore" in " ".join(child.cmdline()))


async def test_the_run_goes_on_with_the_right_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The probe after each sync holds student engine and learner against each other."""
    caplog.set_level(logging.INFO, logger="deploy")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        settings = [*SETTINGS, f"run_dir={tmp_path / 'run'}"]
        resolved = read_config(REPOSITORY / "deploy" / "configs" / "demo.yaml", settings)
        running = asyncio.create_task(run(resolved, partial(hired, resolved.config)))
        await until_step(tmp_path / "run", 2, running)
        pids = processes_of_run(caplog)
        os.kill(vllm_process(pids["student engine"]), signal.SIGKILL)
        await until_step(tmp_path / "run", 4, running)
        os.kill(vllm_process(pids["teacher engine"]), signal.SIGSTOP)
        await until_step(tmp_path / "run", 6, running)
        os.kill(pids["learner"], signal.SIGKILL)
        summary = await asyncio.wait_for(running, 300.0)
    finally:
        ray.shutdown()
    faults = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    print(json.dumps(faults, indent=2))
    assert [fault["who"] for fault in faults] == ["student engine", "teacher engine", "learner"]
    assert [fault["kind"] for fault in faults] == ["died", "hung", "died"]
    assert all(fault["recovered_s"] is not None for fault in faults)
    assert (summary["steps"], summary["faults"], summary["prompts_set_aside"]) == (NUM_STEPS, 3, [])
    assert summary["max_probe_nats"] < 1e-3
    counts = trained(tmp_path / "run")
    assert (len(counts), set(counts.values())) == (NUM_STEPS * PROMPTS_PER_STEP, {1})
