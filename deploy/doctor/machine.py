"""CPU, compilers and disks of this machine."""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from deploy.doctor.facts import GIB, Compilers, Processor, Space, Toolkit

_TOOL_TIMEOUT_S = 20.0


def printed(*command: str) -> str:
    """The command's output; empty if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def processor() -> Processor:
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


def compilers() -> Compilers:
    include = Path(sysconfig.get_path("include"))
    return Compilers(
        c=_first_program(os.environ.get("CC"), "gcc", "clang", "cc"),
        cxx=_first_program(os.environ.get("CXX"), "g++", "clang++", "c++"),
        has_python_header=(include / "Python.h").exists(),
    )


def toolkit() -> Toolkit | None:
    """The toolkit that FlashInfer finds (``flashinfer.jit.cpp_ext.get_cuda_path``); vLLM uses the same function."""
    on_path = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    home = home or (str(Path(on_path).parents[1]) if on_path else "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        return None
    version = re.search(r"release (\d+)\.(\d+)", printed(nvcc, "--version"))
    return Toolkit(nvcc=nvcc, cuda=(int(version[1]), int(version[2])) if version else None)


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)


def space(folder: str) -> Space:
    """The file system of the folder, or of its nearest existing parent."""
    wanted = Path(folder).expanduser().absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    usage = shutil.disk_usage(there)
    writable = os.access(there, os.W_OK | os.X_OK)
    return Space(path=str(wanted), total_bytes=usage.total, free_bytes=usage.free, is_writable=writable)
