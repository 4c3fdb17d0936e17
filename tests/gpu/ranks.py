"""Part (a), the learner's ranks on two GPUs: the tests that hold two ranks against one, over NCCL."""

import subprocess
import sys
from importlib.util import find_spec

import torch

from tests.gpu.context import Context
from tests.gpu.machine import ROOT
from tests.gpu.records import Figures, NotRun

_TIMEOUT_S = 280.0


def ranks_nccl(context: Context, figures: Figures) -> None:
    """``pytest -m gpu`` on them; each test that fails is named in the part's log."""
    context.needs_cuda("NCCL needs two GPUs")
    if (num_gpus := torch.cuda.device_count()) < 2:
        raise NotRun(f"NCCL needs two GPUs, {num_gpus} is there")
    if find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    context.free_memory()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/trainer/test_ranks.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    print(done.stdout, done.stderr, flush=True)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode or "passed" not in summary:  # skipped tests show nothing
        raise RuntimeError(f"pytest ended with {done.returncode}: {summary}")
    figures.add("tests passed", float(summary.split(" passed")[0].split()[-1]), "tests", at_least=1)
