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
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEMO = "deploy/configs/demo.yaml"
SHORT = ["trainer.num_steps=2", "trainer.prompts_per_step=8", "trainer.warmup_steps=0", "evaluation.data.max_prompts=8"]
MARK = "ADASWITCH_HEAD"
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running cluster of one node."""

    address: str  # of its dashboard
    gcs_address: str  # where nodes and drivers join
    environment: dict[str, str]  # what lets a client in
    folder: Path  # Ray's own, and everything's logs; named in the environment of all the cluster's processes

    @contextlib.contextmanager
    def node(self, options: str) -> Iterator[subprocess.Popen[str]]:
        """One node of the cluster, ``options`` being ``ray start``'s."""
        ports = free_ports(4)
        command = (
            f"ray start --block --num-cpus 2 --object-store-memory 200000000 {options} "
            f"--dashboard-agent-listen-port {ports[0]} --dashboard-agent-grpc-port {ports[1]} "
            f"--runtime-env-agent-port {ports[2]} --metrics-export-port {ports[3]}"
        )
        with (self.folder / f"node-{ports[0]}.log").open("w") as log:
            process = subprocess.Popen(
                shlex.split(command),
                env=self.environment | {MARK: self.folder.name},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        try:
            yield process
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
        """Ray's own list of actors, nodes or placement groups in a state."""
        command = [str(BIN / "ray"), "list", what, "--address", self.address, "--filter", f"state={state}"]
        answer = subprocess.run(
            [*command, "--format", "json"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=True,
        )
        if answer.stdout.startswith("No resource"):  # whatever the format
            return []
        found: list[dict[str, str]] = json.loads(answer.stdout)
        return found

    def processes(self) -> list[str]:
        """Titles of the processes of runs: actors and what vLLM starts."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.folder.name}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [
            title
            for title in found
            if re.search(r"EngineActor|LearnerActor|RolloutActor|::EngineCore|::Worker|deploy\.cli", title)
        ]


@contextlib.contextmanager
def started_head() -> Iterator[Head]:
    """A cluster on free ports that asks for a token of its own; ended with all its processes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    (folder / "token").write_text(uuid4().hex)
    gcs_port, dashboard_port = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    head = Head(
        address=f"http://127.0.0.1:{dashboard_port}",
        gcs_address=f"127.0.0.1:{gcs_port}",
        environment=environment,
        folder=folder,
    )
    options = (
        f"--head --node-ip-address 127.0.0.1 --port {gcs_port} --temp-dir {folder} "
        f"--dashboard-host 127.0.0.1 --dashboard-port {dashboard_port}"
    )
    try:
        with head.node(options):
            wait_for(
                lambda: _answers(f"{head.address}/api/version"), f"the cluster; see {folder}/*.log", START_TIMEOUT_S
            )
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
