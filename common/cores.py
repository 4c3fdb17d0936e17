"""On which cores of its machine a process runs."""

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError


def bind_to_cores(cores: Iterable[int]) -> None:
    """Keep this process, all its threads and whatever it starts from now on to these cores.

    Raises UserError for cores that the process may not use.
    """
    wanted, allowed = set(cores), os.sched_getaffinity(0)
    if not wanted <= allowed:
        raise UserError(f"cpu_cores must be among {sorted(allowed)} on this machine, got {sorted(wanted)}")
    move_to_cores(wanted)


def move_to_cores(cores: Iterable[int]) -> None:
    """The same, for a process that may leave the cores it was started on. Raises OSError where the system refuses."""
    wanted = set(cores)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), wanted)
