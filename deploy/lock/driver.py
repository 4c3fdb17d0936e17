"""The NVIDIA driver that the CUDA build needs, and the installed one.

Runs with any Python 3.11 before anything is installed, so it only uses the standard library. The exit code is 1 if the
driver is too old. Without a driver the packages can still be installed, for use on another machine.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CUDA = (13, 0)
"""The CUDA version of torch and vLLM in cuda.lock."""
MIN_DRIVER = 580
"""From NVIDIA's CUDA release notes: every CUDA 13 runs with a driver of branch 580 or newer."""
_TIMEOUT_S = 20.0
_LOADED_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A working NVIDIA driver."""

    version: str
    """For example 580.95.05."""
    cuda: tuple[int, int] | None
    """The newest CUDA version it supports. NVIDIA's forward-compatibility package can raise it."""

    @property
    def is_new_enough(self) -> bool:
        return int(self.version.partition(".")[0]) >= MIN_DRIVER or (self.cuda is not None and self.cuda >= CUDA)


NEEDED = f"CUDA {CUDA[0]}.{CUDA[1]} needs driver {MIN_DRIVER} or newer"


def parse_banner(text: str) -> Driver | None:
    """Parse the driver version that ``nvidia-smi`` prints above its table. None if there is none.

    From 610 on, the two versions are called KMD (kernel-mode driver) and CUDA UMD (user-mode driver).
    """
    version = re.search(r"(?:Driver|KMD) Version\s*:\s*(\d+(?:\.\d+)+)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", text)
    return Driver(version=version[1], cuda=(int(cuda[1]), int(cuda[2])) if cuda else None) if version else None


def parse_module(text: str) -> Driver | None:
    """Parse ``/proc/driver/nvidia/version``, for machines without ``nvidia-smi``."""
    version = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", text)
    return Driver(version=version[1], cuda=None) if version else None


def read_driver() -> Driver | None:
    """This machine's driver, or None if there is no working one."""
    try:
        printed = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        printed = ""
    if driver := parse_banner(printed):
        return driver
    return parse_module(_LOADED_MODULE.read_text()) if _LOADED_MODULE.exists() else None


def main() -> int:
    driver = read_driver()
    if driver is None:
        print(f"warning: no NVIDIA driver found; the machine that uses this environment: {NEEDED}", file=sys.stderr)
        return 0
    if not driver.is_new_enough:
        print(
            f"error: NVIDIA driver {driver.version} is too old: {NEEDED}; update it, or use the CPU build: GPU=0",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
