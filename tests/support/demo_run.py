"""The demo's command as a user runs it, and one short run of it that the tests of several modules look at."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tests.support.listening import outward_listeners

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "deploy" / "demo"
CONFIG = "deploy/configs/demo.yaml"
MARK = "ADASWITCH_TEST_RUN"
"""In the environment of a run's command, with a value of its own, so that every process of the run can be found."""

NUM_STEPS, PROMPTS_PER_STEP, NUM_HELD_OUT = 3, 8, 16
SHORT = [
    f"trainer.num_steps={NUM_STEPS}",
    f"trainer.prompts_per_step={PROMPTS_PER_STEP}",
    "trainer.warmup_steps=0",
    f"evaluation.data.max_prompts={NUM_HELD_OUT}",
]
SECRETS = {
    "HF_TOKEN": "hf_not-to-be-seen-1",
    "WANDB_API_KEY": "not-to-be-seen-2" * 3,
    "MLFLOW_TRACKING_PASSWORD": "not-to-be-seen-3",
    "INSPECTOR_TOKEN": "not-to-be-seen-4",
}
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """A finished run, and what was seen of it from outside."""

    folder: Path  # the run's own
    output: str
    mark: str  # the value of MARK
    outward_listeners: frozenset[str]


def train_command(*settings: str, options: Sequence[str] = ()) -> list[str]:
    """``adaswitch train`` on the demo's configuration."""
    command = [sys.executable, "-m", "deploy.cli", "train", CONFIG, *options]
    for setting in settings:
        command += ["--set", setting]
    return command


def run_environment(folder: Path, **variables: str) -> dict[str, str]:
    """This process's, without a cluster to join and the tests' number of threads; caches are in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    return kept | {"HF_DATASETS_CACHE": str(folder / "datasets")} | variables


def run_demo(folder: Path) -> DemoRun:
    """The demo cut short, with secrets in its environment. Its folder is ``folder``/runs/demo."""
    run, mark, listeners = folder / "runs" / "demo", uuid4().hex, set[str]()
    deadline_s = time.monotonic() + _TIMEOUT_S
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            train_command(*SHORT, f"run_dir={run}"),
            cwd=REPOSITORY,
            env=run_environment(folder, **SECRETS, **{MARK: mark}),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None and time.monotonic() < deadline_s:
            listeners |= outward_listeners(mark)
            time.sleep(1.0)
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    text = (folder / "output").read_text()
    assert process.returncode == 0, text
    return DemoRun(folder=run, output=text, mark=mark, outward_listeners=frozenset(listeners))
