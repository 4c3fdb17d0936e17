"""Real Ray clusters for tests: a head on free ports, more nodes where a test wants them, and what they still run."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray

from tests.support.marked import processes_with

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEMO = "deploy/configs/demo.yaml"
SHORT = ["trainer.num_steps=2", "trainer.prompts_per_step=8", "trainer.warmup_steps=0", "evaluation.data.max_prompts=8"]
MARK = "ADASWITCH_HEAD"
START_TIMEOUT_S = 120.0
_OF_RUNS = r"EngineActor|LearnerActor|RolloutActor|::EngineCore|::Worker|deploy\.cli|scripted_run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running cluster of one node."""

    address: str  # of its dashboard
    gcs_address: str  # where nodes and drivers join
    environment: dict[str, str]  # what lets a client in
    folder: Path  # Ray's own, and everything's logs; named in the environment of all the cluster's processes

    @contextlib.contextmanager
    def node(self, options: str, *, num_cpus: int = 2) -> Iterator[Callable[[], bool]]:
        """One node of the cluster, ``options`` being ``ray start``'s. Yields what says whether it has started."""
        ports = free_ports(4)
        command = (
            f"ray start --block --num-cpus {num_cpus} --object-store-memory 200000000 {options} "
            f"--dashboard-agent-listen-port {ports[0]} --dashboard-agent-grpc-port {ports[1]} "
            f"--runtime-env-agent-port {ports[2]} --metrics-export-port {ports[3]} "
            f"--min-worker-port 0 --max-worker-port 0"  # any that are free, or nodes would take each other's
        )
        path = self.folder / f"node-{ports[0]}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                shlex.split(command),
                env=self.environment | {MARK: self.folder.name},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

        def has_started() -> bool:
            assert process.poll() is None, path.read_text()
            return "Ray runtime started" in path.read_text()

        try:
            yield has_started
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()

    def run(self, command: list[str]) -> subprocess.Popen[str]:
        """A client of the cluster, in the repository's root."""
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def listed(self, what: str, state: str) -> list[dict[str, str]]:
        """What ``ray list`` shows of actors, nodes or placement_groups in a state, without its seconds of imports."""
        query = {"filter_keys": "state", "filter_predicates": "=", "filter_values": state}
        request = urllib.request.Request(f"{self.address}/api/v0/{what}?{urllib.parse.urlencode(query)}")
        request.add_header("Authorization", f"Bearer {Path(self.environment['RAY_AUTH_TOKEN_PATH']).read_text()}")
        with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as answer:
            found: list[dict[str, str]] = json.loads(answer.read())["data"]["result"]["result"]
        return found

    def processes(self) -> list[str]:
        """Titles of the processes of runs: actors, what vLLM starts, and drivers."""
        return [title for title in processes_with(MARK, self.folder.name) if re.search(_OF_RUNS, title)]


@contextlib.contextmanager
def started_head() -> Iterator[Head]:
    """A cluster on free ports that asks for a token of its own; ended with all its processes."""
    (dashboard_port,) = free_ports(1)
    with _folder() as folder:
        (folder / "token").write_text(uuid4().hex)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        head = _head(folder, token, address=f"http://127.0.0.1:{dashboard_port}")
        with head.node(_head_options(head, f"--dashboard-host 127.0.0.1 --dashboard-port {dashboard_port}")):
            wait_for(
                lambda: _answers(f"{head.address}/api/version"), f"the cluster; see {folder}/*.log", START_TIMEOUT_S
            )
            yield head


@contextlib.contextmanager
def started_ray(options: str = "", *, num_cpus: int = 8) -> Iterator[str]:
    """A cluster without dashboard and token, for drivers in this process that join it one after the other.

    Yields its address. A driver's actors end when it leaves, so that the next one finds the cluster empty. All clusters
    of a process must agree on tokens: Ray keeps to the first one's rule, and a cluster of ``ray.init`` has a token.
    """
    with _folder() as folder:
        head = _head(folder, {"RAY_AUTH_MODE": "disabled"}, address="")
        options = _head_options(head, f"--include-dashboard=false {options}")
        with head.node(options, num_cpus=num_cpus) as has_started:
            wait_for(has_started, f"Ray; see {folder}/*.log", START_TIMEOUT_S)
            yield head.gcs_address


@contextlib.contextmanager
def joined(address: str, **options: Any) -> Iterator[None]:
    """This process as a driver in a cluster; ``options`` are ``ray.init``'s."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _head(folder: Path, authentication: dict[str, str], *, address: str) -> Head:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= authentication | {
        "PATH": f"{BIN}:{environment['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": f"{START_TIMEOUT_S:.0f}",  # by itself 30, too short for a busy machine
    }
    (port,) = free_ports(1)
    return Head(address=address, gcs_address=f"127.0.0.1:{port}", environment=environment, folder=folder)


def _head_options(head: Head, more: str) -> str:
    host, _, port = head.gcs_address.partition(":")
    (client_port,) = free_ports(1)
    return (
        f"--head --node-ip-address {host} --port {port} --ray-client-server-port {client_port} "
        f"--temp-dir {head.folder} {more}"
    )


def free_ports(num_ports: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401  # no token was sent
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.5)
