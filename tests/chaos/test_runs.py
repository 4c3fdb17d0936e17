import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.chaos.faults import parse_fault
from tests.chaos.processes import Processes
from tests.chaos.runs import Broken, Run, Sent, TooLate, damage, matched


def run_with(folder: Path, command: list[str]) -> Run:
    """A run whose driver is any command."""
    (folder / "run").mkdir()
    (folder / "log").write_text("first\nlast words\n")
    run = Run(number=1, seed=0, folder=folder, settings={}, rng=random.Random(0), say=print)
    run.driver = subprocess.Popen(command)
    run.legs.append(Processes(run.driver.pid))
    return run


def test_waiting_ends_with_the_first_answer_or_says_what_it_waited_for(tmp_path: Path) -> None:
    run = run_with(tmp_path, ["sleep", "60"])
    try:
        assert run.until("a list", lambda: [1], 1.0) == [1]
        with pytest.raises(Broken, match=r"waited 0\.3 s for a step"):
            run.until("a step", lambda: False, 0.3)
    finally:
        run.end()


def test_a_run_that_ends_well_was_too_quick_and_one_that_ends_badly_broke_its_promise(tmp_path: Path) -> None:
    for code, error, message in ((0, TooLate, "ended before a step"), (3, Broken, "exit code 3 .*last words")):
        folder = tmp_path / str(code)
        folder.mkdir()
        with pytest.raises(error, match=message):
            run_with(folder, ["sh", "-c", f"exit {code}"]).until("a step", lambda: False, 20.0)


def test_steps_and_faults_are_those_since_a_moment(tmp_path: Path) -> None:
    run = run_with(tmp_path, ["true"])
    steps = [{"time": time, "step": time, "train/loss_nats": 0.1} for time in (10, 20, 30)]
    lines = [*steps, {"time": 31, "step": 30, "evaluation/accuracy": 0.5}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"time"')
    faults = [{"time": time, "kind": "died", "who": "learner"} for time in (12, 25)]
    (run.path / "faults.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    assert run.finished_steps() == [10, 20, 30]
    assert run.finished_steps(since=20) == [20, 30]
    assert run.fault_lines(13) == [faults[1]]
    run.driver.wait(timeout=10)


def test_a_fault_owns_the_lines_until_the_next_one_is_sent() -> None:
    def sent(name: str, at: float) -> Sent:
        return Sent(run=1, fault=parse_fault(name), at=at, at_s=0.0, at_step=1, next_step_s=1.0)

    lines = [{"time": time, "who": "somebody"} for time in (9.0, 10.0, 19.9, 25.0)]
    owned, unexplained = matched([sent("kill:learner", 10.0), sent("slow:teacher", 20.0)], lines)
    assert [[line["time"] for line in each.lines] for each in owned] == [[10.0, 19.9], [25.0]]
    assert unexplained == ["a fault that nobody sent: {'time': 9.0, 'who': 'somebody'}"]
    assert matched([], []) == ([], [])
    assert len(matched([], lines)[1]) == len(lines)  # where nobody disturbs a run, every fault is one too many


def test_damage_alters_one_byte_of_one_file_and_never_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    files = {tmp_path / "state.json": b"state", tmp_path / "learner" / "part": b"tensors"}
    for seed in range(8):
        for path, content in {**files, tmp_path / "manifest.json": b"{}"}.items():
            path.write_bytes(content)
        damaged = damage(tmp_path, random.Random(seed))
        assert damaged in files
        assert damaged.read_bytes() != files[damaged]
        assert len(damaged.read_bytes()) == len(files[damaged])
        assert all(path.read_bytes() == files[path] for path in files if path != damaged)
        assert (tmp_path / "manifest.json").read_bytes() == b"{}"


def test_waiting_looks_at_the_whole_run_s_time_too(tmp_path: Path) -> None:
    run = run_with(tmp_path, ["sleep", "60"])
    run.started_s = time.monotonic() - 10_000
    try:
        with pytest.raises(Broken, match="took more than 1500 s; it was waited for a step"):
            run.until("a step", lambda: False, 20_000)
    finally:
        run.end()
