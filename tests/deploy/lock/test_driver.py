"""The driver check, against what NVIDIA's tools print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.lock import driver
from deploy.lock.driver import Driver, parse_banner, parse_module

OLD = "| NVIDIA-SMI 550.90.12              Driver Version: 550.90.12      CUDA Version: 12.4     |"
GOOD = "| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |"
RENAMED = "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |"
COMPATIBLE = "| NVIDIA-SMI 570.86.15              Driver Version: 570.86.15      CUDA Version: 13.0     |"
MODULE = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build  (dvs-builder@U22)
GCC version:  gcc version 12.3.0
"""


@pytest.mark.parametrize(
    ("banner", "version", "cuda", "is_new_enough"),
    [
        (OLD, "550.90.12", (12, 4), False),
        (GOOD, "580.95.05", (13, 0), True),
        (RENAMED, "610.43.02", (13, 3), True),
        (COMPATIBLE, "570.86.15", (13, 0), True),
    ],
)
def test_the_banner_tells_the_driver(banner: str, version: str, cuda: tuple[int, int], is_new_enough: bool) -> None:
    found = parse_banner(banner)
    assert found == Driver(version=version, cuda=cuda)
    assert found.is_new_enough is is_new_enough


def test_no_banner_no_driver() -> None:
    assert parse_banner("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") is None


def test_the_loaded_module_tells_the_driver_where_nvidia_smi_is_missing() -> None:
    assert parse_module(MODULE) == Driver(version="575.57.08", cuda=None)
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:01:48 UTC 2025\n"
    assert parse_module(closed) == Driver(version="580.65.06", cuda=None)


@pytest.mark.parametrize(
    ("banner", "code", "said"),
    [
        (OLD, 1, "error: NVIDIA driver 550.90.12 is too old: CUDA 13.0 needs driver 580 or newer; update it"),
        (GOOD, 0, ""),
        ("", 0, "warning: no NVIDIA driver found"),
    ],
)
def test_the_check_needs_nothing_installed_and_says_one_line(banner: str, code: int, said: str, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{banner}'\n" if banner else "#!/bin/sh\nexit 9\n")
    program.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-I", "-S", driver.__file__],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == (1 if said else 0)
