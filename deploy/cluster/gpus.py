"""The GPUs of the machine this process runs on, by ``nvidia-smi``: it needs no CUDA context and no packages."""

import subprocess
from dataclasses import dataclass

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_ANSWERS_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    gib: float


def gpus_of_this_machine() -> list[Gpu]:
    """All of them, whatever CUDA_VISIBLE_DEVICES hides; none where nvidia-smi is missing, fails or does not answer."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_ANSWERS_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer.stdout)


def parse_gpus(csv: str) -> list[Gpu]:
    """From lines like ``NVIDIA A100-SXM4-80GB, 81920``, in MiB. Lines that name no size are left out."""
    found = []
    for line in csv.splitlines():
        name, _, mib = line.rpartition(",")
        if mib.strip().isdigit():
            found.append(Gpu(name=name.strip(), gib=int(mib) / 1024))
    return found
