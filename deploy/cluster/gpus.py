"""The GPUs of this machine, from ``nvidia-smi``, which needs neither a CUDA context nor packages."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_FIELDS = ("index", "memory.total", "memory.used", "compute_cap", "mig.mode.current", "name")
_QUERY = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
_ANSWER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    index: int
    name: str
    gib: float | None  # None if nvidia-smi does not report it, for example with unified memory
    used_gib: float = 0.0  # by all present processes
    compute_capability: tuple[int, int] | None = None
    is_mig: bool = False  # split into Multi-Instance GPUs


def gpus_of_this_machine() -> list[Gpu]:
    """All GPUs, ignoring CUDA_VISIBLE_DEVICES. Empty if nvidia-smi is missing, fails or times out."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer.stdout)


def parse_gpus(csv: str) -> list[Gpu]:
    """Parse lines such as ``0, 81920, 4, 8.0, Disabled, NVIDIA A100-SXM4-80GB``, with memory in MiB."""
    found = []
    for line in csv.splitlines():
        fields = [field.strip() for field in line.split(",", maxsplit=len(_FIELDS) - 1)]
        if len(fields) == len(_FIELDS) and fields[0].isdecimal():
            index, total, used, capability, mig, name = fields
            version = re.fullmatch(r"(\d+)\.(\d+)", capability)
            found.append(
                Gpu(
                    index=int(index),
                    name=name,
                    gib=int(total) / 1024 if total.isdecimal() else None,
                    used_gib=int(used) / 1024 if used.isdecimal() else 0.0,
                    compute_capability=(int(version[1]), int(version[2])) if version else None,
                    is_mig=mig == "Enabled",
                )
            )
    return found


def smallest_gib(gpus: Sequence[Gpu]) -> float | None:
    """Memory of the smallest GPU. None if there is no GPU, or if one does not report its memory."""
    sizes = [gpu.gib for gpu in gpus if gpu.gib is not None]
    return min(sizes) if sizes and len(sizes) == len(gpus) else None
