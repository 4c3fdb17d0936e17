"""What tests of several parts share: fixtures of the session, and how two processes divide the tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadGroupScheduling

from tests.support import sequences
from tests.support.demo_run import DemoRun, run_demo

# A thread for each of two test processes on two cores. Before anything imports torch; `run_environment` takes it back.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example took says nothing on a shared machine. `thorough` is what `make test-all` runs.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")

# Fixtures of the session that take so much that one process alone makes them: the tests that ask for one are a group.
SHARED = ["engines", "demo_run"]
# Their start included, and that of Ray, which each process makes for itself.
SHARED_TIMEOUT_S = 600.0


class ByGroupOrModule(LoadGroupScheduling):  # type: ignore[misc]
    """Gives a process whole groups, and of tests without a group whole modules, whose fixtures are then made once."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroupOrModule:
    return ByGroupOrModule(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Group tests by what they share, give those that start much their time, and begin with what takes longest."""
    heavy_modules = {item.path for item in items if _is_heavy(item)}
    group_of = {item.path: name for item in items for name in SHARED if name in item.fixturenames}
    places: dict[pytest.Item, int] = {}
    for item in items:
        group = group_of.get(item.path)  # of its whole module, whose own fixtures are made once
        assert {*SHARED} & {*item.fixturenames} <= {group}, (
            f"{item.path} asks for all of {SHARED}: let them be one group"
        )
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
        if (group or _is_heavy(item)) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SHARED_TIMEOUT_S))
        places[item] = SHARED.index(group) if group else len(SHARED) + (item.path not in heavy_modules)
    items.sort(key=places.__getitem__)
    yield
    if getattr(config.option, "loadgroup", False):
        for item in items:
            for group in item.iter_markers("xdist_group"):
                assert item.nodeid.endswith(f"@{group.args[0]}"), "this pytest-xdist can't group this pytest's tests"


def _is_heavy(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None or "ray_address" in item.fixturenames


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The demo's command with real engines, cut short, once."""
    return run_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray for drivers in this process, one after the other."""
    from tests.support.ray_heads import started_ray  # Ray takes its time to import

    with started_ray() as address:
        yield address


@pytest.fixture(scope="session")
def make_sequence() -> sequences.MakeSequence:
    """``sequences.make_sequence``."""
    return sequences.make_sequence


@pytest.fixture(scope="session")
def make_mixed_sequence() -> sequences.MakeSequence:
    """The same, under a name that the learner's tests do not give to another builder."""
    return sequences.make_sequence


@pytest.fixture(scope="session")
def decode() -> Callable[[list[int]], str]:
    return sequences.decode


@pytest.fixture(scope="session")
def token_texts() -> Callable[[list[int]], list[str]]:
    return sequences.token_texts
