"""Jobs on a real Ray cluster of one node, started for these tests and asking for a token, as users submit them."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.submit import REPOSITORY, entrypoint

BIN = Path(sys.executable).parent
DEMO = "deploy/configs/demo.yaml"
SHORT = ["trainer.num_steps=2", "trainer.prompts_per_step=8", "trainer.warmup_steps=0", "evaluation.data.max_prompts=8"]
START_TIMEOUT_S, RUN_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 400.0, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running cluster of one node."""

    address: str
    environment: dict[str, str]  # what lets a client in
    mark: str  # in the environment of all its processes

    def submit(self, *settings: str) -> subprocess.Popen[str]:
        """``make submit``."""
        command = [sys.executable, "-m", "deploy.submit", DEMO, "--address", self.address]
        for setting in settings:
            command += ["--set", setting]
        return self.run(command)

    def run(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def listed(self, what: str, state: str) -> str:
        """Ray's own list of actors or placement groups in a state; empty where there are none."""
        command = [str(BIN / "ray"), "list", what, "--address", self.address, "--filter", f"state={state}"]
        answer = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        return "" if "No resource in the cluster" in answer else answer

    def processes(self) -> list[str]:
        """Titles of the processes of runs: actors and what vLLM starts."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [
            title for title in found if re.search(r"EngineActor|LearnerActor|RolloutActor|VLLM::|deploy\.cli", title)
        ]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    (folder / "token").write_text(uuid4().hex)
    ports = free_ports(6)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    command = (
        f"ray start --head --block --num-cpus 2 --temp-dir {folder} --object-store-memory 200000000 "
        f"--node-ip-address 127.0.0.1 --port {ports[0]} --dashboard-host 127.0.0.1 --dashboard-port {ports[1]} "
        f"--dashboard-agent-listen-port {ports[2]} --dashboard-agent-grpc-port {ports[3]} "
        f"--runtime-env-agent-port {ports[4]} --metrics-export-port {ports[5]}"
    )
    mark = folder.name
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            shlex.split(command), env=environment | {"ADASWITCH_HEAD": mark}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        wait_for(lambda: answers(f"{address}/api/version"), f"the cluster; see {folder}/head.log", START_TIMEOUT_S)
        yield Head(address=address, environment=environment, mark=mark)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401  # no token was sent
    except OSError:
        return False
    return True


def wait_for(condition, what: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.5)


def read_until(job: subprocess.Popen[str], wanted: str) -> str:
    """The job's output up to the line that holds ``wanted``. The test's own time-out ends a job that hangs."""
    assert job.stdout is not None
    seen = ""
    for line in job.stdout:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(f"the job ended without {wanted!r}:\n{seen}")


def assert_nothing_is_left(head: Head) -> None:
    wait_for(lambda: not head.processes(), f"the end of {head.processes()}", STOP_TIMEOUT_S)
    assert not head.listed("actors", "ALIVE")
    assert not head.listed("placement-groups", "CREATED")


def test_a_submitted_run_succeeds_shows_its_progress_and_leaves_its_folder_here(head: Head, tmp_path: Path) -> None:
    job = head.submit(*SHORT, f"run_dir={tmp_path / 'run'}")
    log, _ = job.communicate(timeout=RUN_TIMEOUT_S)
    assert job.returncode == 0, log
    places = [log.index(text) for text in ("starting the engines", "step 1/2  loss", "step 2/2  loss", "run folder  ")]
    assert places == sorted(places)
    assert "\x1b" not in log, "no terminal: no colours, no cursor movements"
    assert (tmp_path / "run" / "summary.json").exists()
    assert_nothing_is_left(head)


def test_a_stopped_run_ends_in_order_within_20_s_and_leaves_nothing(head: Head, tmp_path: Path) -> None:
    job = head.submit(f"run_dir={tmp_path / 'run'}")
    log = read_until(job, "step 1/80")
    job_id = re.search(r"raysubmit_\w+", log)
    assert job_id is not None
    stopped_at_s = time.monotonic()
    head.run([str(BIN / "ray"), "job", "stop", "--no-wait", "--address", head.address, job_id.group()]).wait(timeout=60)
    rest, _ = job.communicate(timeout=60)
    wait_for(lambda: not head.processes(), "the run's processes to end", STOP_TIMEOUT_S)
    assert time.monotonic() - stopped_at_s < STOP_TIMEOUT_S + 10  # starting the command itself takes seconds
    assert "interrupted" in rest
    assert job.returncode == 130
    assert_nothing_is_left(head)


def test_a_run_that_waits_says_what_is_missing_and_gives_up_in_time(head: Head, tmp_path: Path) -> None:
    job = head.submit(
        f"run_dir={tmp_path / 'run'}", "placement.strategy=STRICT_SPREAD", "placement.timeout_s=12", *SHORT
    )
    log, _ = job.communicate(timeout=RUN_TIMEOUT_S)
    assert re.search(r"waiting for resources, \d+ of 12 s: STRICT_SPREAD needs a node for each of 4 bundles", log)
    assert "error: placement: waited 12 s for the cluster's resources: STRICT_SPREAD needs a node for each" in log
    assert job.returncode == 2  # the run's, not Ray's 1
    assert_nothing_is_left(head)


def test_a_bad_setting_is_refused_before_anything_is_uploaded(head: Head) -> None:
    job = head.submit("trainer.num_steps=none")
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert log.startswith("error: ")
    assert "raysubmit" not in log


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_cluster_s_token_one_line_says_so(head: Head, tmp_path: Path, token: str | None) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": uuid4().hex} if token else {})
    job = Head(address=head.address, environment=environment, mark=head.mark).submit()
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert len(log.splitlines()) == 1, log
    assert "error: --address" in log
    assert "uthentication" in log


def test_a_cluster_that_is_not_there_is_named(head: Head) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    job = Head(address=nowhere, environment=head.environment, mark=head.mark).submit()
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert log.startswith(f"error: --address {nowhere}: ")
    assert len(log.splitlines()) == 1, log


def test_the_entrypoint_keeps_words_with_blanks_and_quotes_together() -> None:
    command = entrypoint(Path("a b.yaml"), ["policy={type: fixed, position: 3}"], run_dir=Path("/runs/it's"))
    words = shlex.split(command.partition("exec ")[2])
    assert words[-6:] == [
        "train",
        "a b.yaml",
        "--set",
        "policy={type: fixed, position: 3}",
        "--set",
        "run_dir=/runs/it's",
    ]
