"""Restrict processes to CPU cores."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from common.errors import UserError


@contextmanager
def children_on_cores(cores: Iterable[int]) -> Iterator[None]:
    """Run processes that this thread starts within the block on these cores. Afterwards this process has its old cores.

    Raises UserError for cores that the system does not grant.
    """
    wanted, before = set(cores), os.sched_getaffinity(0)
    with suppress(OSError):  # none of the cores exists
        os.sched_setaffinity(0, wanted)
    try:
        if (granted := os.sched_getaffinity(0)) != wanted:
            raise UserError(f"cpu_cores: got {sorted(wanted)}, but this machine grants {sorted(granted)}")
        yield
    finally:
        move_to_cores(before)  # including threads that were started within the block


def move_to_cores(cores: Iterable[int], pid: int | Literal["self"] = "self") -> None:
    """Restrict a process, all its threads and everything it starts from now on to these cores.

    Raises OSError if the system refuses.
    """
    wanted = set(cores)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), wanted)
