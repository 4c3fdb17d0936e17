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

# What is started once a session, and so for tests of one process only. The longest group comes first.
GROUP_OF_FIXTURE = {"engines": "engines", "ray_address": "engines", "demo_run": "demo_run"}
GROUPS = list(dict.fromkeys(GROUP_OF_FIXTURE.values()))
GROUP_TIMEOUT_S = 300.0  # the start of what a group shares included


class ByGroupOrModule(LoadGroupScheduling):  # type: ignore[misc]
    """Gives a process whole groups, and of tests without a group whole modules, whose fixtures are then made once."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroupOrModule:
    return ByGroupOrModule(config, log)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by the shared fixtures that they ask for; begin with what takes longest: groups and slow tests."""
    places: dict[pytest.Item, int] = {}
    for item in items:
        wanted = {GROUP_OF_FIXTURE[name] for name in item.fixturenames if name in GROUP_OF_FIXTURE}
        groups = [group for group in GROUPS if group in wanted]
        assert len(groups) <= 1, f"{item.nodeid} needs what {' and '.join(groups)} share; let them be one group"
        is_slow = item.get_closest_marker("slow") is not None
        if groups:
            item.add_marker(pytest.mark.xdist_group(groups[0]))
        if (groups or is_slow) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(GROUP_TIMEOUT_S))
        places[item] = GROUPS.index(groups[0]) if groups else len(GROUPS) + (not is_slow)
    items.sort(key=places.__getitem__)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The demo's command with real engines, cut short, once."""
    return run_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray for drivers in this process."""
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
