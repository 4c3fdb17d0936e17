"""The facts that ``adaswitch doctor`` gathers about a machine, and parsers for the output of NVIDIA's tools."""

import re
from dataclasses import dataclass
from typing import Literal

from deploy.cluster.gpus import Gpu
from deploy.lock.driver import Driver

Build = Literal["cpu", "cuda", "other"]
Place = Literal["machine", "cache", "hub", "nowhere"]
"""machine: a file or folder here. cache: a hub name in the local cache. hub: a hub name that is not in the cache.
nowhere: a path that does not exist."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package, installed or missing."""

    name: str
    version: str | None
    """None if it is not installed."""
    build: Build | None = None
    """For torch and vLLM."""
    wanted: str | None = None
    """The version that adaswitch requires, for example ==2.13.0, if another one is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Connection of two GPUs as in ``nvidia-smi topo -m``: NV4 (four NVLinks), PIX, PXB, PHB, NODE, SYS."""

    first: int
    second: int
    kind: str

    @property
    def is_nvlink(self) -> bool:
        return self.kind.startswith("NV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU and the machine's memory."""

    model: str
    architecture: str
    """x86_64, aarch64."""
    num_cores: int
    """Cores that this process may use."""
    memory_gib: float
    """Of the machine, or of the container if that is less."""
    flags: frozenset[str]
    """Instruction sets, named as in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilers:
    """What is needed to build kernels at run time."""

    c: str | None
    cxx: str | None
    has_python_header: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """The CUDA toolkit that FlashInfer would use to build kernels."""

    nvcc: str
    cuda: tuple[int, int] | None
    """None if nvcc does not report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """File system of a folder, which need not exist yet."""

    path: str
    total_bytes: int
    free_bytes: int
    is_writable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of a Ray cluster."""

    num_gpus: int
    gpu_gib: float | None = None
    """Memory of its smallest GPU. None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayState:
    """Ray, and the cluster that a run would use."""

    address: str | None
    """Address of the cluster that the run is configured for. None: it starts Ray on this machine."""
    nodes: tuple[Node, ...] = ()
    """The nodes of that cluster."""
    error: str | None = None
    """Why Ray can't be imported, or the cluster can't be reached."""
    local_cluster: str | None = None
    """Address of a cluster that runs on this machine but is not configured."""
    asks_for_token: bool = False
    """Whether RAY_AUTH_MODE is token."""
    has_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """The Hugging Face Hub, or the mirror in HF_ENDPOINT."""

    is_offline: bool
    """Whether HF_HUB_OFFLINE is set."""
    has_token: bool
    error: str | None = None
    """Why it does not answer. None if it does, or was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model or data set in a configuration."""

    key: str
    """models.student, data.path, ..."""
    name: str
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the configuration needs from the machine."""

    file: str
    error: str | None = None
    """Why it can't be read."""
    run_dir: str = "runs"
    sources: tuple[Source, ...] = ()
    wants_flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """The plan of the configured run: where its actors go, and what the run needs besides GPUs."""

    summary: str = ""
    """The layout, the reason for it, and the weight-transfer backend."""
    bundles: tuple[str, ...] = ()
    """For each bundle with GPUs, its actors and their memory per GPU."""
    missing: str | None = None
    """Why the run does not fit. None if it fits."""
    shm_bytes: int = 0
    """Shared memory for the weight transfer."""
    checkpoints_bytes: int = 0
    """Disk space for all checkpoints that are kept at once."""
    download_bytes: int = 0
    """Disk space for models that are not in the cache yet, 2 bytes per parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about one machine, and about one configuration if given."""

    python: tuple[int, int, int]
    packages: tuple[Package, ...]
    flash_attention: str | None
    """Version of flash-attn, which is used by the learner but not by vLLM."""
    driver: Driver | None
    gpus: tuple[Gpu, ...]
    visible_devices: str | None
    """Value of CUDA_VISIBLE_DEVICES."""
    links: tuple[Link, ...]
    torch_gpus: int | None
    """Number of GPUs that torch sees. None if it was not asked."""
    torch_error: str | None
    processor: Processor
    compilers: Compilers
    toolkit: Toolkit | None
    shm: Space
    run_space: Space
    hub_space: Space
    ray: RayState
    hub: Hub
    wanted: Wanted | None
    plan: PlanFacts | None = None
    """None without a valid configuration, or without torch and transformers, which count the parameters."""

    def package(self, name: str) -> Package:
        return next(package for package in self.packages if package.name == name)

    @property
    def build(self) -> Build | None:
        """vLLM's build. None without vLLM."""
        return self.package("vllm").build


def needs_hub(wanted: Wanted | None) -> bool:
    """Whether the run loads anything from the hub. True without a configuration, because it is unknown then."""
    return wanted is None or any(source.place in ("cache", "hub") for source in wanted.sources)


def parse_links(text: str) -> tuple[Link, ...]:
    """Parse ``nvidia-smi topo -m``. Each pair occurs once."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    is_gpu = re.compile(r"GPU(\d+)").fullmatch
    header = next((row for row in rows if row and is_gpu(row[0]) and "X" not in row), [])
    columns = [int(found[1]) for name in header if (found := is_gpu(name))]
    links = []
    for row in rows:
        if row and (found := is_gpu(row[0])) and "X" in row:
            first = int(found[1])
            cells = zip(columns, row[1 : 1 + len(columns)], strict=False)
            links += [Link(first=first, second=second, kind=kind) for second, kind in cells if first < second]
    return tuple(links)
