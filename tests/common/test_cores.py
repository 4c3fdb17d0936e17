import subprocess
import sys

import pytest

from common.cores import children_on_cores
from common.errors import UserError

SEEN = """
import os, subprocess, sys, threading
from common.cores import children_on_cores, move_to_cores

def of_threads():
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

def of_a_child():
    command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
    return subprocess.check_output(command, text=True).strip()

stop = threading.Event()
threading.Thread(target=stop.wait).start()
before, core = of_threads(), max(os.sched_getaffinity(0))
with children_on_cores([core]):
    threading.Thread(target=stop.wait).start()
    print(of_a_child() == str({core}))
print(of_threads() == before)
move_to_cores([core])
print(of_threads() == {frozenset([core])}, of_a_child() == str({core}))
stop.set()
"""


def test_children_keep_to_the_cores_and_the_process_returns_with_all_its_threads_or_moves_with_all_of_them() -> None:
    ran = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == ["True"] * 4


def test_cores_that_are_not_there_are_refused_by_number() -> None:
    refused = pytest.raises(UserError, match=r"^cpu_cores: got \[4095\], but this machine grants \[0.*\]$")
    with refused, children_on_cores([4095]):
        pass
