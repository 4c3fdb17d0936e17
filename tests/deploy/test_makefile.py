"""Which build ``make`` installs. Nothing is installed: the commands that make would run are looked at."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Checkout:
    """The Makefile and what it looks at, with a machine that has an NVIDIA GPU or none."""

    def __init__(self, folder: Path, *, gpu: bool) -> None:
        self.folder = folder
        for name in ("Makefile", "deploy", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")
        (bin_folder / "nvidia-smi").chmod(0o700)
        self._path = f"{bin_folder}:{os.environ['PATH']}"

    def has_venv(self, build: str | None) -> None:
        """As ``make setup`` leaves it; None: as it left it before there were two builds."""
        (self.folder / ".venv").mkdir()
        if build:
            (self.folder / ".venv" / ".build").write_text(f"{build}\n")
        (self.folder / ".venv" / ".ready").touch()

    def commands(self, *arguments: str) -> list[str]:
        command = ["make", "--dry-run", "--no-print-directory", *arguments]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "GPU", "MFLAGS"))
        }
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment | {"PATH": self._path},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.splitlines()


def installs(commands: list[str]) -> list[str]:
    """Lock files, each once: a make within make repeats in a dry run what would have been done."""
    words = [word for line in commands if " install " in line for word in line.split()]
    return list(dict.fromkeys(word for word in words if word.endswith(".lock")))


@pytest.mark.parametrize("target", ["setup", "demo", "test"])
@pytest.mark.parametrize(
    ("gpu", "flag", "lock"),
    [
        (True, None, "cuda"),
        (True, "GPU=0", "cpu"),
        (True, "GPU=1", "cuda"),
        (False, None, "cpu"),
        (False, "GPU=1", "cuda"),
    ],
)
def test_a_new_environment_has_the_build_of_the_machine_or_of_the_flag(
    target: str, gpu: bool, flag: str | None, lock: str, tmp_path: Path
) -> None:
    commands = Checkout(tmp_path, gpu=gpu).commands(target, *([flag] if flag else []))
    assert installs(commands) == [f"deploy/lock/{lock}.lock"]
    checks_driver = [number for number, line in enumerate(commands) if line.endswith("deploy/lock/driver.py")]
    assert bool(checks_driver) == (lock == "cuda")
    constrained = [line for line in commands if line.endswith("-c deploy/lock/cuda-constraints.txt")]
    assert bool(constrained) == (lock == "cuda")
    assert not any("rm -rf" in line for line in commands)


@pytest.mark.parametrize("build", ["cpu", "cuda", None])
@pytest.mark.parametrize("gpu", [True, False])
def test_an_environment_keeps_its_build_without_a_flag(build: str | None, gpu: bool, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, gpu=gpu)
    checkout.has_venv(build)
    assert installs(checkout.commands("setup")) == []
    assert installs(checkout.commands("setup", "GPU=1" if build == "cuda" else "GPU=0")) == []


@pytest.mark.parametrize(
    ("build", "flag", "lock"), [("cpu", "GPU=1", "cuda"), (None, "GPU=1", "cuda"), ("cuda", "GPU=0", "cpu")]
)
def test_an_environment_of_the_other_build_is_made_anew(
    build: str | None, flag: str, lock: str, tmp_path: Path
) -> None:
    checkout = Checkout(tmp_path, gpu=True)
    checkout.has_venv(build)
    commands = checkout.commands("test", flag)
    assert installs(commands) == [f"deploy/lock/{lock}.lock"]
    removed = next(number for number, line in enumerate(commands) if "rm -rf .venv" in line)
    remembered = commands.index(f"echo {lock} > .venv/.build")
    installed = next(number for number, line in enumerate(commands) if " install " in line)
    assert removed < remembered < installed


def test_an_environment_is_refreshed_when_its_lock_changes(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, gpu=False)
    checkout.has_venv("cuda")
    os.utime(checkout.folder / ".venv" / ".ready", (0, 0))
    commands = checkout.commands("setup")
    assert installs(commands) == ["deploy/lock/cuda.lock"]
    assert not any("rm -rf" in line for line in commands)


@pytest.mark.parametrize(("flag", "with_gpus"), [("GPU=1", True), ("GPU=0", False), (None, False)])
def test_containers_get_gpus_when_told(flag: str | None, with_gpus: bool, tmp_path: Path) -> None:
    commands = Checkout(tmp_path, gpu=True).commands("image", *([flag] if flag else []))
    assert any("-f deploy/docker/docker-compose.nvidia.yml" in line for line in commands) == with_gpus
