import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[4]
PARENT = """
    import multiprocessing, sys, time
    from rollout_server.engines.vllm_plugin.lifeline import end_with_parent

    def child(says):
        {attach}
        says.send("here")
        time.sleep(60)

    if __name__ == "__main__":
        end_with_parent()  # nothing, here
        hears, says = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=child, args=(says,))
        process.start()
        hears.recv()
        print(process.pid, flush=True)
        time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("attach", "outlives"), [("end_with_parent()", False), ("pass", True)])
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path, attach: str, outlives: bool) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT.format(attach=attach)))
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    deadline_s = time.monotonic() + (1.0 if outlives else 10.0)
    while is_running(child) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert is_running(child) == outlives
    if outlives:
        os.kill(child, signal.SIGKILL)
