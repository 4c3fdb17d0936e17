"""Machines that this one is not, as facts."""

from dataclasses import replace

from deploy.cluster.gpus import Gpu
from deploy.doctor.facts import GIB, Compilers, Facts, Hub, Link, Package, Processor, RayState, Space
from deploy.lock.driver import Driver

H100 = Gpu(index=0, name="NVIDIA H100 80GB HBM3", gib=79.6, compute_capability=(9, 0))
T4 = Gpu(index=0, name="Tesla T4", gib=15.0, compute_capability=(7, 5))
V100 = Gpu(index=0, name="Tesla V100-SXM2-16GB", gib=16.0, compute_capability=(7, 0))
NEW_DRIVER = Driver(version="580.95.05", cuda=(13, 0))
OLD_DRIVER = Driver(version="550.90.12", cuda=(12, 4))

CPU_PACKAGES = (
    Package(name="adaswitch", version="0.1.0"),
    Package(name="vllm", version="0.32.0", build="cpu"),
    Package(name="torch", version="2.13.0+cpu", build="cpu"),
    Package(name="ray", version="2.60.0"),
    Package(name="transformers", version="5.19.0"),
)
CUDA_PACKAGES = tuple(
    replace(package, build="cuda" if package.build else None, version=(package.version or "").removesuffix("+cpu"))
    for package in CPU_PACKAGES
)
DISK = Space(path="/runs", total_bytes=1000 * GIB, free_bytes=500 * GIB)

LAPTOP = Facts(
    python=(3, 11, 9),
    packages=CPU_PACKAGES,
    flash_attention=None,
    driver=None,
    gpus=(),
    visible_devices=None,
    links=(),
    torch_gpus=None,
    torch_error=None,
    processor=Processor(
        model="A processor", architecture="x86_64", num_cores=8, memory_gib=32.0, flags=frozenset({"avx", "avx2"})
    ),
    compilers=Compilers(c="/usr/bin/gcc", cxx="/usr/bin/g++", has_python_header=True),
    toolkit=None,
    shm=Space(path="/dev/shm", total_bytes=16 * GIB, free_bytes=16 * GIB),
    run_space=DISK,
    hub_space=DISK,
    ray=RayState(address=None),
    hub=Hub(is_offline=False, has_token=True),
    wanted=None,
)
"""No GPU, CPU builds: everything is right."""

GPU_SERVER = replace(
    LAPTOP,
    packages=CUDA_PACKAGES,
    flash_attention="2.8.3",
    driver=NEW_DRIVER,
    gpus=(H100, replace(H100, index=1)),
    links=(Link(first=0, second=1, kind="NV18"),),
    torch_gpus=2,
)
"""Two GPUs, CUDA builds: everything is right."""
