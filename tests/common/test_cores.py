import subprocess
import sys

import pytest

from common.cores import bind_to_cores
from common.errors import UserError

CORES_OF_A_CHILD = """
import os, subprocess, sys, threading
from common.cores import bind_to_cores
stop = threading.Event()
threading.Thread(target=stop.wait).start()
core = min(os.sched_getaffinity(0))
bind_to_cores([core])
threads = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
child = subprocess.check_output([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], text=True)
stop.set()
print(len(threads), all(cores == {core} for cores in threads), child.strip() == str({core}))
"""


def test_all_threads_and_children_of_a_bound_process_stay_on_its_cores() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CORES_OF_A_CHILD], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.split() == ["2", "True", "True"]


def test_cores_that_are_not_there_are_refused_by_number() -> None:
    with pytest.raises(UserError, match=r"^cpu_cores must be among \[0.*\] on this machine, got \[4095\]$"):
        bind_to_cores([4095])
