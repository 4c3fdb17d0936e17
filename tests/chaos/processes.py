"""A run's processes, found below its driver and told apart by their titles."""

import contextlib
import signal
import time
from collections.abc import Iterable

import psutil

from tests.chaos.faults import SLOW

_TITLES = {"controller": "ray::RolloutActor", "learner": "ray::LearnerActor"}
_TITLES |= {f"{role} core": f"{role}::EngineCore" for role in ("student", "teacher")}


class Processes:
    """All processes that a driver has started, those of killed parents included once they have been seen."""

    def __init__(self, driver_pid: int) -> None:
        self._driver = psutil.Process(driver_pid)
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """To be called often: who starts and loses its parent between two looks is not seen."""
        with contextlib.suppress(psutil.Error):
            self._seen |= {self._driver, *self._driver.children(recursive=True)}

    def of(self, target: str) -> list[psutil.Process]:
        """Those that are the target: one, unless it is not there yet or is being replaced.

        An engine's actor has a title of Ray's that does not tell its role; it is the parent of vLLM's process.
        """
        self.look()
        if target == SLOW:
            return [process for part in ("actor", "core") for process in self.of(f"{SLOW} {part}")]
        role, _, part = target.partition(" ")
        if part == "actor":
            parents = [process.parent() for process in self.of(f"{role} core")]
            return [parent for parent in parents if parent is not None and title(parent).startswith("ray::EngineActor")]
        return [process for process in self.left() if title(process).startswith(_TITLES[target])]

    def left(self) -> list[psutil.Process]:
        """Those that go on."""
        return [process for process in self._seen if _goes_on(process)]

    def wait_until_gone(self, timeout_s: float) -> list[psutil.Process]:
        """Those that are still there when time is up."""
        deadline_s = time.monotonic() + timeout_s
        while (left := self.left()) and time.monotonic() < deadline_s:
            self.look()
            time.sleep(0.2)
        return left

    def end(self) -> None:
        """Leave nothing behind."""
        self.look()
        send(signal.SIGKILL, self.left())
        psutil.wait_procs(self.left(), timeout=20)


def title(process: psutil.Process) -> str:
    """The command line, which Ray and vLLM replace by a title; empty for a process that is gone."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def slow_down(processes: list[psutil.Process], *, seconds: float, stopped_s: float, running_s: float) -> None:
    """Let them run only part of the time, for a while."""
    end_s = time.monotonic() + seconds
    try:
        while time.monotonic() < end_s:
            send(signal.SIGSTOP, processes)
            time.sleep(stopped_s)
            send(signal.SIGCONT, processes)
            time.sleep(running_s)
    finally:
        send(signal.SIGCONT, processes)


def _goes_on(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
