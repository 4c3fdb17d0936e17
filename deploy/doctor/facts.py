"""What ``adaswitch doctor`` knows about a machine: records, and how the text of NVIDIA's tools becomes them."""

import re
from dataclasses import dataclass
from typing import Literal

from deploy.cluster.gpus import Gpu
from deploy.lock.driver import Driver

Build = Literal["cpu", "cuda", "other"]
Place = Literal["machine", "cache", "hub", "nowhere"]
"""machine: a file or folder here. cache: a hub name that was fetched before. hub: one that was not. nowhere: what looks
like a path and is none."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One installed package, or one that is missing."""

    name: str
    version: str | None
    """None: not installed."""
    build: Build | None = None
    """Of torch and vLLM."""
    wanted: str | None = None
    """What adaswitch asks for, such as ==2.13.0, where the version is another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How two GPUs reach each other: NV4 (four NVLinks), PIX, PXB, PHB, NODE, SYS, as ``nvidia-smi topo -m`` has it."""

    first: int
    second: int
    kind: str

    @property
    def is_nvlink(self) -> bool:
        return self.kind.startswith("NV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The processor and its memory."""

    model: str
    architecture: str
    """x86_64, aarch64."""
    num_cores: int
    """Those that this process may use."""
    memory_gib: float
    """The machine's, or the container's where that has less."""
    flags: frozenset[str]
    """Instruction sets, as /proc/cpuinfo names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilers:
    """What kernels are built with at run time."""

    c: str | None
    cxx: str | None
    has_python_header: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """The CUDA toolkit that FlashInfer would build kernels with."""

    nvcc: str
    cuda: tuple[int, int] | None
    """None: nvcc does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A folder's file system. The folder itself need not be there yet."""

    path: str
    total_bytes: int
    free_bytes: int
    is_writable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of a Ray cluster."""

    num_gpus: int
    gpu_gib: float | None = None
    """Of its smallest. None where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayState:
    """Ray, and the cluster that a run would join."""

    address: str | None
    """Of the cluster that the run is told to join. None: it starts Ray on this machine."""
    nodes: tuple[Node, ...] = ()
    """Of that cluster."""
    error: str | None = None
    """Why Ray does not import, or the cluster is not reached."""
    local_cluster: str | None = None
    """The address of a cluster of this machine that nobody named."""
    asks_for_token: bool = False
    """RAY_AUTH_MODE is token."""
    has_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Hugging Face's hub, or the mirror that HF_ENDPOINT names."""

    is_offline: bool
    """HF_HUB_OFFLINE is set."""
    has_token: bool
    error: str | None = None
    """Why it does not answer. None where it does, and where it was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model or data set that a configuration names."""

    key: str
    """models.student, data.path, ..."""
    name: str
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the configuration asks of the machine."""

    file: str
    error: str | None = None
    """Why it can't be read."""
    run_dir: str = "runs"
    sources: tuple[Source, ...] = ()
    wants_flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Where the configuration's actors would sit, and what its run needs beside GPUs, by ``deploy``'s plan of it."""

    summary: str = ""
    """Layout, why, and how the weights go."""
    bundles: tuple[str, ...] = ()
    """Who sits in each bundle of GPUs, and what they hold of one."""
    missing: str | None = None
    """Why it can't be had. None where it fits."""
    shm_bytes: int = 0
    """Of shared memory, for the weights on their way."""
    checkpoints_bytes: int = 0
    """Of disk, for all that are kept at once."""
    download_bytes: int = 0
    """Of disk, for the models that are still at the hub, 2 bytes a parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One machine, and one configuration where it was given."""

    python: tuple[int, int, int]
    packages: tuple[Package, ...]
    flash_attention: str | None
    """Version of flash-attn, which the learner uses and vLLM does not."""
    driver: Driver | None
    gpus: tuple[Gpu, ...]
    visible_devices: str | None
    """CUDA_VISIBLE_DEVICES."""
    links: tuple[Link, ...]
    torch_gpus: int | None
    """How many GPUs torch sees. None: it was not asked."""
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
    seats: Seats | None = None
    """None without a configuration that can be read, and without torch and transformers, which count parameters."""

    def package(self, name: str) -> Package:
        return next(package for package in self.packages if package.name == name)

    @property
    def build(self) -> Build | None:
        """vLLM's. None without vLLM."""
        return self.package("vllm").build


def needs_hub(wanted: Wanted | None) -> bool:
    """Unknown without a configuration, and then taken to be."""
    return wanted is None or any(source.place in ("cache", "hub") for source in wanted.sources)


def parse_links(text: str) -> tuple[Link, ...]:
    """From ``nvidia-smi topo -m``, each pair once."""
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
