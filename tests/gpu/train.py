"""Part (d): ``adaswitch train`` as a user runs it, in each placement that the machine allows; its rollouts beside the
same work as offline batches of vLLM.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
import yaml

from tests.gpu.context import Context
from tests.gpu.machine import ROOT
from tests.gpu.models import MIDDLE, QWEN2_500M, Shape, make_pair, random_text
from tests.gpu.offline import offline_times
from tests.gpu.records import Figures, NotRun

GPUS_OF = {"one_gpu": 1, "shared_student": 2, "spread": 3}
RUN_TIMEOUT_S = 280.0
NUM_WARMUP_STEPS = 2
ACCURACY_BOUND = 0.95
"""Of the demo after 80 steps, by every method and seed tried."""


def demo(context: Context, figures: Figures, *, layout: str) -> None:
    """As ``make demo`` runs it; the whole of it on one GPU, ten steps elsewhere."""
    _needs(context, layout)
    num_steps = 80 if layout == "one_gpu" and context.is_cuda else 10
    settings = {"trainer.num_steps": num_steps, "evaluation.every_steps": num_steps, "checkpoints.every_steps": "null"}
    folder = _train(context, ROOT / "deploy" / "configs" / "demo.yaml", layout, settings)
    steps = _steps(folder)
    _add_speeds(figures, steps)
    if num_steps == 80:
        accuracy = json.loads((folder / "summary.json").read_text())["accuracy_after"]
        figures.add("held-out accuracy after the run", accuracy, "", at_least=ACCURACY_BOUND)


def shaped(context: Context, figures: Figures, *, layout: str) -> None:
    """Random models that no token ends, so that every text has its full length."""
    _needs(context, layout)
    shape, dtype = (QWEN2_500M, "bfloat16") if context.is_cuda else (MIDDLE, "float32")
    # On the processor: this process must not hold any of the GPUs' memory while the run lies on them.
    student, teacher = make_pair(shape, context.folder / "pair", device=torch.device("cpu"), dtype=dtype)
    config = shaped_config(context, shape, dtype, student, teacher)
    config_file = context.folder / "shaped.yaml"
    config_file.write_text(yaml.safe_dump(config))
    folder = _train(context, config_file, layout, {})
    steps = _steps(folder)
    _add_speeds(figures, steps)
    times = offline_times(context, folder, config, shape.vocabulary, step=len(steps))
    figures.add("offline: student writes", times.student_s, "s")
    figures.add("offline: teacher reads and writes", times.teacher_s, "s")
    seconds = statistics.median(step["rollout/seconds"] for step in steps[NUM_WARMUP_STEPS:])
    figures.add("offline, one after the other, over the rollout", times.serial_s / seconds, "")
    figures.add("offline, the busier engine, over the rollout", times.parallel_s / seconds, "")


def shaped_config(context: Context, shape: Shape, dtype: str, student: Path, teacher: Path) -> dict[str, Any]:
    """The run's file: no text ends early, so that a step's work is known."""
    num_sequences, num_new, num_steps = (64, 256, 6) if context.is_cuda else (4, 16, 3)
    prompts = context.folder / "prompts.jsonl"
    rows = ["".join(ascii_lowercase[i] for i in random_text(64, len(ascii_lowercase), seed=n)) for n in range(512)]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    engine = {"dtype": dtype, "max_num_seqs": 128, "max_model_len": 512, "enforce_eager": not context.is_cuda}
    engine["kv_cache_gib"] = 1.0 if context.is_cuda else 0.25
    return {
        "run_dir": "",
        "models": {"student": str(student), "teacher": str(teacher)},
        "engines": {"student": engine, "teacher": engine, "top_logprobs": 64},
        "policy": {"type": "adaswitch", "multiplier": 3.0, "window": 10},
        "sampling": {"temperature": 1.0, "max_new_tokens": num_new},
        "data": {"path": str(prompts), "shuffle": False},
        "trainer": {
            "num_steps": num_steps,
            "prompts_per_step": num_sequences,
            "learning_rate": 1e-6,
            "dtype": dtype,
            "activation_checkpointing": context.is_cuda,
            "tokens_per_micro_batch": 4096,
        },
        "checkpoints": {"every_steps": None},
    }


CHECKS: dict[str, Callable[[Context, Figures], None]] = {
    **{f"demo_{layout}": partial(demo, layout=layout) for layout in GPUS_OF},
    **{f"shaped_{layout}": partial(shaped, layout=layout) for layout in GPUS_OF},
}


def _needs(context: Context, layout: str) -> None:
    """On a processor there is one placement, which stands for all."""
    if find_spec("ray") is None:
        raise NotRun("Ray is not installed")
    if not context.is_cuda:
        if layout != "one_gpu":
            raise NotRun("placements on GPUs need GPUs")
        return
    if (num_gpus := torch.cuda.device_count()) < GPUS_OF[layout]:
        raise NotRun(f"placement.layout {layout} needs {GPUS_OF[layout]} GPUs, {num_gpus} are there")


def _train(context: Context, config_file: Path, layout: str, settings: dict[str, Any]) -> Path:
    """Run it to its end; the run's folder. RuntimeError with what it said last where it fails."""
    folder = context.folder / f"run-{config_file.stem}-{layout}"
    settings = {**settings, "run_dir": folder}
    if context.is_cuda:
        settings["placement.layout"] = layout
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "train", str(config_file), *words],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):  # Ray's processes too, should they be left
            os.killpg(run.pid, signal.SIGKILL)
    print(said, flush=True)
    if run.returncode:
        raise RuntimeError(f"adaswitch train ended with {run.returncode}: {' '.join(said.strip().splitlines()[-3:])}")
    return folder


def _steps(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/seconds" in row]


def _add_speeds(figures: Figures, steps: list[dict[str, float]]) -> None:
    """Medians of the steps after the first two."""
    measured = steps[NUM_WARMUP_STEPS:]

    def median(name: str) -> float:
        return statistics.median(step[name] for step in measured)

    figures.add("steps", len(steps), "steps")
    figures.add("rollout", median("rollout/tokens_per_s"), "tokens/s")
    figures.add("rollout, a step", median("rollout/seconds"), "s")
    figures.add("training, a step", median("train/seconds"), "s")
    figures.add("training", median("train/tokens_per_s"), "tokens/s")
    figures.add("weight sync with its probe, a step", median("sync/seconds"), "s")
    figures.add("tokens the teacher wrote", median("switch/teacher_token_share"), "")
