"""On which cores of its machine a process runs."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from common.errors import UserError


@contextmanager
def children_on_cores(cores: Iterable[int]) -> Iterator[None]:
    """Processes that this thread starts within the block keep to these cores; this process is where it was afterwards.

    Raises UserError for cores that the system does not give.
    """
    wanted, before = set(cores), os.sched_getaffinity(0)
    with suppress(OSError):  # none of them is there
        os.sched_setaffinity(0, wanted)
    try:
        if (given := os.sched_getaffinity(0)) != wanted:
            raise UserError(f"cpu_cores: wanted {sorted(wanted)}, this machine gives {sorted(given)}")
        yield
    finally:
        move_to_cores(before)  # with the threads that were started meanwhile


def move_to_cores(cores: Iterable[int], pid: int | Literal["self"] = "self") -> None:
    """Keep a process, all its threads and whatever it starts from now on to these cores, even if it was not on them.

    Raises OSError where the system refuses.
    """
    wanted = set(cores)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), wanted)
