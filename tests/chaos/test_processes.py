"""On real processes, which carry the titles and nothing else of those they stand for."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.chaos.processes import Processes, send, slow_down, title

# A family: each process starts those below it, takes its title, and waits.
FAMILY = """
import subprocess, sys, time
from setproctitle import setproctitle
family = {
    "driver": ["raylet"],
    "raylet": ["ray::EngineActor.exchange 1", "ray::EngineActor 2", "ray::RolloutActor.collect", "ray::LearnerActor"],
    "ray::EngineActor.exchange 1": ["student::EngineCore"],
    "ray::EngineActor 2": ["teacher::EngineCore"],
}
me = sys.argv[1]
for child in family.get(me, []):
    subprocess.Popen([sys.executable, "-c", sys.argv[2], child, sys.argv[2]])
setproctitle(me)
time.sleep(60)
"""


@pytest.fixture
def processes() -> Iterator[Processes]:
    driver = subprocess.Popen([sys.executable, "-c", FAMILY, "driver", FAMILY])
    processes = Processes(driver.pid)
    until(lambda: processes.of("teacher core") and processes.of("student core"))
    yield processes
    processes.end()
    driver.wait(timeout=10)


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "waited 20 s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("student actor", "ray::EngineActor.exchange 1"),
        ("teacher actor", "ray::EngineActor 2"),
        ("student core", "student::EngineCore"),
        ("teacher core", "teacher::EngineCore"),
        ("controller", "ray::RolloutActor.collect"),
        ("learner", "ray::LearnerActor"),
    ],
)
def test_each_target_is_one_process(processes: Processes, target: str, wanted: str) -> None:
    assert [title(process) for process in processes.of(target)] == [wanted]


def test_a_slow_teacher_is_all_of_its_processes(processes: Processes) -> None:
    found = [title(process) for process in processes.of("teacher")]
    assert found == ["ray::EngineActor 2", "teacher::EngineCore"]


def test_what_lost_its_parent_is_still_known_and_is_ended(processes: Processes) -> None:
    core = processes.of("teacher core")
    send(signal.SIGKILL, processes.of("teacher actor"))
    until(lambda: not any(title(process) == "ray::EngineActor 2" for process in processes.left()))
    assert processes.of("teacher core") == core
    assert not processes.of("teacher actor")
    send(signal.SIGSTOP, core)
    processes.end()
    assert processes.left() == []


def test_those_slowed_down_run_in_the_end(processes: Processes) -> None:
    teacher = processes.of("teacher")
    seen = set()

    def statuses() -> set[str]:
        seen.update(process.status() for process in teacher)
        return seen

    send(signal.SIGSTOP, teacher)
    until(lambda: psutil.STATUS_STOPPED in statuses())
    slow_down(teacher, seconds=0.1, stopped_s=0.05, running_s=0.05)
    until(lambda: {process.status() for process in teacher} == {psutil.STATUS_SLEEPING})
